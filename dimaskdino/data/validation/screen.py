"""A quick look at many annotations of a COCO file, which finds those that no rule objects to.

Datasets have a million objects and few mistakes: the rules, one object after the other, take ten times as long.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
import torch

from dimaskdino.data.coco_file import Annotations
from dimaskdino.data.validation.rules import (
    AREA_TOLERANCE,
    AREA_TOLERANCE_PX,
    AREA_WITH_PIXEL,
    MOST_WEIGHT,
    TOLERANCE_PX,
    Json,
    Rules,
)
from dimaskdino.layers.ms_deform_attn_ops import COMPILED
from dimaskdino.structures.rle_masks import Size

ROUNDING = 1e-6  # sums here and in the rules may differ by this share: what is closer to a limit is left to the rules
_WEIGHTS = np.sqrt((2.0, 3.0, 5.0, 7.0, 11.0))  # of a sum that is the same for the same class and box
_NO_MASK = (b"null", b"[]", b"{}")


class Plain(msgspec.Struct, gc=False):
    """An annotation of the usual types, with a mask as text; msgspec refuses all others."""

    category_id: int
    bbox: Annotated[list[float], msgspec.Meta(min_length=4, max_length=4)]
    area: float
    segmentation: msgspec.Raw = msgspec.Raw(_NO_MASK[0])
    iscrowd: Literal[0, 1] | bool = 0
    ignore: Literal[0] = 0
    ignored: Literal[0] = 0
    box_supervised: Literal[0, 1] | bool = 1
    box_weight: Annotated[float, msgspec.Meta(ge=0, le=MOST_WEIGHT)] = 1.0


class Look(NamedTuple):
    """What a quick look finds."""

    fine: np.ndarray  # (n,) bool; True if :meth:`Rules.problems` would find nothing wrong, False if that is not known
    kept: np.ndarray  # (n,) bool; True if, in addition, training keeps the object and its image has no duplicate of it
    classes: np.ndarray  # (n,) int, index of the class among the rules' categories; only valid where ``fine``


_decode = msgspec.json.Decoder(list[Plain]).decode
_decode_one = msgspec.json.Decoder(Plain).decode
_decode_mask = msgspec.json.Decoder(list[Annotated[list[float], msgspec.Meta(min_length=6)]]).decode


def look(images: Sequence[Sequence[Json]], sizes: Sequence[Size | None], rules: Rules) -> Look:
    """Look at the annotations of some images.

    Args:
        images: the annotations of each.
        sizes: of each image.
        rules: of their dataset.
    """
    number = sum(map(len, images))
    found = Look(np.zeros(number, dtype=bool), np.zeros(number, dtype=bool), np.zeros(number, dtype=int))
    if not rules.in_file:
        return found
    objects = [each for annotations in images for each in _plain_objects(annotations)]
    place = np.array([index for index, each in enumerate(objects) if each is not None], dtype=int)
    plain = [each for each in objects if each is not None]
    if not plain:
        return found
    of_image = np.repeat(np.arange(len(images)), [*map(len, images)])[place]
    far = np.array([size or (np.nan, np.nan) for size in sizes], dtype=float)[of_image, ::-1].T
    known = {key: index for index, key in enumerate(rules.categories) if type(key) is int}
    classes = np.array([known.get(each.category_id, -1) for each in plain])
    boxes = np.fromiter(chain.from_iterable([each.bbox for each in plain]), dtype=float).reshape(-1, 4).T
    with np.errstate(all="ignore"):  # what is not finite does not pass
        fine = (classes >= 0) & _judge(plain, boxes, far, with_masks=rules.with_masks)
        key = (np.stack((classes, *boxes)) * _WEIGHTS[:, None]).sum(0)
    found.fine[place] = fine
    found.classes[place] = classes
    crowd = np.array([each.iscrowd for each in plain], dtype=bool)
    found.kept[place] = fine & ~crowd & ~_repeated(key, of_image)
    return found


def _plain_objects(annotations: Sequence[Json]) -> Sequence[Plain | None]:
    """The annotations of an image that have the usual types, None for the others."""
    if not isinstance(annotations, Annotations):
        return [_converted(each) for each in annotations]
    try:
        return _decode(annotations.text())
    except ValueError:
        return [_decoded(text) for text in annotations.texts()]


def _converted(annotation: Json) -> Plain | None:
    try:
        return _decode_one(msgspec.json.encode(annotation))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _decoded(text: msgspec.Raw) -> Plain | None:
    try:
        return _decode_one(text)
    except ValueError:
        return None


def _judge(plain: Sequence[Plain], boxes: np.ndarray, far: np.ndarray, *, with_masks: bool) -> np.ndarray:
    """(n,) bool, whether annotations with boxes (4, n), x, y, width, height, in images of ``far`` (2, n) pass."""
    x, y, width, height = boxes
    corners = np.stack((x, y, x + width, y + height))
    area = np.array([each.area for each in plain])
    good = (corners[2:] > corners[:2]).all(0) & _is_inside(corners, far, TOLERANCE_PX) & (area > 0) & np.isfinite(area)
    masks = [bytes(each.segmentation) for each in plain]
    masked = np.array([with_masks or mask not in _NO_MASK for mask in masks])
    extent, drawn = _measured([mask for mask, has_one in zip(masks, masked.tolist(), strict=True) if has_one])
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


def _repeated(key: np.ndarray, of_image: np.ndarray) -> np.ndarray:
    """Whether another object of the same image has the same key."""
    order = np.lexsort((key, of_image))
    same = (np.diff(key[order]) == 0) & (np.diff(of_image[order]) == 0)
    found = np.zeros(len(key), dtype=bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return found


def _measured(masks: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Extents (4, n) xyxy and areas (n,) of masks as text, each of one or several polygons; of others not finite."""
    if not (COMPILED and hasattr(torch.ops.dimaskdino, "measured_polygons")):
        return _extents([_polygons(mask) for mask in masks])
    text, ends = bytearray().join(masks), np.cumsum([0, *map(len, masks)])[1:]
    if not text:
        return np.zeros((4, 0)), np.zeros(0)
    measured = torch.ops.dimaskdino.measured_polygons(torch.frombuffer(text, dtype=torch.uint8), torch.from_numpy(ends))
    return measured.numpy().T[:4], measured.numpy().T[4]


def _polygons(mask: bytes) -> list[list[float]]:
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
