"""Sine embeddings of pixel positions and of boxes."""

import math

import torch
from torch import Tensor

_TEMPERATURE = 10000.0


def _frequencies(num_channels: int, device: torch.device, temperature: float = _TEMPERATURE) -> Tensor:
    """(num_channels,) float32 wavelengths, each held by a sine and a cosine channel."""
    channel = torch.arange(num_channels, dtype=torch.float32, device=device)
    return temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / num_channels)


def _interleave_sin_cos(angles: Tensor) -> Tensor:
    """Sine of the even and cosine of the odd channels; (..., C) to (..., C)."""
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


def pixel_sine_embedding(
    height: int,
    width: int,
    dim: int,
    device: torch.device,
    eps: float = 1e-6,
    *,
    temperature: float = _TEMPERATURE,
    offset: float = 0.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Sine embedding of the pixels of a feature map, positions normalized to (0, 2 pi].

    Args:
        height: rows of the map.
        width: columns of the map.
        dim: channels, an even number; the first half encodes y, the second half x.
        device: where the result lives.
        eps: added to the largest position before the division.
        temperature: ratio of the longest wavelength to the shortest.
        offset: added to positions, which count from 1; -0.5 gives the centers of pixels.
        counts: (B, 2) columns and rows that lie on each image rather than on padding; positions end there at 2 pi.

    Returns:
        (height * width, dim) float32, row by row; (B, height * width, dim) with ``counts``.

    Source: DETR (Carion et al., 2020), section 3.2.
    """
    frequencies = _frequencies(dim // 2, device, temperature)

    def embed(length: int, last: Tensor | int) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device) + offset
        angles = position / (last + eps) * (2 * math.pi)
        return _interleave_sin_cos(angles[..., None] / frequencies)

    last_x, last_y = (width, height) if counts is None else counts[..., None].unbind(-2)
    grid_y = embed(height, last_y).unsqueeze(-2).expand(*([-1] * (counts is not None)), height, width, -1)
    grid_x = embed(width, last_x).unsqueeze(-3).expand_as(grid_y)
    return torch.cat((grid_y, grid_x), dim=-1).flatten(-3, -2)


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
    """(height * width, 2) float32 centers of the pixels as (x, y) in (0, 1), row by row."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(0, 1)
