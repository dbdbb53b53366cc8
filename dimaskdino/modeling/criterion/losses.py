"""Losses as functions of matched tensors, one value per query or pair."""

from collections.abc import Sequence

import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor

from dimaskdino.layers.boxes import cxcywh_to_xyxy, generalized_iou
from dimaskdino.layers.points import mask_sums


def focal_loss(logits: Tensor, labels: Tensor, *, alpha: float, gamma: float, weights: Tensor | None = None) -> Tensor:
    """Focal loss, summed over classes.

    Args:
        logits: (..., K).
        labels: (...) int64; K stands for no object.
        alpha: weight of the target class; other classes weigh 1 - alpha.
        gamma: exponent that plays down easy classes.
        weights: (..., K), or (K,), of the classes; None for 1.

    Returns:
        (...).

    Source: RetinaNet (Lin et al., 2017).
    """
    one_hot = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    losses = sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma, reduction="none")
    return (losses if weights is None else losses * weights).sum(-1)


def box_losses(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and generalized-IoU loss of (N, 4) cxcywh pairs, each (N,)."""
    overlap = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return (boxes - target_boxes).abs().sum(-1), 1 - overlap


def mask_losses(logits: Tensor, labels: Tensor, judged: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Binary cross entropy (mean over points) and dice loss, each (N,).

    Args:
        logits: (N, P) at the sampled points.
        labels: (N, P) in [0, 1].
        judged: (N, P) float32, 0 at points that count in neither loss, else 1; None for 1.
    """
    return mask_losses_of_sums(mask_sums(logits, labels, judged), logits.shape[1])


def mask_losses_of_sums(sums: Sequence[Tensor], num_points: int) -> tuple[Tensor, Tensor]:
    """:func:`mask_losses` of the sums of :func:`dimaskdino.layers.points.sums_at_points`."""
    cross_entropy, both, probability, label = sums
    return cross_entropy / num_points, 1 - (2 * both + 1) / (probability + label + 1)
