"""Bilinear sampling of maps at points."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def sums_at_points(logits: Tensor, points: Tensor, masks: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Sums over points that losses of masks are made of, given logits x and labels t there.

    The compiled op keeps nothing of the points for the gradient but the points.

    Args:
        logits: (N, h, w) floating.
        points: (N, P, 2) as (x, y); 0 and 1 are the outer edges of the maps.
        masks: (n, H, W) bool.
        index: (N,) int64, which mask has the labels of each row.

    Returns:
        (N,) each: sums of the cross entropy softplus(x) - x t, of sigmoid(x) t, of sigmoid(x), and of t.
    """
    if use_loops(logits) and use_loops(points):
        return _SumsAtPoints.apply(logits, points, masks, index).unbind(1)
    return mask_sums(sample_points(logits[:, None], points)[:, 0], sample_binary_masks(masks, index, points))


def mask_sums(logits: Tensor, labels: Tensor, judged: Tensor | None = None) -> tuple[Tensor, ...]:
    """The sums of :func:`sums_at_points`: logits, labels (N, P); ``judged`` (N, P) is 0 at points that do not count."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, weight=judged, reduction="none")
    probability = logits.sigmoid()
    if judged is not None:
        probability, labels = probability * judged, labels * judged
    return cross_entropy.sum(-1), (probability * labels).sum(-1), probability.sum(-1), labels.sum(-1)


class _SumsAtPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.ops.dimaskdino.sums_at_points(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.dimaskdino.sums_at_points_backward(grad, *ctx.saved_tensors), None, None, None
