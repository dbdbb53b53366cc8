"""What is wrong with one image of a COCO-format dataset and its annotations."""

import os
import sys
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.data.images import BitDepthError, read_image
from dimaskdino.data.reports import Problem
from dimaskdino.data.rle import Rle, Size, checked_rle
from dimaskdino.errors import DatasetError

# COCO's own boxes of crowd regions end at the last pixel's index, one less than those of its objects.
BOX_TOLERANCE_PX = 1.01
# An area is the polygons' or the pixels'; for thin objects these differ by much.
AREA_TOLERANCE, AREA_TOLERANCE_PX = 0.5, 10

Json = dict[str, Any]
Extent = tuple[float, float, float, float]  # xyxy in pixels


def image_problems(image: Json, annotations: list[Json], image_root: str) -> list[Problem]:
    """Read an image and check it and its annotations.

    Args:
        image: of the COCO file, with file_name, height and width.
        annotations: those of this image.
        image_root: folder that file_name is relative to.
    """
    name = image["file_name"]
    problems = _file_problems(image, os.path.join(image_root, name))
    size = (image["height"], image["width"])
    for annotation in annotations:
        where = f"annotation {annotation.get('id')} of {name}"
        for kind, detail in annotation_problems(annotation, size):
            problems.append(Problem(kind, f"{where}{detail and ': '}{detail}"))
    return problems


def _file_problems(image: Json, path: str) -> list[Problem]:
    name = image["file_name"]
    if not os.path.isfile(path):
        return [Problem("image file is missing", name)]
    try:
        height, width = read_image(path, "RGB").shape[:2]
    except BitDepthError:
        return [Problem("image has more than 8 bits a channel: convert it to 8 bits", name)]
    except DatasetError:
        return [Problem("image file cannot be read", name)]
    if (height, width) != (image["height"], image["width"]):
        detail = f"{width}x{height}, listed as {image['width']}x{image['height']} (width x height)"
        return [Problem("image has another size than listed", f"{name}: {detail}")]
    return []


def annotation_problems(annotation: Json, size: Size) -> list[tuple[str, str]]:
    """Check an annotation of an image of ``size``: kinds of problems, each with details."""
    problems = _flag_problems(annotation)
    extent, area = None, None
    try:
        rle, extent = mask_and_extent(annotation.get("segmentation"), size)
        area = int(mask_util.area(rle))
    except ValueError as error:
        problems.append((f"mask: {error}", ""))
    if area == 0:
        problems.append(("mask: no pixel in the image", ""))
        extent, area = None, None
    return problems + _box_problems(annotation.get("bbox"), extent, size) + _area_problems(annotation, area)


def _flag_problems(annotation: Json) -> list[tuple[str, str]]:
    problems = []
    if annotation.get("iscrowd", 0) not in (0, 1):
        problems.append(("iscrowd is neither 0 nor 1", repr(annotation["iscrowd"])))
    if annotation.get("ignore"):
        problems.append(("ignore is set, which detectron2 refuses: write iscrowd", ""))
    if annotation.get("ignored") and not annotation.get("iscrowd"):
        problems.append(("ignored region without iscrowd would be trained on", ""))
    return problems


def mask_and_extent(segmentation: Any, size: Size) -> tuple[Rle, Extent]:
    """The RLE of a segmentation, and the extent of its pixels or of its polygons' corners.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if isinstance(segmentation, dict):
        rle = checked_rle(segmentation, size)
        left, top, width, height = mask_util.toBbox(rle).tolist()
        return rle, (left, top, left + width, top + height)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("missing")
    corners = np.concatenate([_corners(polygon) for polygon in segmentation])
    low, high = corners.min(axis=0), corners.max(axis=0)
    if (low < -BOX_TOLERANCE_PX).any() or (high > np.array(size[::-1]) + BOX_TOLERANCE_PX).any():
        raise ValueError("a polygon leaves the image")
    return mask_util.merge(mask_util.frPyObjects(segmentation, *size)), (*low.tolist(), *high.tolist())


def _corners(polygon: Any) -> np.ndarray:
    try:
        numbers = np.array(polygon)
    except ValueError:
        numbers = np.zeros((), dtype=object)
    if numbers.dtype.kind not in "iuf" or numbers.ndim != 1 or len(numbers) % 2:
        raise ValueError("a malformed polygon: not a flat list [x, y, x, y, ...] of numbers")
    corners = numbers.astype(np.float64).reshape(-1, 2)
    if len(corners) < 3 or not np.isfinite(corners).all():
        raise ValueError("a polygon of fewer than three finite points")
    return corners


def _box_problems(box: Any, extent: Extent | None, size: Size) -> list[tuple[str, str]]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
        return [("box: not four finite numbers", repr(box))]
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return [("box: width or height is not positive", repr(box))]
    problems = []
    far_x, far_y = left + width, top + height
    if min(left, top) < -BOX_TOLERANCE_PX or max(far_x - size[1], far_y - size[0]) > BOX_TOLERANCE_PX:
        problems.append(("box: leaves the image", f"{box} in {size[1]}x{size[0]}"))
    if extent is not None:
        difference = max(abs(a - b) for a, b in zip((left, top, far_x, far_y), extent, strict=True))
        if difference > BOX_TOLERANCE_PX:
            expected = [round(value, 2) for value in (*extent[:2], extent[2] - extent[0], extent[3] - extent[1])]
            problems.append(("box: is not its mask's extent", f"{box}, the mask's is {expected}"))
    return problems


def _area_problems(annotation: Json, of_mask: int | None) -> list[tuple[str, str]]:
    area: Any = annotation.get("area")
    if not _is_finite(area) or area <= 0:
        return [("area: missing or not positive", repr(area))]
    if of_mask is not None and abs(area - of_mask) > AREA_TOLERANCE_PX + AREA_TOLERANCE * of_mask:
        return [("area: is not its mask's", f"{area}, the mask's is {of_mask}")]
    return []


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
