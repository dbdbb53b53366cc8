"""Sine embeddings of pixel positions and of boxes."""

import math

import torch
from torch import Tensor

_TEMPERATURE = 10000.0


def _frequencies(num_channels: int, device: torch.device) -> Tensor:
    """(num_channels,) float32 wavelengths, each held by a sine and a cosine channel."""
    channel = torch.arange(num_channels, dtype=torch.float32, device=device)
    return _TEMPERATURE ** (2 * torch.div(channel, 2, rounding_mode="floor") / num_channels)


def _interleave_sin_cos(angles: Tensor) -> Tensor:
    """Sine of the even and cosine of the odd channels; (..., C) to (..., C)."""
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


def pixel_sine_embedding(height: int, width: int, dim: int, device: torch.device, eps: float = 1e-6) -> Tensor:
    """Sine embedding of the pixels of a feature map, positions normalised to (0, 2 pi].

    Args:
        height: rows of the map.
        width: columns of the map.
        dim: channels, an even number; the first half encodes y, the second half x.
        device: where the result lives.
        eps: added to the largest position before the division.

    Returns:
        (height * width, dim) float32, row by row.

    Source: DETR (Carion et al., 2020), section 3.2.
    """
    scale = 2 * math.pi
    y = torch.arange(1, height + 1, dtype=torch.float32, device=device) / (height + eps) * scale
    x = torch.arange(1, width + 1, dtype=torch.float32, device=device) / (width + eps) * scale
    frequencies = _frequencies(dim // 2, device)
    embed_y = _interleave_sin_cos(y[:, None] / frequencies)
    embed_x = _interleave_sin_cos(x[:, None] / frequencies)
    grid_y = embed_y[:, None].expand(height, width, -1)
    grid_x = embed_x[None].expand(height, width, -1)
    return torch.cat((grid_y, grid_x), dim=-1).flatten(0, 1)


def box_sine_embedding(boxes: Tensor, dim: int) -> Tensor:
    """Sine embedding of boxes.

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        dim: width of the model; each coordinate takes dim / 2 channels.

    Returns:
        (..., 2 * dim) float32 in the order y, x, w, h.

    Source: DAB-DETR (Liu et al., 2022), section 4.1.
    """
    center_x, center_y, width, height = boxes.float().unbind(-1)
    frequencies = _frequencies(dim // 2, boxes.device)
    angles = torch.stack((center_y, center_x, width, height), dim=-1)[..., None] * (2 * math.pi) / frequencies
    return _interleave_sin_cos(angles).flatten(-2)


def pixel_centers(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) float32 centres of the pixels as (x, y) in (0, 1), row by row."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(0, 1)
