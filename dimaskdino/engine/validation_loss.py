"""The losses of test images."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from dimaskdino.data import build_mapper
from dimaskdino.data.loaders import test_entries
from dimaskdino.engine.nonfinite import unwrapped
from dimaskdino.modeling.meta_arch import needs_masks
from dimaskdino.seeds import VALIDATION, seed_from

# What behaves otherwise in training than in evaluation, apart from the model itself: batch norm, dropout, and the
# drop-path of backbones, which have classes of their own.
_IN_EVALUATION = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
_DROP_PATH = "DropPath"


@torch.no_grad()
def validation_losses(cfg: CfgNode, model: nn.Module, dataset_name: str) -> dict[str, float]:
    """The losses of a dataset in one image a batch, averaged over its images with objects; all processes must call it.

    Batch norm, dropout and drop-path are in evaluation. Denoising and points are drawn from the number of an image, so
    that two evaluations differ by the weights alone. Several processes normalize by the objects of all their batches,
    as in training, so their losses differ from those of one process.

    Args:
        cfg: of the run.
        model: may be wrapped for distribution.
        dataset_name: registered, with labels.

    Returns:
        Loss -> value, and their sum as "total_loss".
    """
    entries = test_entries(cfg, dataset_name)
    entries = [entry for entry in entries if entry.get("annotations") != []]
    mapper = build_mapper(cfg, is_train=False, with_instances=True, with_masks=needs_masks(cfg))
    model = unwrapped(model)
    sums: dict[str, Tensor] = {}
    with _loss_mode(model):
        # Every process computes as many batches: the model sums up the objects of all.
        for first in range(math.ceil(len(entries) / comm.get_world_size())):
            index = first * comm.get_world_size() + comm.get_rank()
            seed_from(0, VALIDATION, index)
            losses = model([mapper(entries[index % len(entries)])])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0 * value) + value * (index < len(entries))
    if not sums:
        return {}
    values = torch.stack([sums[name].float() for name in sorted(sums)])
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
    averages = dict(zip(sorted(sums), (values / len(entries)).tolist(), strict=True))
    return {"total_loss": sum(averages.values()), **averages}


@contextlib.contextmanager
def _loss_mode(model: nn.Module) -> Iterator[None]:
    """Let a model compute losses without what training does at random or to its running statistics."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, _IN_EVALUATION) or type(module).__name__ == _DROP_PATH:
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
