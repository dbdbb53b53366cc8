"""An attribute of each object (here: whether it is occluded) as a head, a loss, a result, and a score.

Annotations carry ``"occluded": 0 or 1``; an object without it is not supervised. Train with

    --import docs.examples.attribute_head  INPUT.ANNOTATION_FIELDS "['occluded']"  MODEL.EXTRA_HEADS "['Occlusion']"
    MODEL.EXTRA_LOSSES "['OcclusionLoss']"  TEST.EVALUATORS "['OcclusionAccuracy']"

Detections then have ``pred_Occlusion`` (N, 1) logits, and results.json has OcclusionAccuracy.
"""

import torch.nn.functional as F
from detectron2.structures import pairwise_iou
from torch import nn

from dimaskdino.config import register_keys
from dimaskdino.evaluation import EVALUATOR_REGISTRY, ImageEvaluator
from dimaskdino.modeling.registry import HEAD_REGISTRY, LOSS_REGISTRY

register_keys({"MODEL.OCCLUSION.WEIGHT": 1.0, "MODEL.OCCLUSION.WIDTH": 32, "MODEL.OCCLUSION.LEAST_IOU": 0.5})


@HEAD_REGISTRY.register()
class Occlusion(nn.Sequential):
    """Queries (B, Q, C) to logits (B, Q, 1)."""

    def __init__(self, cfg, dim):
        width = cfg.MODEL.OCCLUSION.WIDTH
        super().__init__(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, 1))


@LOSS_REGISTRY.register()
class OcclusionLoss:
    """Binary cross entropy of the matched queries."""

    names = ("loss_occlusion",)
    needs_masks = False

    def __init__(self, cfg):
        self.weight = cfg.MODEL.OCCLUSION.WEIGHT

    def __call__(self, stages):
        """One loss for each stage, divided by its objects."""
        logits = stages.extra("Occlusion")[:, 0]
        occluded = stages.field("occluded")
        known = occluded.isfinite()
        losses = F.binary_cross_entropy_with_logits(logits, occluded.nan_to_num(), reduction="none") * known
        return {"loss_occlusion": self.weight * stages.sum_pairs(losses) / stages.num_objects}


@EVALUATOR_REGISTRY.register()
class OcclusionAccuracy(ImageEvaluator):
    """Share of objects, in percent, whose best-overlapping detection says rightly whether they are occluded."""

    def measure(self, image, output, truth):
        """One number for an image with objects that are found and labeled."""
        found = output["instances"]
        if not len(found) or not len(truth):
            return {}
        overlap, best = pairwise_iou(truth.gt_boxes, found.pred_boxes).max(1)
        counted = (overlap >= self.cfg.MODEL.OCCLUSION.LEAST_IOU) & truth.gt_occluded.isfinite()
        right = (found.pred_Occlusion[best, 0] > 0) == (truth.gt_occluded > 0.5)
        return {"accuracy": 100 * float(right[counted].float().mean())} if counted.any() else {}
