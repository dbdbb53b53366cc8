"""A quick look at many annotations of a COCO file, which finds those that no rule objects to.

Datasets have a million objects and few mistakes: the rules, one object after the other, take ten times as long.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import torch

from dimaskdino.data.coco_file import Annotations
from dimaskdino.data.validation.rules import (
    AREA_TOLERANCE,
    AREA_TOLERANCE_PX,
    AREA_WITH_PIXEL,
    TOLERANCE_PX,
    Json,
    Rules,
)
from dimaskdino.layers.ms_deform_attn_ops import COMPILED
from dimaskdino.structures.rle_masks import Size

ROUNDING = 1e-6  # sums here and in the rules may differ by this share: what is closer to a limit is left to the rules
_WEIGHTS = np.sqrt((2.0, 3.0, 5.0, 7.0, 11.0, 13.0))  # of a sum that is the same for the same class, box and image
_NO_MASK = tuple(map(msgspec.Raw, (b"null", b"[]", b"{}")))


class Look(NamedTuple):
    """What a quick look finds."""

    fine: np.ndarray  # (n,) bool; True if :meth:`Rules.problems` would find nothing wrong, False if that is not known
    single: np.ndarray  # (n,) bool; True if it has the usual types and a known class, and its image no duplicate of it
    kept: np.ndarray  # (n,) bool; True if, in addition to both, training keeps the object
    classes: np.ndarray  # (n,) int, index of the class among the rules' categories; only valid where ``single``
    of_image: np.ndarray  # (n,) int, index of the image


_decode_mask = msgspec.json.Decoder(list[Annotated[list[float], msgspec.Meta(min_length=6)]]).decode


def look(images: Sequence[Sequence[Json]], sizes: Sequence[Size | None], rules: Rules) -> Look:
    """Look at the annotations of some images of known sizes."""
    of_image = np.repeat(np.arange(len(images)), [*map(len, images)])
    nothing = np.zeros(len(of_image), dtype=bool)
    try:
        if not rules.in_file:
            raise ValueError
        objects = Annotations.together(images)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return Look(nothing, nothing, nothing, nothing.astype(int), of_image)
    far = np.array([size or (np.nan, np.nan) for size in sizes], dtype=float)[of_image, ::-1].T
    known = {key: index for index, key in enumerate(rules.categories) if type(key) is int}
    classes = np.array([known.get(each, -1) for each in objects.array("category_id").tolist()], dtype=int)
    with np.errstate(all="ignore"):  # what is not finite does not pass
        key = (np.stack((classes, *objects.array("bbox").T, of_image)) * _WEIGHTS[:, None]).sum(0)
        single = (classes >= 0) & np.isfinite(key) & ~_repeated(key)
        fine = (classes >= 0) & _judge(objects, far, with_masks=rules.with_masks)
    return Look(fine, single, fine & single & ~objects.array("iscrowd"), classes, of_image)


def _judge(objects: Annotations, far: np.ndarray, *, with_masks: bool) -> np.ndarray:
    """(n,) bool, whether annotations pass in images of width and height ``far`` (2, n)."""
    x, y, width, height = objects.array("bbox").T
    corners = np.stack((x, y, x + width, y + height))
    area, masks = objects.array("area"), objects.array("segmentation")
    good = (corners[2:] > corners[:2]).all(0) & _is_inside(corners, far, TOLERANCE_PX) & (area > 0) & np.isfinite(area)
    masked = np.array([with_masks or mask not in _NO_MASK for mask in masks.tolist()], dtype=bool)
    extent, drawn = _measured(masks[masked].tolist())
    if with_masks:
        visible = _is_inside(extent, far[:, masked], 0) & (drawn >= AREA_WITH_PIXEL * (1 + ROUNDING))
    else:
        good &= _is_inside(corners, far, 0) & (width * height >= AREA_WITH_PIXEL * (1 + ROUNDING))
        visible = np.isfinite(extent).all(0) & (drawn > 0)
    fits = np.abs(extent - corners[:, masked]).max(0, initial=0) <= TOLERANCE_PX * (1 - ROUNDING)
    allowed = (AREA_TOLERANCE_PX + AREA_TOLERANCE * drawn) * (1 - ROUNDING)
    good[masked] &= visible & fits & (np.abs(area[masked] - drawn) <= allowed)
    return good


def _is_inside(boxes: np.ndarray, far: np.ndarray, tolerance: float) -> np.ndarray:
    """Whether boxes (4, n) leave images of width and height ``far`` (2, n) by at most ``tolerance`` px."""
    margin = tolerance * (1 - ROUNDING)
    return np.logical_and((boxes[:2] >= -margin).all(0), (boxes[2:] <= far + margin).all(0))


def _repeated(key: np.ndarray) -> np.ndarray:
    """Whether another object has the same key."""
    order = np.argsort(key)
    same = np.diff(key[order]) == 0
    found = np.zeros(len(key), dtype=bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return found


def _measured(masks: Sequence[bytes | msgspec.Raw]) -> tuple[np.ndarray, np.ndarray]:
    """Extents (4, n) xyxy and areas (n,) of masks as text, each of one or several polygons; of others not finite."""
    if not (COMPILED and hasattr(torch.ops.dimaskdino, "measured_polygons")):
        return _extents([_polygons(mask) for mask in masks])
    text, ends = bytearray().join(masks), np.cumsum([0, *map(len, masks)])[1:]
    if not text:
        return np.zeros((4, 0)), np.zeros(0)
    measured = torch.ops.dimaskdino.measured_polygons(torch.frombuffer(text, dtype=torch.uint8), torch.from_numpy(ends))
    return measured.numpy().T[:4], measured.numpy().T[4]


def _polygons(mask: bytes | msgspec.Raw) -> list[list[float]]:
    try:
        found = _decode_mask(mask)
    except ValueError:
        found = []
    return found if found and all(len(polygon) % 2 == 0 for polygon in found) else [[np.nan] * 6]


def _extents(masks: Sequence[list[list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_measured`, of lists of polygons."""
    if not masks:
        return np.zeros((4, 0)), np.zeros(0)
    lengths = np.array([len(polygon) for mask in masks for polygon in mask])
    numbers = chain.from_iterable(chain.from_iterable(masks))
    x, y = np.fromiter(numbers, dtype=float, count=lengths.sum()).reshape(-1, 2).T.copy()
    ends = lengths.cumsum() // 2
    first = ends - lengths // 2
    following = np.arange(1, len(x) + 1)
    following[ends - 1] = first
    areas = np.abs(np.add.reduceat(x * y[following] - x[following] * y, first)) / 2
    counts = np.array([len(mask) for mask in masks])
    polygon = counts.cumsum() - counts
    low = np.stack([np.minimum.reduceat(side, first[polygon]) for side in (x, y)])
    high = np.stack([np.maximum.reduceat(side, first[polygon]) for side in (x, y)])
    return np.concatenate((low, high)), np.add.reduceat(areas, polygon)
