"""Predictions to results: the best detections, their masks at the asked size, scores, boxes."""

import math

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from dimaskdino.layers.boxes import cxcywh_to_xyxy
from dimaskdino.modeling.postprocessing.masks import DIRECT, Frame, MaskRendering
from dimaskdino.structures import FeatureTokens, StagePrediction


def instances_of_image(
    prediction: StagePrediction,
    image: int,
    frame: Frame,
    *,
    max_detections: int,
    score_by_mask: bool,
    min_score: float = 0.0,
    rendering: MaskRendering = DIRECT,
    with_queries: bool = False,
    is_thing: Tensor | None = None,
) -> Instances:
    """Results of one image.

    Args:
        prediction: of a stage.
        image: index in the batch.
        frame: the sizes of the image.
        max_detections: at most this many (query, class) pairs; all where there are fewer.
        score_by_mask: multiply class scores by the mean mask probability inside the mask, where there are masks.
        min_score: leave out detections with a lower class score, which mask quality can only lower.
        rendering: how masks are made.
        with_queries: add the query behind each result: query_indices, query_features (N, C), which the class head
            reads, and class_scores (N,), which it gives.
        is_thing: (K,) bool; of the best pairs those of other classes are left out, as in the releases. None keeps all.

    Returns:
        pred_boxes (xyxy px), scores in [0, 1], pred_classes, and, where the stage has masks, pred_masks (N, H, W) bool
        or as RLE, by descending score; and ``pred_<name>`` (N, ...) float32 of each head of MODEL.EXTRA_HEADS.
    """
    scores = prediction.logits[image].float().sigmoid().flatten()
    scores, index = scores.topk(min(max_detections, scores.numel()), sorted=False)
    if min_score > 0:
        kept = scores >= min_score
        scores, index = scores[kept], index[kept]
    num_classes = prediction.logits.shape[-1]
    if is_thing is not None:
        kept = is_thing[index % num_classes]
        scores, index = scores[kept], index[kept]
    query, classes = index.div(num_classes, rounding_mode="floor"), index % num_classes
    boxes = scale_boxes(prediction.boxes[image, query].float(), frame)
    result = Instances(frame.output, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    for name, values in prediction.extra.items():
        result.set(f"pred_{name}", values[image, query].float())
    if with_queries and prediction.queries is not None:
        result.query_indices, result.query_features = query, prediction.queries[image, query].float()
        result.class_scores = scores
    if prediction.masks is not None:
        # A query that is among the best with several classes has one mask.
        unique, mask_of = torch.unique(query, return_inverse=True)
        masks, quality = rendering(prediction.masks, image, unique, frame)
        result.scores = scores * quality[mask_of] if score_by_mask else scores
    order = result.scores.argsort(descending=True)
    result = result[order]
    if prediction.masks is not None:
        result.pred_masks = masks[mask_of[order]]
    return result


def mean_feature(t_i: FeatureTokens, image: int, padded_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Mean (C,) float32 of an image's tokens over all levels, without those of the padding."""
    height, width = (inner / padded for inner, padded in zip(image_size, padded_size, strict=True))
    levels = t_i.tokens[image].split([h * w for h, w in t_i.spatial_shapes])
    inside = [
        level.view(h, w, -1)[: math.ceil(h * height), : math.ceil(w * width)].flatten(0, 1)
        for level, (h, w) in zip(levels, t_i.spatial_shapes, strict=True)
    ]
    return torch.cat(inside).float().mean(0)


def scale_boxes(boxes: Tensor, frame: Frame) -> Tensor:
    """Boxes cxcywh, normalized to the padded canvas, as xyxy px of the result."""
    scale_y, scale_x = (
        padded / image * output for padded, image, output in zip(frame.padded, frame.image, frame.output, strict=True)
    )
    left, upper, right, lower = cxcywh_to_xyxy(boxes).unbind(-1)
    return torch.stack((left * scale_x, upper * scale_y, right * scale_x, lower * scale_y), dim=-1)
