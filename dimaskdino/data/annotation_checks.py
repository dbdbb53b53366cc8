"""What is wrong with one annotation, as the end of a sentence that begins with its place; "" where nothing is."""

import math
from typing import Any

import numpy as np

from dimaskdino.data.rle import Size, checked_rle

Json = dict[str, Any]


def flag_complaint(annotation: Json) -> str:
    """About ``iscrowd``."""
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"has iscrowd {annotation['iscrowd']!r:.40}, which is neither 0 nor 1"
    return ""


def box_complaint(annotation: Json, *, scored: bool) -> str:
    """About ``bbox``. Training makes its boxes from the masks; only the evaluation needs those of the annotations.

    Args:
        annotation: the annotation.
        scored: whether predictions are compared with it.
    """
    if "bbox" not in annotation:
        return "has no bbox, which the evaluation needs" if scored else ""
    box = annotation["bbox"]
    if not (_is_list(box) and len(box) == 4 and _are_finite(box)):
        return f"has the box {box!r:.40}, which is no list of four finite numbers"
    return ""


def mask_complaint(annotation: Json, size: Size | None, *, scored: bool) -> str:
    """About ``segmentation``. Training never looks at crowd regions; the evaluation looks at all.

    Args:
        annotation: the annotation.
        size: the image's; None where it is not known, and an RLE is not checked.
        scored: whether predictions are compared with it.
    """
    mask = annotation.get("segmentation")
    if mask is None or mask in ([], {}):
        needed = scored or not annotation.get("iscrowd", 0)
        return "has no segmentation; give it polygons or an RLE, or remove it" if needed else ""
    if isinstance(mask, dict):
        return _rle_complaint(mask, size) if size else ""
    if not (isinstance(mask, list) and all(map(_is_list, mask))):
        return "has a segmentation that is neither a list of polygons, each a list of numbers, nor an RLE"
    if not all(map(_are_finite, mask)):
        return "has a polygon with something else than finite numbers x, y, x, y, ... in one list"
    if scored and is_dropped(mask[0]):
        # pycocotools takes the kind of a whole segmentation from its first list; four numbers are a box there.
        return f"has a polygon of {len(mask[0])} numbers, which needs at least three points x, y to be evaluated on"
    return ""


def is_dropped(polygon: list[float]) -> bool:
    """Whether detectron2 leaves a polygon out with no word, or with it the whole object if it has no other."""
    return len(polygon) < 6 or len(polygon) % 2 == 1


def _rle_complaint(mask: Json, size: Size) -> str:
    try:
        checked_rle(mask, size)
    except ValueError as error:
        return f"has {error}; encode the mask again at the image's size (height x width {size[0]}x{size[1]})"
    if not all(type(side) is int for side in mask["size"]):
        return f"has an RLE of the size {mask['size']}, which must be whole numbers"
    return ""


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _are_finite(numbers: Any) -> bool:
    """Whether a list holds finite numbers alone; one sum is faster than a look at each."""
    try:
        return math.isfinite(sum(numbers))
    except (TypeError, OverflowError):
        return False
