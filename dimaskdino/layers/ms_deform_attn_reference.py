"""Deformable attention in standard operators: from grid_sample, and from gathers."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dimaskdino.layers.exporting import export_form, split_levels, tensor_of_sizes

SpatialShapes = Sequence[tuple[int, int]]


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """What :func:`dimaskdino.layers.ms_deform_attn` computes, by one ``grid_sample`` a level.

    Args and Returns are those of that function; arguments are not checked. Half precision is sampled in float32:
    grid_sample wants locations in the dtype of the image, and bfloat16 cannot tell the pixels of a large level apart.

    Source: Deformable DETR (Zhu et al., 2021), Eq. 3.
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    if value.numel() == 0 or sampling_locations.numel() == 0:
        return _zeros_of(value, sampling_locations, attention_weights, (batch, queries, heads * channels))
    # grid_sample leaves open what a location that is not finite does: moved to where it samples nothing.
    finite = sampling_locations.isfinite().all(-1, keepdim=True)
    if export_form() == "gather":
        locations = torch.where(finite, sampling_locations, -1.0)
        return ms_deform_attn_gather(value, spatial_shapes, locations, attention_weights)
    grids = torch.where(finite, 2 * sampling_locations - 1, -3.0)
    sampled = []
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    levels = split_levels(value.to(dtype), spatial_shapes)
    for level, (level_value, (height, width)) in enumerate(zip(levels, spatial_shapes, strict=True)):
        if height * width == 0:
            sampled.append(value.new_zeros(batch * heads, channels, queries, points, dtype=dtype))
            continue
        image = level_value.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1).to(dtype)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.permute(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, len(spatial_shapes) * points)
    output = (torch.cat(sampled, dim=-1) * weights.to(dtype)).sum(-1).to(value.dtype)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def _zeros_of(value: Tensor, locations: Tensor, weights: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros that hang on all three arguments, so that each gets a gradient (of zeros)."""
    nothing = value.sum() * 0 + locations.sum().to(value.dtype) * 0 + weights.sum().to(value.dtype) * 0
    return value.new_zeros(shape) + nothing


def sampling_locations(reference: Tensor, offsets: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
    """Where offsets from references lie.

    Args:
        reference: (B, Q, 2) points or (B, Q, 4) boxes cxcywh, normalized; or one for each level, (B, Q, L, 2 or 4).
        offsets: (B, Q, H, L, P, 2); in pixels of each level for points, in halves of the box size shared by the P
            points for boxes.
        spatial_shapes: (height, width) of each level.

    Returns:
        (B, Q, H, L, P, 2) as (x, y), normalized.
    """
    reference = reference[:, :, None] if reference.dim() == 3 else reference
    center = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 4:
        size = reference[:, :, None, :, None, 2:]
        return center + offsets / offsets.shape[-2] * size * 0.5
    # A level without tokens has no pixels to count in; nothing is sampled from it wherever the locations lie.
    sizes = [(max(width, 1), max(height, 1)) for height, width in spatial_shapes]
    level_size = tensor_of_sizes(sizes, offsets.dtype, offsets.device)
    return center + offsets / level_size.view(-1, 1, 2)


def ms_deform_attn_fused_reference(
    value: Tensor, spatial_shapes: SpatialShapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """What :func:`dimaskdino.layers.ms_deform_attn_fused` computes, in separate steps."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    weights = logits.to(dtype).flatten(-2).softmax(-1).view(logits.shape)
    locations = sampling_locations(reference.to(dtype), offsets.to(dtype), spatial_shapes)
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)


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
