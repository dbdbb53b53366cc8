"""Labels of a large picture, cut to a tile of it."""

import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.data.coco_file import Json
from dimaskdino.data.validation.rules import Shape, has_mask, read_mask
from dimaskdino.structures.rle_masks import Rle, Size, coco_shape, crop_of

Window = tuple[int, int, int, int]  # top, left, bottom, right, in pixels


def cut_annotation(annotation: Json, size: Size, window: Window, least_share: float = 0.0) -> Json | None:
    """An annotation in the frame of a tile; None with too small a share inside.

    It has polygons where the whole object is inside, else an RLE; with a box alone, a box. Box and area are those of
    what is inside. Raises ValueError for a mask that cannot be used.
    """
    top, left, bottom, right = window
    if not has_mask(annotation):
        return _cut_box(annotation, window, least_share)
    mask = read_mask(annotation["segmentation"], size)
    x0, y0, x1, y1 = mask.extent if mask else (0, 0, 0, 0)
    if mask is None or x0 >= right or y0 >= bottom or x1 <= left or y1 <= top:
        return None
    if mask.polygons and x0 >= left and y0 >= top and x1 <= right and y1 <= bottom:
        moved = [np.subtract(np.reshape(each, (-1, 2)), (left, top)).ravel().tolist() for each in mask.polygons]
        return {**annotation, "segmentation": moved, "bbox": [x0 - left, y0 - top, x1 - x0, y1 - y0]}
    rle = _cut_mask(mask, window)
    area = mask_util.area(rle)
    if not area or area < least_share * mask_util.area(mask.rasterized(size)):
        return None
    return {**annotation, **coco_shape(rle)}


def _cut_mask(mask: Shape, window: Window) -> Rle:
    """The part of a mask in a tile, in the tile's frame."""
    top, left, bottom, right = window
    if mask.rle is None:  # the rasterizer leaves out what lies outside
        moved = [np.subtract(np.reshape(each, (-1, 2)), (left, top)).ravel().tolist() for each in mask.polygons]
        return mask_util.merge(mask_util.frPyObjects(moved, bottom - top, right - left))
    crop, y, x = crop_of(mask.rle)
    tile = np.zeros((bottom - top, right - left), dtype=np.uint8, order="F")
    rows = slice(max(y, top), max(min(y + crop.shape[0], bottom), max(y, top)))
    columns = slice(max(x, left), max(min(x + crop.shape[1], right), max(x, left)))
    part = crop[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
    tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = part
    return mask_util.encode(tile)


def _cut_box(annotation: Json, window: Window, least_share: float) -> Json | None:
    top, left, bottom, right = window
    x, y, width, height = annotation["bbox"]
    x0, y0, x1, y1 = max(x, left), max(y, top), min(x + width, right), min(y + height, bottom)
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < least_share * width * height:
        return None
    return {**annotation, "bbox": [x0 - left, y0 - top, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
