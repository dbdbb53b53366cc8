"""Predictions to results: the best detections, their masks at the asked size, scores, boxes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from dimaskdino.layers.boxes import cxcywh_to_xyxy
from dimaskdino.structures import MaskLogits, StagePrediction

_MASKS_PER_CHUNK = 25


def instances_of_image(
    prediction: StagePrediction,
    image: int,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    max_detections: int,
    score_by_mask: bool,
) -> Instances:
    """Results of one image.

    Args:
        prediction: of a stage.
        image: index in the batch.
        padded_size: (height, width) of the padded batch, px.
        image_size: (height, width) of the image before padding, px.
        output_size: (height, width) of the result, px.
        max_detections: at most this many (query, class) pairs; all where there are fewer.
        score_by_mask: multiply class scores by the mean mask probability inside the mask, where there are masks.

    Returns:
        pred_boxes (xyxy px), scores in [0, 1], pred_classes, and, where the stage has masks, pred_masks (N, H, W) bool,
        by descending score.
    """
    scores = prediction.logits[image].float().sigmoid().flatten()
    scores, index = scores.topk(min(max_detections, scores.numel()), sorted=False)
    num_classes = prediction.logits.shape[-1]
    query, classes = index.div(num_classes, rounding_mode="floor"), index % num_classes
    boxes = _scale_boxes(prediction.boxes[image, query].float(), padded_size, image_size, output_size)
    result = Instances(output_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    if prediction.masks is not None:
        # A query that is among the best with several classes has one mask.
        unique, mask_of = torch.unique(query, return_inverse=True)
        masks, quality = _masks_at_output_size(prediction.masks, image, unique, padded_size, image_size, output_size)
        result.scores = scores * quality[mask_of] if score_by_mask else scores
    order = result.scores.argsort(descending=True)
    result = result[order]
    if prediction.masks is not None:
        result.pred_masks = masks[mask_of[order]]
    return result


def _scale_boxes(
    boxes: Tensor, padded_size: Sequence[int], image_size: Sequence[int], output_size: Sequence[int]
) -> Tensor:
    """Boxes cxcywh, normalised to the padded canvas, as xyxy px of the result."""
    scale_y, scale_x = (
        padded / image * output for padded, image, output in zip(padded_size, image_size, output_size, strict=True)
    )
    left, upper, right, lower = cxcywh_to_xyxy(boxes).unbind(-1)
    return torch.stack((left * scale_x, upper * scale_y, right * scale_x, lower * scale_y), dim=-1)


def _masks_at_output_size(
    predicted: MaskLogits,
    image: int,
    queries: Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Masks (N, H, W) bool of ``queries`` (N,) and the mean probability inside each (N,).

    Few masks are floating at a time, whatever the size of the result.
    """
    masks, qualities = [], []
    for chunk in queries.split(_MASKS_PER_CHUNK):
        logits = predicted.select(image, chunk).float()[:, None]
        logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
        logits = logits[..., : image_size[0], : image_size[1]]
        if image_size != output_size:
            logits = F.interpolate(logits, size=output_size, mode="bilinear", align_corners=False)
        mask = logits[:, 0] > 0
        area = mask.sum((1, 2))
        qualities.append((logits[:, 0].sigmoid() * mask).sum((1, 2)) / (area + 1e-6))
        masks.append(mask)
    return torch.cat(masks), torch.cat(qualities)
