"""Detections of one image, by several models or in several views of it, joined to one result."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from dimaskdino.structures import RleMasks
from dimaskdino.structures.rle_masks import Rle, crop_of, place_crop

_LEAST_SHARE = 1e-12  # a detection with a score of zero still has a box to average


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How detections are joined, class by class.

    Source: weighted box fusion (Solovyev et al., 2021); soft-NMS (Bodla et al., 2017), its linear form.
    Deviation: an object has at most one detection of each source, so that one source alone stays as it is; detections
    are compared with the best one of an object rather than with the average.
    """

    # ``wbf`` averages boxes and masks of the same object; ``nms`` keeps the best of those that overlap more than
    # ``iou``; ``soft-nms`` keeps all, and multiplies the scores of the others by one minus the overlap
    method: str = "wbf"
    iou: float = 0.55  # least IoU with the best detection of an object, of masks where there are any, else of boxes
    weights: Sequence[float] = ()  # of the sources; () for equal ones
    max_detections: int | None = None  # of an image; None keeps all

    def __call__(self, found: Sequence[Instances]) -> Instances:
        """Join what each source found in one image.

        Args:
            found: on the CPU, with one image size and the same fields; masks as RLE.

        Returns:
            Detections by descending score. With ``wbf``, the score is the mean of the sources', weighted, with 0 for a
            source that did not find the object; the box is the mean, and the mask has the pixels that at least half of
            the sources have, both weighted by score; other fields are those of the best detection.
        """
        joined = Instances.cat(list(found))
        weights = np.array(self.weights or [1.0] * len(found), dtype=np.float64)
        source = np.repeat(np.arange(len(found)), [len(each) for each in found])
        shares = joined.scores.double().numpy() * weights[source]
        if self.method == "wbf":
            return self._averaged(joined, source, shares, float(weights.sum()))
        scores = shares / weights.max()
        for members, shapes in by_class(joined):
            own = scores[members]
            scores[members] = suppressed(own, overlaps(shapes, shapes), self.iou, soft=self.method == "soft-nms")
        kept = np.flatnonzero(scores >= 0)
        result = joined[torch.from_numpy(kept[self._best(scores[kept])])]
        result.scores = torch.from_numpy(-np.sort(-scores[kept])[: self.max_detections]).float()
        return result

    def _averaged(self, joined: Instances, source: np.ndarray, shares: np.ndarray, total: float) -> Instances:
        groups = [
            group for members, shapes in by_class(joined) for group in self._groups(members, shapes, source, shares)
        ]
        scores = np.array([shares[group].sum() / total for group in groups])
        groups = [groups[place] for place in self._best(scores)]
        result = joined[torch.tensor([max(group, key=shares.__getitem__) for group in groups], dtype=torch.int64)]
        result.scores = torch.from_numpy(scores[self._best(scores)]).float()
        boxes = joined.pred_boxes.tensor.double().numpy()
        means = [np.average(boxes[group], axis=0, weights=shares[group].clip(_LEAST_SHARE)) for group in groups]
        result.pred_boxes = Boxes(torch.tensor(np.array(means).reshape(-1, 4), dtype=torch.float32))
        if joined.has("pred_masks"):
            rles, size = joined.pred_masks.rles, joined.image_size
            masks = [majority([rles[index] for index in group], shares[group]) for group in groups]
            result.pred_masks = RleMasks(masks, size)
        return result

    def _best(self, scores: np.ndarray) -> np.ndarray:
        """Places of the best scores, in their order."""
        return np.argsort(-scores, kind="stable")[: self.max_detections]

    def _groups(self, members: np.ndarray, shapes: Any, source: np.ndarray, shares: np.ndarray) -> list[list[int]]:
        """The detections of each object of a class, source after source."""
        groups: list[list[int]] = []  # of places in ``members``
        for number in np.unique(source[members]):
            new = np.flatnonzero(source[members] == number)
            leaders = [max(group, key=lambda place: shares[members[place]]) for group in groups]
            ious = overlaps(chosen(shapes, new), chosen(shapes, leaders))
            pairs = np.argwhere(ious >= self.iou)
            free, open_groups = set(range(len(new))), set(range(len(groups)))
            for row, column in pairs[np.argsort(-ious[tuple(pairs.T)], kind="stable")].tolist():
                if row in free and column in open_groups:
                    groups[column].append(int(new[row]))
                    free.remove(row)
                    open_groups.remove(column)
            groups += [[int(new[row])] for row in sorted(free)]
        return [members[group].tolist() for group in groups]


def by_class(found: Instances) -> Iterator[tuple[np.ndarray, Any]]:
    """The detections of each class, (n,) int64, and their shapes: a list of RLE, or boxes without masks."""
    classes = found.pred_classes.cpu().numpy()
    if found.has("pred_masks"):
        shapes: Any = RleMasks.of(found.pred_masks).rles
    else:
        boxes = found.pred_boxes.tensor.cpu().double()
        shapes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).numpy()
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        yield members, chosen(shapes, members)


def chosen(shapes: Any, places: Sequence[int] | np.ndarray) -> Any:
    """Some of the shapes that :func:`by_class` gives."""
    return [shapes[place] for place in places] if isinstance(shapes, list) else shapes[list(places)]


def overlaps(one: Any, other: Any) -> np.ndarray:
    """(n, m) IoU of shapes: boxes (., 4) xywh, or RLE masks."""
    if not len(one) or not len(other):
        return np.zeros((len(one), len(other)))
    return np.asarray(mask_util.iou(one, other, [0] * len(other)))


def suppressed(scores: np.ndarray, ious: np.ndarray, threshold: float, *, soft: bool = False) -> np.ndarray:
    """Non-maximum suppression of detections of one class: their scores (n,) afterwards, -1 for the suppressed ones.

    A detection is suppressed by a better one if their IoU, of ``ious`` (n, n), is above the threshold; if ``soft``, its
    score is multiplied by one minus the IoU instead.
    """
    scores, left = scores.copy(), np.ones(len(scores), dtype=bool)
    for _ in range(len(scores)):
        best = np.flatnonzero(left)[scores[left].argmax()]
        left[best] = False
        covered = left & (ious[best] > threshold)
        scores[covered] = scores[covered] * (1 - ious[best, covered]) if soft else -1.0
    return scores


def majority(rles: Sequence[Rle], shares: np.ndarray) -> Rle:
    """The pixels of masks (N) of one size that have at least half of the shares (N,)."""
    if len(rles) == 1:
        return rles[0]
    crops = [crop_of(rle) for rle in rles]
    top, left = min(top for _, top, _ in crops), min(left for _, _, left in crops)
    bottom = max(top + crop.shape[0] for crop, top, _ in crops)
    right = max(left + crop.shape[1] for crop, _, left in crops)
    votes = np.zeros((bottom - top, right - left))  # around the masks alone
    for (crop, y, x), share in zip(crops, shares, strict=True):
        votes[y - top : y - top + crop.shape[0], x - left : x - left + crop.shape[1]] += share * crop
    return place_crop(votes >= shares.sum() / 2, top, left, rles[0]["size"])
