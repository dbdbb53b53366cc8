"""The rules for one annotation, in COCO's or in detectron2's format."""

import enum
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from dimaskdino.data.coco_file import MOST_PIXELS, MOST_WEIGHT, Json
from dimaskdino.structures.rle_masks import Rle, Size, checked_rle

Extent = tuple[float, float, float, float]  # xyxy in pixels

# Coordinates beyond this many image sides are refused: rasterizers allocate memory by them, or overflow.
FARTHEST_SIDES = 10
# COCO's own boxes of crowd regions end at the last pixel's index, one less than those of its objects.
TOLERANCE_PX = 1.01
# An area is that of the polygons or of the pixels; for thin objects these differ by much.
AREA_TOLERANCE, AREA_TOLERANCE_PX = 0.5, 10
# A polygon of at least this area is taken to have a pixel; a smaller one is drawn to find out.
AREA_WITH_PIXEL = 4.0

# Looked up once, since the rules run over millions of annotations.
_IDS, _NUMBERS, _LISTS = (int, str, float, np.integer), (int, float), (list, tuple, np.ndarray)
_XYWH, _XYXY = BoxMode.XYWH_ABS, BoxMode.XYXY_ABS

MISSING_MASK = "mask: missing"
NORMALIZED = "coordinates: 0 to 1, as if normalized"
CORNERS = "box: reads as x1, y1, x2, y2"


class Level(enum.Enum):
    """What a problem leads to."""

    REFUSED = "refused"  # nothing can be done with the dataset
    DROPPED = "dropped"  # training leaves the object out
    NOTE = "note"  # nothing fails, but the annotation is probably not what its author meant


class Problem(NamedTuple):
    """One thing that is wrong."""

    kind: str  # what is wrong, the same text for everything that has this problem
    level: Level  # what it leads to
    detail: str = ""  # the values in this case
    remedy: str = ""  # what the user can do, where ``kind`` does not say it

    def __str__(self) -> str:
        """The problem in one line, without its place."""
        return self.kind + (f" ({self.detail})" if self.detail else "") + (f"; {self.remedy}" if self.remedy else "")


class MaskError(ValueError):
    """A segmentation that cannot be used: what is wrong, the values, and what to do."""


