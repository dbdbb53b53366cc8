"""A quick look at many annotations of a COCO file, which finds those that no rule objects to.

Datasets have a million objects and few mistakes: the rules, one object after the other, take ten times as long.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from dimaskdino.data.rle import Size
from dimaskdino.data.validation.rules import (
    AREA_TOLERANCE,
    AREA_TOLERANCE_PX,
    AREA_WITH_PIXEL,
    TOLERANCE_PX,
    Json,
    Rules,
    has_mask,
)

ROUNDING = 1e-6  # sums here and in the rules may differ by this share: what is closer to a limit is left to the rules


def surely_fine(annotations: Sequence[Json], sizes: Sequence[Size | None], rules: Rules) -> np.ndarray:
    """Which annotations :meth:`Rules.problems` finds nothing wrong with; of the others nothing is said.

    Args:
        annotations: of any images.
        sizes: of the image of each.
        rules: of their dataset.

    Returns:
        (n,) bool.
    """
    fine = np.zeros(len(annotations), dtype=bool)
    if not rules.in_file:
        return fine
    labels = {key for key in rules.categories if type(key) is int}
    plain = [
        index
        for index, annotation in enumerate(annotations)
        if sizes[index] is not None and _is_plain(annotation, labels, with_masks=rules.with_masks)
    ]
    try:
        with np.errstate(all="ignore"):  # what is not finite does not pass
            fine[plain] = _judge([annotations[index] for index in plain], [sizes[index] for index in plain], rules)
    except (TypeError, OverflowError):  # something that is no number, or a number that is no float
        fine[:] = False
    return fine


def _is_plain(annotation: Json, labels: set[int], *, with_masks: bool) -> bool:
    """Whether an annotation has the usual types: polygons, a box of four, an area, a known class."""
    label, box, mask = annotation.get("category_id"), annotation.get("bbox"), annotation.get("segmentation")
    return (
        type(label) is int
        and label in labels
        and "ignore" not in annotation
        and "ignored" not in annotation
        and annotation.get("iscrowd", 0) in (0, 1)
        and type(box) is list
        and len(box) == 4
        and type(annotation.get("area")) in (int, float)
        and (
            (type(mask) is list and len(mask) > 0 and all(map(_is_plain_polygon, mask)))
            or (not with_masks and not has_mask(annotation))
        )
    )


def _is_plain_polygon(polygon: object) -> bool:
    return type(polygon) is list and len(polygon) >= 6 and len(polygon) % 2 == 0


def _judge(annotations: Sequence[Json], sizes: Sequence[Size | None], rules: Rules) -> np.ndarray:
    """(n,) bool, whether plain annotations pass; raises TypeError or OverflowError for what is no number."""
    if not annotations:
        return np.zeros(0, dtype=bool)
    numbers = array("d")
    for annotation in annotations:
        numbers.fromlist(annotation["bbox"])
    x, y, width, height = np.frombuffer(numbers).reshape(-1, 4).T
    boxes = np.stack((x, y, x + width, y + height))
    far = np.array(sizes, dtype=float)[:, ::-1].T  # width, height
    area = np.array([annotation["area"] for annotation in annotations], dtype=float)
    good = (boxes[2:] > boxes[:2]).all(0) & _is_inside(boxes, far, TOLERANCE_PX) & (area > 0) & np.isfinite(area)
    masks = [annotation.get("segmentation") for annotation in annotations]
    masked = np.array([bool(mask) for mask in masks])
    extent, drawn = _extents([mask for mask in masks if mask])
    if rules.with_masks:
        visible = _is_inside(extent, far[:, masked], 0) & (drawn >= AREA_WITH_PIXEL * (1 + ROUNDING))
    else:
        good &= _is_inside(boxes, far, 0) & (width * height >= AREA_WITH_PIXEL * (1 + ROUNDING))
        visible = np.isfinite(extent).all(0) & (drawn > 0)
    fits = np.abs(extent - boxes[:, masked]).max(0, initial=0) <= TOLERANCE_PX * (1 - ROUNDING)
    allowed = (AREA_TOLERANCE_PX + AREA_TOLERANCE * drawn) * (1 - ROUNDING)
    good[masked] &= visible & fits & (np.abs(area[masked] - drawn) <= allowed)
    return good


def _is_inside(boxes: np.ndarray, far: np.ndarray, tolerance: float) -> np.ndarray:
    """Whether boxes (4, n) leave images of width and height ``far`` (2, n) by at most ``tolerance`` px."""
    margin = tolerance * (1 - ROUNDING)
    return np.logical_and((boxes[:2] >= -margin).all(0), (boxes[2:] <= far + margin).all(0))


def _extents(masks: Sequence[list[list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Extents (4, n) xyxy and areas (n,) of masks, each of one or several polygons."""
    if not masks:
        return np.zeros((4, 0)), np.zeros(0)
    numbers = array("d")
    for mask in masks:
        for polygon in mask:
            numbers.fromlist(polygon)
    x, y = np.frombuffer(numbers).reshape(-1, 2).T.copy()
    lengths = np.array([len(polygon) // 2 for mask in masks for polygon in mask])
    ends = lengths.cumsum()
    first = ends - lengths
    following = np.arange(1, len(x) + 1)
    following[ends - 1] = first
    areas = np.abs(np.add.reduceat(x * y[following] - x[following] * y, first)) / 2
    counts = np.array([len(mask) for mask in masks])
    polygon = counts.cumsum() - counts
    low = np.stack([np.minimum.reduceat(side, first[polygon]) for side in (x, y)])
    high = np.stack([np.maximum.reduceat(side, first[polygon]) for side in (x, y)])
    return np.concatenate((low, high)), np.add.reduceat(areas, polygon)
