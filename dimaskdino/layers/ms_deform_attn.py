"""Multi-scale deformable attention (Deformable DETR, Zhu et al., 2021, Eq. 3)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SpatialShapes = Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples from every level.

    Args:
        value: (B, S, H, D) levels flattened and joined, S = sum of height * width.
        spatial_shapes: (height, width) of each level, in the order of ``value``.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y), 0 and 1 the outer edges of the level; zero outside.
        attention_weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D) in the dtype of ``value``.

    Raises:
        ValueError: where the shapes do not belong together.
    """
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    grids = 2 * sampling_locations - 1
    sampled = []
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, (level_value, (height, width)) in enumerate(zip(levels, spatial_shapes, strict=True)):
        image = level_value.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1).to(image.dtype)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.permute(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, len(spatial_shapes) * points)
    output = (torch.cat(sampled, dim=-1) * weights.to(value.dtype)).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def _check_shapes(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> None:
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5:
        raise ValueError(
            "ms_deform_attn takes value (B, S, H, D), sampling_locations (B, Q, H, L, P, 2) and attention_weights "
            f"(B, Q, H, L, P); got {tuple(value.shape)}, {tuple(locations.shape)}, {tuple(weights.shape)}."
        )
    batch, tokens, heads, _ = value.shape
    expected = (batch, locations.shape[1], heads, len(spatial_shapes), locations.shape[4])
    if tuple(weights.shape) != expected or tuple(locations.shape) != (*expected, 2):
        raise ValueError(
            f"With value {tuple(value.shape)} and {len(spatial_shapes)} levels, attention_weights must be {expected} "
            f"and sampling_locations the same with a last dimension of 2; got {tuple(weights.shape)} and "
            f"{tuple(locations.shape)}."
        )
    area = sum(height * width for height, width in spatial_shapes)
    if area != tokens:
        raise ValueError(f"The levels {list(spatial_shapes)} hold {area} tokens, but value has {tokens}.")


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

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
        """Attend from each query to its samples around its reference.

        Args:
            query: (B, Q, C) content plus position.
            reference: (B, Q, 2) points or (B, Q, 4) boxes cxcywh, normalised to the padded image. Offsets are in
                pixels of each level for points, and in halves of the box size shared by the points for boxes.
            tokens: (B, S, C) the levels to sample from.
            spatial_shapes: (height, width) of each level.

        Returns:
            (B, Q, C).
        """
        batch, queries, _ = query.shape
        value = self.value_proj(tokens).unflatten(-1, (self.num_heads, -1))
        shape = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        locations = self._locations(reference, offsets, spatial_shapes)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))

    def _locations(self, reference: Tensor, offsets: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
        center = reference[:, :, None, None, None, :2]
        if reference.shape[-1] == 4:
            size = reference[:, :, None, None, None, 2:]
            return center + offsets / self.num_points * size * 0.5
        level_size = offsets.new_tensor([(width, height) for height, width in spatial_shapes])
        return center + offsets / level_size[:, None]
