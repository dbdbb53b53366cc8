"""Deformable attention from gathers, for runtimes whose grid_sample is missing, slow or wrong."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dimaskdino.layers.exporting import tensor_of_sizes


def ms_deform_attn_gather(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """What :func:`dimaskdino.layers.ms_deform_attn` computes, from the four pixels around each sample.

    Args and Returns are those of that function; locations are finite and levels not empty, which is not checked.
    """
    batch, tokens, heads, channels = value.shape
    queries, device = locations.shape[1], value.device
    size = tensor_of_sizes([(width, height) for height, width in spatial_shapes], locations.dtype, device)[:, None]
    places = locations * size - 0.5
    # What is farther outside samples nothing either, and its pixel could have no number.
    low = torch.minimum(places.floor().clamp(min=-2), size + 1)
    share_of_next = (places - low).clamp(0, 1)
    first = _first_rows(batch, heads, tokens, device) + _level_starts(spatial_shapes, device)
    rows = value.transpose(1, 2).reshape(-1, channels)
    output = value.new_zeros(())
    for corner in itertools.product((0, 1), repeat=2):
        step = torch.tensor(corner, dtype=low.dtype, device=device)
        pixel, share = low + step, (1 - step) + (2 * step - 1) * share_of_next
        inside = ((pixel >= 0) & (pixel < size)).all(-1)
        x, y = torch.minimum(pixel.clamp(min=0), size - 1).long().unbind(-1)
        index = first + y * size[..., 0].long() + x
        sampled = rows.index_select(0, index.flatten()).view(batch, queries, heads, -1, channels)
        weights = attention_weights * share[..., 0] * share[..., 1] * inside
        output = output + (sampled * weights.view(batch, queries, heads, -1, 1)).sum(3)
    return output.flatten(2)


def _first_rows(batch: int, heads: int, tokens: int, device: torch.device) -> Tensor:
    """(B, 1, H, 1, 1) int64: row of the first token of each image and head."""
    images, each = torch.arange(batch, device=device), torch.arange(heads, device=device)
    return ((images[:, None] * heads + each) * tokens)[:, None, :, None, None]


def _level_starts(spatial_shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(L, 1) int64: tokens before each level."""
    areas = [height * width for height, width in spatial_shapes]
    starts = [0, *itertools.accumulate(areas[:-1])]
    return tensor_of_sizes([(start,) for start in starts], torch.int64, device)
