"""Losses of matched pairs, each summed over everything that it is given."""

import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor

from dimaskdino.layers.boxes import cxcywh_to_xyxy, generalized_iou

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss summed over queries and classes.

    Args:
        logits: (B, Q, K).
        labels: (B, Q) int64; K stands for no object.

    Source: RetinaNet (Lin et al., 2017), alpha 0.25, gamma 2.
    """
    one_hot = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    return sigmoid_focal_loss(logits, one_hot, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA, reduction="sum")


def box_losses(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and generalised-IoU loss of (N, 4) cxcywh pairs, each summed."""
    overlap = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return (boxes - target_boxes).abs().sum(), (1 - overlap).sum()


def mask_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross entropy (mean over points) and dice loss, each summed over masks.

    Args:
        logits: (N, P) at the sampled points.
        labels: (N, P) in [0, 1].
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * labels).sum(-1) + 1) / (probability.sum(-1) + labels.sum(-1) + 1)
    return cross_entropy, dice.sum()
