"""What is kept of a model's detections, and how their masks are cleaned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from dimaskdino.errors import ConfigError, check_range
from dimaskdino.prediction.fusion import by_class, overlaps, suppressed
from dimaskdino.structures import RleMasks

SegmentMap = tuple[Tensor, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Thresholds and clean-up, applied in this order; the defaults keep all that scores at least 0.35.

    Attributes:
        score: least score of a detection, in [0, 1].
        class_scores: least score of some classes by name, in place of ``score``.
        classes: names of the classes to keep, or one name; None keeps all. Panoptic maps, too, follow these and
            ``class_scores``.
        keep_largest: keep the largest connected part of each mask.
        min_area: remove connected parts of fewer pixels; holes are never filled.
        boxes_from_masks: replace each box by the smallest one around its mask.
        mask_nms: remove a detection whose mask (or box, without masks) has a larger IoU with a better one of its class.
        max_detections: keep this many of the best; None keeps all that the model reports.
    """

    score: float = 0.35
    class_scores: Mapping[str, float] = field(default_factory=dict)
    classes: str | Sequence[str] | None = None
    keep_largest: bool = False
    min_area: int = 0
    boxes_from_masks: bool = False
    mask_nms: float | None = None
    max_detections: int | None = None

    def __post_init__(self) -> None:
        """Check the range of all numbers; raises ConfigError."""
        if isinstance(self.classes, str):
            object.__setattr__(self, "classes", [self.classes])
        scores = {"score": self.score, "mask_nms": self.mask_nms} | {
            f"class_scores[{name!r}]": score for name, score in self.class_scores.items()
        }
        for name, value in scores.items():
            if value is not None:
                check_range(name, value, 0, 1)
        check_range("min_area", self.min_area, 0)
        if self.max_detections is not None:
            check_range("max_detections", self.max_detections, 1)

    def check(self, class_names: Sequence[str]) -> None:
        """Raise ConfigError for a class that is not one of the model's; it names those that are."""
        unknown = sorted({*self.class_scores, *(self.classes or ())} - set(class_names))
        if unknown:
            raise ConfigError(f"The model has no class {', '.join(unknown)}; it has {', '.join(class_names)}.")

    @property
    def least_score(self) -> float:
        """No detection below this score is kept."""
        return min(self.score, *self.class_scores.values(), 1.0)

    def __call__(self, found: Instances, class_names: Sequence[str]) -> Instances:
        """Refine the detections of one image, which are in descending order of their scores."""
        found = found[found.scores >= found.scores.new_tensor(self._least(class_names, self.score))[found.pred_classes]]
        if found.has("pred_masks"):
            found = self._cleaned(found)
        if self.mask_nms is not None:
            found = found[_suppress(found, self.mask_nms)]
        return found if self.max_detections is None else found[: self.max_detections]

    def of_segments(self, found: SegmentMap, class_names: Sequence[str]) -> SegmentMap:
        """A panoptic map (H, W), 0 for no segment, with the segments that ``classes`` and ``class_scores`` keep."""
        ids, segments = found
        least = self._least(class_names, 0.0)
        kept = [each for each in segments if each.get("score", 1.0) >= least[each["category_id"]]]
        return ids * torch.isin(ids, ids.new_tensor([each["id"] for each in kept])), kept

    def _least(self, class_names: Sequence[str], score: float) -> list[float]:
        """The least score by class index; infinite for a class that is not kept."""
        never = float("inf")
        kept = class_names if self.classes is None else self.classes
        return [self.class_scores.get(name, score) if name in kept else never for name in class_names]

    def _cleaned(self, found: Instances) -> Instances:
        if self.keep_largest or self.min_area > 1:
            masks = RleMasks.of(found.pred_masks)
            cleaned = masks.placed(self._clean, masks.size)
            as_given = isinstance(found.pred_masks, RleMasks)
            found.pred_masks = cleaned if as_given else cleaned.tensor.to(found.scores.device)
            found = found[(cleaned.area() > 0).to(found.scores.device)]
        if self.boxes_from_masks:
            boxes = RleMasks.of(found.pred_masks).get_bounding_boxes()
            found.pred_boxes = Boxes(boxes.tensor.to(found.scores.device))
        return found

    def _clean(self, crop: np.ndarray, top: int, left: int) -> tuple[np.ndarray, int, int]:
        return clean_mask(crop, self.keep_largest, self.min_area), top, left


def clean_mask(mask: np.ndarray, keep_largest: bool, min_area: int) -> np.ndarray:
    """The parts (connected also by corners) of a mask (H, W) bool that are large enough; empty if none is."""
    if not mask.any():
        return mask
    count, parts, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = statistics[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0  # the background
    keep = areas >= max(min_area, 1)
    if keep_largest and count > 1:
        keep &= np.arange(count) == areas.argmax()
    return keep[parts]


def _suppress(found: Instances, threshold: float) -> Tensor:
    """(N,) bool: the detections that no better one of their class covers."""
    scores = found.scores.cpu().double().numpy()
    for members, shapes in by_class(found):
        scores[members] = suppressed(scores[members], overlaps(shapes, shapes), threshold)
    return torch.from_numpy(scores >= 0).to(found.scores.device)
