"""Denoising queries from noised ground truth (DN-DETR, Li et al., 2022; Mask DINO, section 3.4)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from dimaskdino.layers.boxes import inverse_sigmoid
from dimaskdino.modeling.registry import DENOISING_REGISTRY
from dimaskdino.structures import DenoisingQueries, Targets, Tokens


@DENOISING_REGISTRY.register()
class Denoising(nn.Module):
    """Builds denoising queries from targets.

    Args:
        dim: channels C.
        num_classes: classes K.
        num_queries: at most this many denoising queries per image (MODEL.MaskDINO.DN_NUM); 0 for none.
        noise_scale: noise on labels (probability scale / 2) and boxes; 0 for none.
    """

    @configurable
    def __init__(self, *, dim: int, num_classes: int, num_queries: int, noise_scale: float) -> None:
        super().__init__()
        self.label_embed = nn.Embedding(num_classes, dim)
        self.num_classes, self.num_queries, self.noise_scale = num_classes, num_queries, noise_scale

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO.DN and the keys beside it."""
        node = cfg.MODEL.MaskDINO
        return {
            "dim": node.HIDDEN_DIM,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "num_queries": node.DN_NUM if node.DN != "no" else 0,
            "noise_scale": node.DN_NOISE_SCALE,
        }

    def forward(self, targets: Sequence[Targets]) -> DenoisingQueries | None:
        """Queries for a batch; None where no image has an object, or denoising is off.

        Deviation: the releases drop denoising for the whole batch when an image has more objects than ``num_queries``;
        here such an image denoises a random choice of that many objects, in one group.
        """
        largest = max((len(target) for target in targets), default=0)
        group_size = min(largest, self.num_queries)
        if group_size == 0:
            return None
        num_groups = self.num_queries // group_size
        device = self.label_embed.weight.device
        chosen = [self._choose(len(target), device) for target in targets]
        images = torch.cat([torch.full_like(index, image) for image, index in enumerate(chosen)]).repeat(num_groups)
        places = torch.cat([torch.arange(len(index), device=device) for index in chosen])
        places = torch.cat([places + group * group_size for group in range(num_groups)])
        labels = torch.cat([target.labels[index] for target, index in zip(targets, chosen, strict=True)])
        boxes = torch.cat([target.boxes[index] for target, index in zip(targets, chosen, strict=True)])
        known = Tokens(
            self.label_embed(self._noise_labels(labels.repeat(num_groups))),
            self._noise_boxes(boxes.repeat(num_groups, 1)),
        )
        content = known.content.new_zeros(len(targets), num_groups * group_size, known.content.shape[-1])
        box_logits = known.boxes.new_zeros(*content.shape[:2], 4)
        tokens = Tokens(
            content.index_put((images, places), known.content),
            box_logits.index_put((images, places), inverse_sigmoid(known.boxes)).sigmoid(),
        )
        return DenoisingQueries(tokens, [_matches(i, num_groups, group_size) for i in chosen], num_groups, group_size)

    def _choose(self, num_objects: int, device: torch.device) -> Tensor:
        """Indices of the objects to denoise: all, or a random choice where there are too many."""
        if num_objects <= self.num_queries:
            return torch.arange(num_objects, device=device)
        return torch.randperm(num_objects, device=device)[: self.num_queries]

    def _noise_labels(self, labels: Tensor) -> Tensor:
        if self.noise_scale <= 0:
            return labels
        flip = torch.rand(labels.shape, device=labels.device) < self.noise_scale * 0.5
        return torch.where(flip, torch.randint_like(labels, self.num_classes), labels)

    def _noise_boxes(self, boxes: Tensor) -> Tensor:
        """Centre by up to half, size by up to the whole of the box size, times the noise scale."""
        if self.noise_scale > 0:
            size = boxes[:, 2:]
            noise = torch.rand_like(boxes) * 2 - 1
            boxes = boxes + noise * torch.cat((size / 2, size), dim=-1) * self.noise_scale
        return boxes


def _matches(chosen: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Which query stands for which target of one image, group after group."""
    places = torch.arange(len(chosen), device=chosen.device)
    starts = torch.arange(num_groups, device=chosen.device) * group_size
    return (starts[:, None] + places).flatten(), chosen.repeat(num_groups)