class Shape(NamedTuple):
    """What a mask or a box covers."""

    extent: Extent  # of the corners of polygons, of the pixels of an RLE, or the box
    area: float  # of the polygons, pixels or box, in square pixels
    polygons: list[Any]  # those of at least three points; empty for an RLE and for a box
    rle: Rle | None = None  # the mask, for an RLE

    @classmethod
    def of_box(cls, box: Extent) -> "Shape":
        """What a box covers."""
        left, top, right, bottom = box
        return cls(box, max(right - left, 0) * max(bottom - top, 0), [])

    def rasterized(self, size: Size) -> Rle:
        """The mask as an RLE of ``size``."""
        if self.rle is not None:
            return self.rle
        return mask_util.merge(mask_util.frPyObjects([[float(x) for x in each] for each in self.polygons], *size))

    def has_pixel(self, size: Size) -> bool:
        """Whether anything of a mask is inside an image of ``size``, or of a box at least a pixel's length."""
        if self.rle is not None or self.polygons:
            return mask_util.area(self.rasterized(size)) > 0
        left, top, right, bottom = self.extent
        sides = min(right, size[1]) - max(left, 0), min(bottom, size[0]) - max(top, 0)
        return min(sides) > 0 and max(sides) >= 1


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules for the annotations of one dataset."""

    categories: Mapping[Any, str]  # class name by known category id
    with_masks: bool = True  # whether the model needs masks; otherwise boxes are enough
    scored: bool = False  # whether predictions are compared with these annotations, which asks more of them
    in_file: bool = False  # whether they come from a COCO file: boxes are x, y, width, height, with an area beside them

    def problems(self, annotation: Json, size: Size | None) -> list[Problem]:
        """Everything that is wrong with an annotation of an image of ``size``, or without checks against that."""
        found: list[Problem] = []
        self.class_name(annotation, found)
        _check_flags(annotation, found)
        box = self.box(annotation, size, found)
        mask = self._mask(annotation, size, found)
        if mask is not None and self.with_masks:
            _check_visible(mask, "mask", size, found)
        elif box is not None and not (has_mask(annotation) and self.with_masks):
            _check_visible(Shape.of_box(box), "box", size, found)
        if box is not None and size is not None:
            _check_place(box, mask, size, found)
        if self.in_file:
            _check_area(annotation, mask, size, found)
        return found

    def class_name(self, annotation: Json, found: list[Problem]) -> str:
        """The class of an annotation, or "" if its category is unknown; problems are added to ``found``."""
        label = annotation.get("category_id")
        is_id = type(label) is int or (isinstance(label, _IDS) and not isinstance(label, bool))
        if is_id and label in self.categories:
            return self.categories[label] or str(label)
        twin = next((key for key in self.categories if str(key) == str(label)), None)
        if is_id and twin is not None:
            remedy = f"the category has the id {twin!r}: write both as numbers or both as text"
            found.append(Problem("category: the id is of another type", Level.REFUSED, f"{label!r:.40}", remedy))
        else:
            remedy = f"known ids: {', '.join(map(repr, [*self.categories][:8]))}{', ...' * (len(self.categories) > 8)}"
            found.append(Problem("category: unknown", Level.REFUSED, f"category_id {label!r:.40}", remedy))
        return ""

    def box(self, annotation: Json, size: Size | None, found: list[Problem]) -> Extent | None:
        """The box as xyxy in pixels, unless it is missing or malformed; problems are added to ``found``."""
        box = annotation.get("bbox")
        needed = self.scored or not (has_mask(annotation) or annotation.get("iscrowd", 0))
        if box is None:
            if needed:
                why = "evaluation needs it" if self.scored else "an object needs a box or a mask"
                found.append(Problem("box: missing", Level.REFUSED, "", f"add bbox, since {why}"))
            return None
        if not (isinstance(box, _LISTS) and len(box) == 4 and _is_finite(box)):
            found.append(Problem("box: not four finite numbers", Level.REFUSED, f"{box!r:.60}"))
            return None
        if max(*box, -min(box)) > _farthest(size):
            found.append(Problem("box: far outside the image", Level.REFUSED, f"{[*box]!r:.80} in {_text(size)}"))
            return None
        needed = needed or not self.with_masks
        mode = _XYWH if self.in_file else annotation.get("bbox_mode")
        if mode not in (_XYWH, _XYXY):
            remedy = "give BoxMode.XYXY_ABS or BoxMode.XYWH_ABS"
            level = Level.REFUSED if needed else Level.NOTE
            found.append(Problem("box: unknown bbox_mode", level, f"{mode!r:.40}", remedy))
            return None
        left, top, right, bottom = box
        if mode == _XYWH:
            right, bottom = left + right, top + bottom
        if right <= left or bottom <= top:
            level = Level.REFUSED if needed and (right < left or bottom < top) else Level.NOTE
            detail = f"{[*box]} as {BoxMode(mode).name}"
            found.append(Problem("box: width or height is not positive", level, detail))
        return left, top, right, bottom

    def extent(self, annotation: Json, size: Size | None) -> Extent | None:
        """The extent of the polygons of an annotation, or of its box."""
        mask = self._mask(annotation, size, [])
        return self.box(annotation, size, []) if mask is None or mask.rle is not None else mask.extent

    def _mask(self, annotation: Json, size: Size | None, found: list[Problem]) -> Shape | None:
        if not has_mask(annotation):
            # Training never looks at crowd regions.
            if self.with_masks and (self.scored or not annotation.get("iscrowd", 0)):
                remedy = "add polygons or an RLE, or remove the annotation; this model needs masks"
                found.append(Problem(MISSING_MASK, Level.REFUSED, "", remedy))
            return None
        segmentation = annotation["segmentation"]
        try:
            mask = read_mask(segmentation, size)
        except MaskError as error:
            kind, detail, remedy = error.args
            found.append(Problem(f"mask: {kind}", Level.REFUSED, detail, remedy))
            return None
        if mask is None or mask.rle is not None:
            return mask
        if not mask.polygons:
            level = Level.REFUSED if self.scored and self.with_masks else Level.DROPPED
            found.append(Problem("mask: no polygon with three points x, y", level, f"{segmentation!r:.60}"))
            return None
        if len(mask.polygons) < len(segmentation):
            detail = f"{len(segmentation) - len(mask.polygons)} of {len(segmentation)} polygons"
            found.append(Problem("mask: a polygon without three points x, y is left out", Level.NOTE, detail))
        return mask


def why_refused(annotation: Json, size: Size, categories: Mapping[Any, str], *, scored: bool = True) -> str:
    """Why an object of a COCO file can be used for nothing, whether it has a mask or a box alone; "" if it can."""
    rules = Rules(categories=categories, with_masks=has_mask(annotation), scored=scored, in_file=True)
    refused = (problem for problem in rules.problems(annotation, size) if problem.level is Level.REFUSED)
    return str(next(refused, ""))


def has_mask(annotation: Json) -> bool:
    """Whether an annotation has a segmentation of any kind."""
    mask = annotation.get("segmentation")
    return mask is not None and not (isinstance(mask, list | dict) and not mask)


def read_mask(segmentation: Any, size: Size | None) -> Shape | None:
    """What polygons or an RLE cover; None for an RLE in an image of unknown size.

    Raises:
        MaskError: it is neither, or malformed.
    """
    if isinstance(segmentation, dict):
        return None if size is None else _read_rle(segmentation, size)
    if isinstance(segmentation, np.ndarray):
        remedy = "give pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))"
        raise MaskError("an array", f"of shape {segmentation.shape}", remedy)
    if not (isinstance(segmentation, list) and all(map(_is_list, segmentation))):
        raise MaskError("neither a list of polygons, each a list of numbers, nor an RLE", f"{segmentation!r:.60}", "")
    shapes = [_read_polygon(polygon) for polygon in segmentation if _has_three_points(polygon)]
    if len(shapes) == 1:
        (mask,) = shapes
    elif shapes:
        lefts, tops, rights, bottoms = zip(*(shape.extent for shape in shapes), strict=True)
        extent = (min(lefts), min(tops), max(rights), max(bottoms))
        mask = Shape(extent, sum(shape.area for shape in shapes), [shape.polygons[0] for shape in shapes])
    else:
        return Shape((0, 0, 0, 0), 0, [])
    left, top, right, bottom = mask.extent
    farthest = max(-left, -top, right, bottom)
    if farthest > _farthest(size):
        raise MaskError("far outside the image", f"a coordinate of {farthest:g} in {_text(size)}", "")
    return mask


def _is_list(value: Any) -> bool:
    return isinstance(value, _LISTS)


def _has_three_points(polygon: Any) -> bool:
    if not _is_finite(polygon):
        raise MaskError("a polygon is not a flat list of finite numbers x, y, x, y, ...", f"{polygon!r:.60}", "")
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def _read_polygon(polygon: Any) -> Shape:
    x, y = polygon[::2], polygon[1::2]
    area = abs(sum(map(mul, x, y[1:])) + x[-1] * y[0] - sum(map(mul, x[1:], y)) - x[0] * y[-1]) / 2  # shoelace formula
    return Shape((min(x), min(y), max(x), max(y)), area, [polygon])


def _read_rle(segmentation: Rle, size: Size) -> Shape:
    try:
        rle = checked_rle(segmentation, size)
    except ValueError as error:
        remedy = f"encode the mask again at the image's size, height x width {size[0]}x{size[1]}"
        raise MaskError(str(error), f"size {segmentation.get('size')!r:.40}", remedy) from error
    left, top, width, height = mask_util.toBbox(rle).tolist()
    return Shape((left, top, left + width, top + height), float(mask_util.area(rle)), [], rle)


def _check_flags(annotation: Json, found: list[Problem]) -> None:
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        found.append(Problem("iscrowd: neither 0 nor 1", Level.REFUSED, f"{crowd!r:.40}"))
    if annotation.get("ignore", 0) != 0:
        remedy = 'write "iscrowd": 1 to leave a region out, or remove the key'
        found.append(Problem("ignore: not supported", Level.REFUSED, f"{annotation['ignore']!r:.40}", remedy))
    for key, value in (
        ("ignored", annotation.get("ignored") or 0),
        ("box_supervised", annotation.get("box_supervised", 1)),
    ):
        if value not in (0, 1):
            found.append(Problem(f"{key}: neither true nor false", Level.REFUSED, f"{value!r:.40}"))
    weight = annotation.get("box_weight", 1)
    if not isinstance(weight, _NUMBERS) or not 0 <= weight <= MOST_WEIGHT:
        remedy = f"give a number from 0 to {MOST_WEIGHT:g}"
        found.append(Problem("box_weight: not a weight", Level.REFUSED, f"{weight!r:.40}", remedy))
    if annotation.get("ignored") and not crowd:
        found.append(Problem("ignored: the region is trained on", Level.NOTE, "", 'add "iscrowd": 1 to leave it out'))


def _check_visible(shape: Shape, name: str, size: Size | None, found: list[Problem]) -> None:
    """Find objects of which nothing is in the image, and masks that leave it."""
    left, top, right, bottom = shape.extent
    height, width = size or (math.inf, math.inf)
    if shape.area >= AREA_WITH_PIXEL and left >= 0 and top >= 0 and right <= width and bottom <= height:
        return
    detail = f"x {left:g} to {right:g}, y {top:g} to {bottom:g} in {_text(size)}"
    if shape.rle is None and left >= 0 and top >= 0 and right <= 1 and bottom <= 1:
        found.append(Problem(NORMALIZED, Level.NOTE, detail, "multiply them by the image's width and height"))
    if shape.rle is None and (right <= 0 or bottom <= 0 or left >= width or top >= height):
        found.append(Problem(f"{name}: outside the image", Level.DROPPED, detail))
    elif size is not None and not shape.has_pixel(size):
        found.append(Problem(f"{name}: no pixel", Level.DROPPED, detail))
    elif name == "mask" and _leaves(shape.extent, size):
        found.append(Problem("mask: leaves the image", Level.NOTE, detail))


def _check_place(box: Extent, mask: Shape | None, size: Size, found: list[Problem]) -> None:
    """Compare a box with its image and its mask."""
    leaves = _leaves(box, size)
    fits_mask = mask is None or mask.area == 0 or _difference(box, mask.extent) <= TOLERANCE_PX
    if not leaves and fits_mask:
        return
    given = (box[0], box[1], box[2] - box[0], box[3] - box[1])
    is_box = given[0] < given[2] and given[1] < given[3] and not _leaves(given, size)
    if is_box and (mask is None or _difference(given, mask.extent) <= TOLERANCE_PX):
        found.append(Problem(CORNERS, Level.NOTE, f"{[*given]} in {_text(size)}", "write it as x, y, width, height"))
        return
    detail = f"{[*given]} as x, y, width, height"
    if leaves:
        found.append(Problem("box: leaves the image", Level.NOTE, f"{detail} in {_text(size)}"))
    if mask is not None and not fits_mask:
        left, top, right, bottom = mask.extent
        expected = [round(value, 2) for value in (left, top, right - left, bottom - top)]
        found.append(Problem("box: is not its mask's extent", Level.NOTE, f"{detail}, the mask's is {expected}"))


def _check_area(annotation: Json, mask: Shape | None, size: Size | None, found: list[Problem]) -> None:
    area = annotation.get("area")
    if not (isinstance(area, _NUMBERS) and 0 < area <= sys.float_info.max):
        found.append(Problem("area: missing or not positive", Level.NOTE, f"{area!r:.40}"))
    elif mask is not None and size is not None and not _is_area(area, mask.area):
        # Polygons that overlap or leave the image cover less than the sum of their areas.
        pixels = int(mask_util.area(mask.rasterized(size)))
        if pixels and not _is_area(area, pixels):
            found.append(Problem("area: is not its mask's", Level.NOTE, f"{area}, the mask's is {pixels}"))


def _is_area(area: float, expected: float) -> bool:
    return abs(area - expected) <= AREA_TOLERANCE_PX + AREA_TOLERANCE * expected


def _leaves(box: Extent, size: Size | None) -> bool:
    left, top, right, bottom = box
    height, width = size or (math.inf, math.inf)
    return min(left, top) < -TOLERANCE_PX or right > width + TOLERANCE_PX or bottom > height + TOLERANCE_PX


def _difference(box: Extent, other: Extent) -> float:
    return max(abs(box[0] - other[0]), abs(box[1] - other[1]), abs(box[2] - other[2]), abs(box[3] - other[3]))


def _farthest(size: Size | None) -> int:
    return FARTHEST_SIDES * (max(size) if size else MOST_PIXELS)


def _text(size: Size | None) -> str:
    return f"an image of {size[1]}x{size[0]}" if size else "an image of unknown size"


def _is_finite(numbers: Any) -> bool:
    """Whether a flat list holds only finite numbers; one sum is faster than a look at each."""
    try:
        return math.isfinite(sum(numbers))
    except (TypeError, OverflowError, ValueError):
        return False
