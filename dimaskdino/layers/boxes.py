"""Box geometry on tensors: conversions, overlaps, boxes of masks."""

import torch
from torch import Tensor

BOX_EPS = 1e-5
_AREA_EPS = 1e-6


def inverse_sigmoid(x: Tensor, eps: float = BOX_EPS) -> Tensor:
    """Logit of values in [0, 1]; both x and 1 - x are kept at least ``eps``, so the result is finite."""
    x = x.clamp(min=0, max=1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def move_boxes(boxes: Tensor, delta: Tensor, eps: float = BOX_EPS) -> Tensor:
    """Move boxes by offsets in logits.

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        delta: (..., 4) any floating dtype.
        eps: see :func:`inverse_sigmoid`.

    Returns:
        (..., 4) float32 cxcywh in [0, 1].
    """
    return (delta.float() + inverse_sigmoid(boxes, eps)).sigmoid()


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) center and size to corners."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - size / 2, center + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners to center and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def normalize_boxes(boxes: Tensor, width: int, height: int) -> Tensor:
    """(..., 4) boxes in px, xyxy or cxcywh, in parts of an image of ``width`` and ``height`` px.

    The sizes stay numbers: a tensor of them would have to be copied to the device, and waited for.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1 / width, y1 / height, x2 / width, y2 / height), dim=-1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def generalized_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of boxes that broadcast against each other.

    Args:
        boxes1: (..., 4) xyxy with x1 >= x0 and y1 >= y0.
        boxes2: (..., 4) xyxy, broadcastable with ``boxes1``.

    Returns:
        (...) in [-1, 1]; a pair of empty boxes at one point gives 0, never NaN.

    Source: Rezatofighi et al., 2019.
    Deviation: areas in denominators are enlarged by 1e-6, as in the releases; on boxes normalized to the image that
    lowers the overlap of objects of about one pixel.
    """
    inner = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])
    outer = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2])
    intersection = inner.clamp(min=0).prod(-1)
    union = _area(boxes1) + _area(boxes2) - intersection
    hull = outer.clamp(min=0).prod(-1)
    return intersection / (union + _AREA_EPS) - (hull - union) / (hull + _AREA_EPS)


def masks_to_boxes(masks: Tensor, *, inclusive: bool) -> Tensor:
    """Tight boxes of binary masks.

    Args:
        masks: (..., H, W) bool.
        inclusive: True takes the last pixel itself as the far edge and gives an empty mask the far corner with size 0
            (``mask2box`` of the releases); False takes the edge behind the last pixel and gives an empty mask zeros
            (``bitmask``).

    Returns:
        (..., 4) float32 xyxy in mask pixels.
    """
    height, width = masks.shape[-2:]
    columns, rows = masks.any(-2), masks.any(-1)
    x_low, x_high = _first_and_last(columns, width)
    y_low, y_high = _first_and_last(rows, height)
    if inclusive:
        sides, of_empty = (x_low, y_low, x_high, y_high), (width, height, width, height)
    else:
        sides, of_empty = (x_low, y_low, x_high + 1, y_high + 1), (0, 0, 0, 0)
    filled = columns.any(-1)
    boxes = [torch.where(filled, side, other) for side, other in zip(sides, of_empty, strict=True)]
    return torch.stack(boxes, dim=-1).float()


def _first_and_last(occupied: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Index of the first and of the last True along the last dimension; meaningless where there is none."""
    forward = occupied.to(torch.uint8).argmax(-1)
    backward = occupied.flip(-1).to(torch.uint8).argmax(-1)
    return forward, length - 1 - backward
