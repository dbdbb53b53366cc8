"""Multi-scale deformable attention (Deformable DETR, Zhu et al., 2021, Eq. 3)."""

import math

import torch
from torch import Tensor, nn

from dimaskdino.layers.ms_deform_attn_ops import call, use_compiled
from dimaskdino.layers.ms_deform_attn_reference import (
    SpatialShapes,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
    sampling_locations,
)
from dimaskdino.layers.padding import ValidCells
from dimaskdino.layers.precision import to_autocast_dtype


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples from every level.

    Runs as a compiled op on CPU and CUDA where that was built (docs/op.md), else in plain PyTorch. A location that is
    not finite samples nothing. Under autocast the values are sampled in its dtype, at float32 locations.

    Args:
        value: (B, S, H, D) levels flattened and joined, S = sum of height * width; float32, float64, float16 or
            bfloat16.
        spatial_shapes: (height, width) of each level, in the order of ``value``.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y), 0 and 1 the outer edges of the level; zero outside.
        attention_weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D) in the dtype of ``value`` (of autocast where that is on).

    Raises:
        ValueError: where shapes or devices do not belong together.
        TypeError: where a tensor is not of a floating dtype, or a size not a whole number.
    """
    names = ("sampling_locations", "attention_weights")
    _check_samples(value, spatial_shapes, names, sampling_locations, attention_weights)
    if not use_compiled(value.device):
        value = to_autocast_dtype(value)
        return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)
    dtype = _accumulate_dtype(value)
    return call(
        "ms_deform_attn", value, _flat(spatial_shapes), sampling_locations.to(dtype), attention_weights.to(dtype)
    )


def ms_deform_attn_fused(
    value: Tensor, spatial_shapes: SpatialShapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """:func:`ms_deform_attn` from what the module's projections give: softmax and locations are computed on the way.

    Args:
        value: (B, S, H, D) levels flattened and joined.
        spatial_shapes: (height, width) of each level.
        reference: (B, Q, 2) points or (B, Q, 4) boxes cxcywh, normalized, the same for all levels.
        offsets: (B, Q, H, L, P, 2); in pixels of each level for points, in halves of the box size shared by the P
            points for boxes.
        logits: (B, Q, H, L, P); attention weights are their softmax over L and P.

    Returns:
        (B, Q, H * D) in the dtype of ``value`` (of autocast where that is on).

    Raises:
        ValueError: where shapes or devices do not belong together.
        TypeError: where a tensor is not of a floating dtype, or a size not a whole number.
    """
    _check_samples(value, spatial_shapes, ("offsets", "logits"), offsets, logits)
    _check_reference(value, reference, offsets)
    if not use_compiled(value.device):
        value = to_autocast_dtype(value)
        return ms_deform_attn_fused_reference(value, spatial_shapes, reference, offsets, logits)
    dtype = _accumulate_dtype(value)
    low = offsets.dtype == logits.dtype == value.dtype
    return call(
        "ms_deform_attn_fused",
        value,
        _flat(spatial_shapes),
        reference.to(dtype),
        offsets if low else offsets.to(dtype),
        logits if low else logits.to(dtype),
    )


def _accumulate_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _flat(spatial_shapes: SpatialShapes) -> list[int]:
    return [size for shape in spatial_shapes for size in shape]


def _check_samples(
    value: Tensor, spatial_shapes: SpatialShapes, names: tuple[str, str], places: Tensor, weights: Tensor
) -> None:
    places_name, weights_name = names
    if value.dim() != 4 or places.dim() != 6 or weights.dim() != 5:
        raise ValueError(
            f"Deformable attention takes value (B, S, H, D), {places_name} (B, Q, H, L, P, 2) and {weights_name} "
            f"(B, Q, H, L, P); got {tuple(value.shape)}, {tuple(places.shape)}, {tuple(weights.shape)}."
        )
    batch, tokens, heads, _ = value.shape
    expected = (batch, places.shape[1], heads, len(spatial_shapes), places.shape[4])
    if tuple(weights.shape) != expected or tuple(places.shape) != (*expected, 2):
        raise ValueError(
            f"With value {tuple(value.shape)} and {len(spatial_shapes)} levels, {weights_name} must be {expected} "
            f"and {places_name} the same with a last dimension of 2; got {tuple(weights.shape)} and "
            f"{tuple(places.shape)}."
        )
    if any(isinstance(size, float) for shape in spatial_shapes for size in shape):
        raise TypeError(
            f"The heights and widths of the levels {list(spatial_shapes)} must be whole numbers, not floats."
        )
    if any(size < 0 for shape in spatial_shapes for size in shape):
        raise ValueError(f"A height or width of the levels {list(spatial_shapes)} is negative.")
    area = sum(height * width for height, width in spatial_shapes)
    if area != tokens:
        raise ValueError(f"The levels {list(spatial_shapes)} hold {area} tokens, but value has {tokens}.")
    _check_tensors(value, {"value": value, places_name: places, weights_name: weights})


def _check_reference(value: Tensor, reference: Tensor, offsets: Tensor) -> None:
    expected = tuple(offsets.shape[:2])
    if reference.dim() != 3 or tuple(reference.shape[:2]) != expected or reference.shape[2] not in (2, 4):
        raise ValueError(
            f"reference must be (B, Q, 2) or (B, Q, 4) with B and Q {expected}, got {tuple(reference.shape)}."
        )
    _check_tensors(value, {"reference": reference})


def _check_tensors(value: Tensor, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}.")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, but value is on {value.device}.")


class MSDeformAttn(nn.Module):
    """Deformable attention with its four projections.

    Args:
        dim: channels C of queries and values.
        num_levels: feature levels L.
        num_heads: heads H; must divide ``dim``.
        num_points: samples P per head and level.
    """

    def __init__(self, *, dim: int, num_levels: int, num_heads: int, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"The width {dim} is not divisible by {num_heads} heads.")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * samples)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads look in evenly spread directions, point p at distance p + 1; uniform attention weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        tokens: Tensor,
        spatial_shapes: SpatialShapes,
        valid: ValidCells | None = None,
    ) -> Tensor:
        """Attend from each query to its samples around its reference.

        Args:
            query: (B, Q, C) content plus position.
            reference: (B, Q, 2) points or (B, Q, 4) boxes cxcywh, normalized to the padded image, or, with ``valid``,
                to the image itself. Offsets are in pixels of each level for points, and in halves of the box size
                shared by the points for boxes.
            tokens: (B, S, C) the levels to sample from.
            spatial_shapes: (height, width) of each level.
            valid: the cells on the images, where padding is to be ignored; its values count as zero.

        Returns:
            (B, Q, C).
        """
        batch, queries, _ = query.shape
        value = self.value_proj(tokens)
        if valid is not None:
            value = value.masked_fill(valid.is_padding[..., None], 0)
        value = value.view(batch, -1, self.num_heads, value.shape[-1] // self.num_heads)
        shape = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        logits = self.attention_weights(query).view(shape)
        if valid is None:
            return self.output_proj(ms_deform_attn_fused(value, spatial_shapes, reference, offsets, logits))
        # The fused op takes one reference for all levels; padding covers another part of each.
        ratios = valid.ratios[:, None].repeat(1, 1, 1, reference.shape[-1] // 2)
        locations = sampling_locations(reference[:, :, None] * ratios, offsets.float(), spatial_shapes)
        weights = logits.float().flatten(-2).softmax(-1).view(shape)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))
