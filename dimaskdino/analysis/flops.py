"""Multiply-adds and parameters of a model, part by part."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape
from torch import Tensor, nn

from dimaskdino.layers.padding import PaddedBatch
from dimaskdino.modeling.meta_arch.maskdino import DIMaskDINO

CONVENTION = (
    "A multiply-add is one FLOP, as in the papers: of convolutions, linear layers, and products of matrices (attention "
    "and masks included). Deformable attention takes five for each sampled value, four to interpolate and one to "
    "weight it, beside its linear layers. Norms count 1 to 5 for each value, interpolation 4; activations, additions, "
    "and positions count nothing. From the padded image to classes, boxes, and the masks of all queries of the last "
    "layer at the stride of the mask features; without choosing and resizing results."
)


@dataclass(frozen=True)
class Part:
    """Cost of a part of a model."""

    name: str  # path of the module
    flops: float  # multiply-adds of one image
    parameters: int  # number of weights; those that parts share count in the first one


class _Network(nn.Module):
    """A model from the padded image to the raw predictions of its last stage, as tensors."""

    def __init__(self, model: DIMaskDINO) -> None:
        super().__init__()
        self.backbone, self.sem_seg_head = model.backbone, model.sem_seg_head
        self._ignores_padding = model.ignores_padding

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[-2:]
        given = {"batch": PaddedBatch([(height, width)], (height, width))} if self._ignores_padding else {}
        last = self.sem_seg_head(self.backbone(image), **given).stages[-1]
        return last.logits, last.boxes, *(() if last.masks is None else (last.masks.dense(),))


def count_flops(model: DIMaskDINO, size: tuple[int, int]) -> FlopCountAnalysis:
    """Count the multiply-adds of one image of ``size`` (height, width), a multiple of the model's divisibility.

    The convention is :data:`CONVENTION`. The count is that of deformable attention in plain PyTorch, which is traced;
    the compiled op does the same with fewer steps.
    """
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)  # names what has no products to count
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        image = torch.zeros(1, 3, *size, device=model.device, dtype=model.dtype)
        counted = FlopCountAnalysis(_Network(model).eval(), image)
        counted.set_op_handle(
            **{"aten::grid_sampler": elementwise_flop_counter(0, 5), "aten::scaled_dot_product_attention": _attention}
        )
        counted.total()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counted


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Multiply-adds of softmax(q k^T) v."""
    query, key, value = (get_shape(each) for each in inputs[:3])
    pairs = torch.Size(query[:-1]).numel() * key[-2]
    return Counter({"attention": pairs * (query[-1] + value[-1])})


def parts_of(model: DIMaskDINO, size: tuple[int, int], depth: int = 3) -> list[Part]:
    """The cost of every module down to ``depth`` names, in the order of the model; what costs nothing is left out.

    The first part, named "", is the whole. A module's cost that none of its listed children has, such as its own
    products of matrices, is the difference to the sum of theirs.
    """
    flops = count_flops(model, size).by_module()
    network = _Network(model)
    parts = []
    for name, module in network.named_modules():
        parameters = sum(each.numel() for each in module.parameters())
        if (not name or name.count(".") < depth) and (flops[name] or parameters):
            parts.append(Part(name, flops[name], parameters))
    return parts
