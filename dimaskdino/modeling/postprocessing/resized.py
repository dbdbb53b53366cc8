"""Masks of the asked size in one pass over their pixels, where the compiled op runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dimaskdino.structures.rle_masks import Size


def resized_masks(logits: Tensor, steps: Sequence[tuple[Size, Size]], masks: Tensor) -> Tensor:
    """Interpolate logits bilinearly, step by step, and keep where they are positive.

    The steps of an axis are joined to one sum of cells first, so that no map between them is ever made.

    Args:
        logits: (N, h, w) float32.
        steps: (size after the step, part of it that is kept), each (height, width) in px.
        masks: (N, H, W) bool of the last kept size, which is filled.

    Returns:
        (N,) mean probability inside each mask; 0 for an empty one.
    """
    axes: list[Tensor] = []
    for axis, cells in enumerate(logits.shape[1:]):
        axes += _taps(cells, [(size[axis], kept[axis]) for size, kept in steps])
    probability, area = torch.ops.dimaskdino.resized_masks(logits, *axes, masks).unbind(1)
    return probability / (area + 1e-6)


def _taps(cells: int, steps: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Which cells make each pixel of an axis, (taps, pixels) int32, and their weights, float32."""
    index, weights = torch.arange(cells)[None], torch.ones(1, cells)
    for size, kept in steps:
        # As torch.nn.functional.interpolate without aligned corners, in its precision.
        place = ((torch.arange(size, dtype=torch.float32) + 0.5) * (cells / size) - 0.5).clamp(min=0)
        lower = place.long().clamp(max=cells - 1)
        upper, share = (lower + 1).clamp(max=cells - 1), place - lower
        lower, upper, share = lower[:kept], upper[:kept], share[:kept]
        index = torch.cat((index[:, lower], index[:, upper]))
        weights = torch.cat((weights[:, lower] * (1 - share), weights[:, upper] * share))
        cells = kept
    return index.int().contiguous(), weights.contiguous()
