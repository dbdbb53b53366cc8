"""Bilinear sampling of maps at points."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps at points, bilinear between pixel centers, zero outside.

    Args:
        maps: (N, C, H, W) floating.
        points: (N, P, 2) as (x, y); 0 and 1 are the outer edges of the map.

    Returns:
        (N, C, P) in the dtype of ``maps``.

    Source: PointRend (Kirillov et al., 2020), section 3.
    """
    grid = (2 * points - 1)[:, :, None].to(maps.dtype)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def sample_binary_masks(masks: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """:func:`sample_points` for rows of a stack of bool masks, without copying the masks or making them floating.

    A mask may be sampled many times (denoising repeats every object), and at full resolution a floating copy of each
    would be the largest tensor of the training step.

    Args:
        masks: (n, H, W) bool.
        index: (N,) int64, which mask each row samples.
        points: (N, P, 2) as (x, y); 0 and 1 are the outer edges.

    Returns:
        (N, P) float32 in [0, 1].
    """
    _, height, width = masks.shape
    # The sizes stay numbers: a tensor of them would have to be copied to the device, and waited for.
    pixels = torch.stack((points[..., 0].float() * width, points[..., 1].float() * height), dim=-1) - 0.5
    corner = pixels.floor()
    fraction = pixels - corner
    flat = masks.reshape(-1)
    start = index[:, None] * (height * width)
    value = torch.zeros_like(pixels[..., 0])
    for offset_x in (0, 1):
        for offset_y in (0, 1):
            x, y = corner[..., 0] + offset_x, corner[..., 1] + offset_y
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            # Whole numbers first: float32 cannot count the pixels of a mask of more than 2^24.
            place = start + y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()
            share_x = fraction[..., 0] if offset_x else 1 - fraction[..., 0]
            share_y = fraction[..., 1] if offset_y else 1 - fraction[..., 1]
            value = value + share_x * share_y * (flat[place] & inside)
    return value
