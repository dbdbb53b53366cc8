"""Bilinear sampling of maps at points."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dimaskdino.layers.ms_deform_attn_ops import use_loops


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
    if use_loops(points):
        return torch.ops.dimaskdino.sample_masks(masks, index, points)
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


@torch.no_grad()
def uncertain_points(logits: Tensor, candidates: int, uncertain: int, total: int) -> Tensor:
    """Random points of maps: of uniform candidates those whose value is nearest to zero, and uniform ones besides.

    Args:
        logits: (N, H, W) floating.
        candidates: drawn for each map.
        uncertain: points of each map that are the most uncertain candidates.
        total: points of each map.

    Returns:
        (N, total, 2) as (x, y) in [0, 1), the uncertain ones first, in no order. Where the compiled op runs (on the
        CPU), other points than without it come from the same seed, of the same distribution.
    """
    if use_loops(logits):
        # One number of torch's generator, so that a seed decides the points; each map has a stream of its own.
        seed = int(torch.randint(2**62, ()))
        return torch.ops.dimaskdino.uncertain_points(logits, seed, candidates, uncertain, total)
    count, device = len(logits), logits.device
    drawn = torch.rand(count, candidates, 2, device=device)
    certainty = sample_points(logits[:, None], drawn)[:, 0].abs()
    chosen = certainty.topk(uncertain, dim=1, largest=False, sorted=False).indices
    others = torch.rand(count, total - uncertain, 2, device=device)
    return torch.cat((drawn.gather(1, chosen[..., None].expand(-1, -1, 2)), others), dim=1)


@torch.no_grad()
def sigmoid_and_sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid of logits, which may be computed in their place, and sums over points.

    Args:
        logits: (N, P) floating, not used afterwards.

    Returns:
        The sigmoid (N, P), and (N, 1) the sums of the softplus and of the sigmoid.
    """
    if use_loops(logits) and logits.is_contiguous():
        softplus, total = torch.ops.dimaskdino.sigmoid_and_sums(logits).split(1, dim=1)
        return logits, softplus, total
    probability = logits.sigmoid()
    return probability, F.softplus(logits).sum(-1, keepdim=True), probability.sum(-1, keepdim=True)
