"""The contact sheet of a report: some objects of each outcome, beside the query that was nearest."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.analysis.explanation import Explained
from dimaskdino.analysis.missed import Outcome
from dimaskdino.analysis.stages import SeenStage, TrueObjects
from dimaskdino.structures.rle_masks import Rle
from dimaskdino.visualization import Objects, draw_objects

_SIDE_PX = 220  # of a picture
_AROUND = 2.2  # side of what is shown, in sides of the object


@dataclass(kw_only=True)
class Examples:
    """Collects pictures of objects that were not found."""

    names: Sequence[str]  # class names
    limit: int = 4  # objects of an outcome
    # pairs (truth, nearest query) of (H, W, 3) uint8 RGB, by outcome
    pictures: dict[Outcome, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def add(self, image: np.ndarray, truth: TrueObjects, last: SeenStage, explained: Sequence[Explained]) -> None:
        """Draw the objects of an image (H, W, 3) uint8 RGB whose outcomes have room."""
        for each in explained:
            taken = self.pictures.setdefault(each.outcome, [])
            if each.outcome is not Outcome.FOUND and len(taken) < self.limit:
                taken.append(self._draw(image, truth, last, each))

    def _draw(
        self, image: np.ndarray, truth: TrueObjects, last: SeenStage, each: Explained
    ) -> tuple[np.ndarray, np.ndarray]:
        x, y, width, height = truth.boxes[each.index]
        region = _region((x, y, x + width, y + height), image.shape[:2])
        rle = None if truth.rles is None else truth.rles[each.index]
        box = np.array((x, y, x + width, y + height))
        left = _cut(image, region, each.label, self.names[each.label], None, box, rle)
        if each.query is None:
            return left, _cut(image, region, 0, "", None, None, None)
        scores = last.view.scores[each.query] * last.view.quality[each.query]
        label = int(scores.argmax())
        own = (label, self.names[label], float(scores[label]))
        return left, _cut(image, region, *own, last.boxes[each.query], last.rles.get(each.query))

    def rows(self) -> list[tuple[Outcome, list[tuple[np.ndarray, np.ndarray]]]]:
        """The pictures of each outcome that has any, in the order of causes."""
        return [(outcome, self.pictures[outcome]) for outcome in Outcome if self.pictures.get(outcome)]


def _region(box: tuple[float, float, float, float], size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a square around a box xyxy px, moved into the image as far as it fits."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0, 16) * _AROUND
    spans = []
    for low, high, length in ((x0, x1, size[1]), (y0, y1, size[0])):
        own = min(length, round(side))
        start = min(max(0, round((low + high - own) / 2)), length - own)
        spans.append((start, start + own))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _cut(
    image: np.ndarray,
    region: tuple[int, int, int, int],
    label: int,
    name: str,
    score: float | None,
    box: np.ndarray | None,
    rle: Rle | None,
) -> np.ndarray:
    """The region with one object, or none without a box, of about :data:`_SIDE_PX`."""
    left, top, right, bottom = region
    scale = _SIDE_PX / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    # Enlarged before it is drawn on, so that lines are as thin as in any picture.
    crop = cv2.resize(image[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR)
    masks = None
    if rle is not None:
        mask = mask_util.decode(rle)[top:bottom, left:right]
        masks = (cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5)[None]
    shown = [] if box is None else [box]
    objects = Objects(
        classes=[label] * len(shown),
        names=[name] * len(shown),
        scores=None if score is None else [score] * len(shown),
        boxes=np.array([(each - (left, top, left, top)) * scale for each in shown]).reshape(-1, 4),
        masks=masks if shown else None,
    )
    return draw_objects(crop, objects, width=size[0])
