"""Predictions to results: the best detections, their masks at the asked size, scores, boxes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from dimaskdino.layers.boxes import cxcywh_to_xyxy
from dimaskdino.modeling.postprocessing.masks import TWO_STEP, Frame, MaskRendering
from dimaskdino.structures import FeatureTokens, StagePrediction


@dataclass(frozen=True, kw_only=True)
class InstanceOptions:
    """What decides the results of an image, beside their number and what they are scored by.

    Attributes:
        min_score: detections with a lower class score, which mask quality can only lower, are left out.
        rendering: how masks are made.
        with_queries: add the query behind each result: query_indices, query_features (N, C), which the class head
            reads, and class_scores (N,), which it gives.
    """

    min_score: float = 0.0
    rendering: MaskRendering = TWO_STEP
    with_queries: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "InstanceOptions":
        """Read MODEL.MaskDINO.TEST.{MIN_SCORE, QUERY_FEATURES, MASK_*}."""
        node = cfg.MODEL.MaskDINO.TEST
        rendering = MaskRendering.from_config(cfg)
        return cls(min_score=node.MIN_SCORE, rendering=rendering, with_queries=node.QUERY_FEATURES)


DEFAULT_OPTIONS = InstanceOptions()


def instances_of_image(
    prediction: StagePrediction,
    image: int,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    max_detections: int,
    score_by_mask: bool,
    options: InstanceOptions = DEFAULT_OPTIONS,
    is_thing: Tensor | None = None,
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
        options: what else decides the results.
        is_thing: (K,) bool; of the best pairs those of other classes are left out, as in the releases. None keeps all.

    Returns:
        pred_boxes (xyxy px), scores in [0, 1], pred_classes, and, where the stage has masks, pred_masks (N, H, W) bool
        or as RLE, by descending score.
    """
    scores = prediction.logits[image].float().sigmoid().flatten()
    scores, index = scores.topk(min(max_detections, scores.numel()), sorted=False)
    if options.min_score > 0:
        kept = scores >= options.min_score
        scores, index = scores[kept], index[kept]
    num_classes = prediction.logits.shape[-1]
    if is_thing is not None:
        kept = is_thing[index % num_classes]
        scores, index = scores[kept], index[kept]
    query, classes = index.div(num_classes, rounding_mode="floor"), index % num_classes
    boxes = _scale_boxes(prediction.boxes[image, query].float(), padded_size, image_size, output_size)
    result = Instances(output_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    if options.with_queries and prediction.queries is not None:
        result.query_indices, result.query_features = query, prediction.queries[image, query].float()
        result.class_scores = scores
    if prediction.masks is not None:
        # A query that is among the best with several classes has one mask.
        unique, mask_of = torch.unique(query, return_inverse=True)
        frame = Frame(padded_size, image_size, output_size)
        masks, quality = options.rendering(prediction.masks, image, unique, frame)
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


def _scale_boxes(
    boxes: Tensor, padded_size: Sequence[int], image_size: Sequence[int], output_size: Sequence[int]
) -> Tensor:
    """Boxes cxcywh, normalised to the padded canvas, as xyxy px of the result."""
    scale_y, scale_x = (
        padded / image * output for padded, image, output in zip(padded_size, image_size, output_size, strict=True)
    )
    left, upper, right, lower = cxcywh_to_xyxy(boxes).unbind(-1)
    return torch.stack((left * scale_x, upper * scale_y, right * scale_x, lower * scale_y), dim=-1)
