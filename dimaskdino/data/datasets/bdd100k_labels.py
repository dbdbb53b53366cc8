"""From the labels of one BDD100K image (a bitmask, or a Scalabel frame with RLE or polygons) to COCO annotations.

The three official kinds of labels hold the same masks and give the same annotations. Polygons are drawn pixel by pixel
as the official bitmasks are.

Source: the label format on doc.bdd100k.com and the official toolkit (PyPI: bdd100k 1.0.1, scalabel 0.3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from pycocotools import mask as mask_util

from dimaskdino.data.datasets.bdd100k import CLASSES
from dimaskdino.data.label_maps import labels_present
from dimaskdino.structures.rle_masks import Rle, Size, checked_rle, coco_shape

PATH_CODES = {"L": Path.LINETO, "C": Path.CURVE4}
DOTS_PER_INCH = 72  # any: only widths of lines depend on it, and none are drawn
Json = dict[str, Any]
# Bits of a bitmask's second channel; the names are those of a Scalabel label's attributes.
ATTRIBUTE_BITS = {"truncated": 8, "occluded": 4, "crowd": 2, "ignored": 1}
OTHER_NAMES = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}
# Labels of these names are ignored regions of a class.
IGNORED_NAMES = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}


def painter(size: Size) -> Callable[[list[Path]], np.ndarray]:
    """What gives the pixels (H, W) bool that any of some outlines covers.

    As in the official bitmasks, corners are rounded to whole pixels and a pixel belongs to a polygon that touches it.
    """
    height, width = size
    renderer, upright = RendererAgg(width, height, DOTS_PER_INCH), Affine2D().scale(1, -1).translate(0, height)
    look = renderer.new_gc()
    look.set_antialiased(False)
    look.set_snap(True)
    look.set_linewidth(0)

    def paint(outlines: list[Path]) -> np.ndarray:
        renderer.clear()
        for each in outlines:
            renderer.draw_path(look, each, upright, (1.0, 1.0, 1.0))
        return np.asarray(renderer.buffer_rgba())[..., 3] > 0

    return paint


def outline(part: dict[str, Any]) -> Path:
    """The closed path of one part of a label's ``poly2d``.

    That has ``vertices`` (N, 2) in pixels and ``types``, a letter for each: L for a corner; C begins a cubic Bezier
    curve: that vertex and the next are its control points, and the one after them, or the first, is its end. Raises
    ValueError if it is malformed or has fewer than three vertices.
    """
    try:
        vertices = np.array(part["vertices"], dtype=np.float64).reshape(-1, 2)
        codes = [PATH_CODES[letter] for letter in part["types"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("malformed") from None
    if len(vertices) < 3 or len(codes) != len(vertices) or not np.isfinite(vertices).all():
        raise ValueError("malformed or of fewer than three points")
    return Path(np.concatenate((vertices, vertices[:1])), [Path.MOVETO, *codes[1:], Path.LINETO])


@dataclass
class ImageLabels:
    """COCO annotations of one image, without ids, and the kind of each problem met."""

    annotations: list[Json] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def labels_of_bitmask(bitmask: np.ndarray) -> ImageLabels:
    """One annotation per instance of a bitmask, by instance id.

    The bitmask (H, W, 4) uint8 holds category id, attribute bits, and the high and low byte of the instance id.

    Deviation: where the pixels of one instance id differ in category or attributes, the toolkit's evaluation stops;
    here, as in its conversion, they become objects of their own.
    """
    labels = ImageLabels()
    codes = np.ascontiguousarray(bitmask).view(">u4")[..., 0].astype(np.uint32)
    found = [(code & 0xFFFF, code >> 24, (code >> 16) & 0xFF, code) for code in labels_present(codes)]
    seen: set[int] = set()
    for instance_id, category_id, bits, code in sorted(found):
        if category_id == 0 and instance_id == 0:
            continue
        if not 1 <= category_id <= len(CLASSES):
            labels.problems.append(f"object left out: category id {category_id} is not 1 to {len(CLASSES)}")
        elif instance_id == 0:
            labels.problems.append("object left out: instance id 0, which is the background's")
        else:
            if instance_id in seen:
                labels.problems.append("object kept apart: its instance id also has another category or attributes")
            seen.add(instance_id)
            attributes = {name: bool(bits & bit) for name, bit in ATTRIBUTE_BITS.items()}
            labels.annotations.append(_annotation(category_id, attributes, _encode(codes == code), instance_id))
    return labels


def labels_of_frame(frame: Json, size: Size) -> ImageLabels:
    """One annotation per usable label of a Scalabel frame, in its order; polygons cover those of the labels before."""
    labels = ImageLabels()
    drawn = _draw_polygons(frame.get("labels") or (), size, labels.problems)
    for index, label in enumerate(frame.get("labels") or ()):
        category_id, attributes = _class_and_attributes(label)
        if category_id is None:
            labels.problems.append(f"object left out: category {label.get('category', '')!r} has no class")
            continue
        try:
            rle = _mask_of_label(label, drawn == index, size)
        except ValueError as error:
            labels.problems.append(f"object left out: {error}")
        else:
            labels.annotations.append(_annotation(category_id, attributes, rle, label.get("id")))
    return labels


def _mask_of_label(label: Json, drawn: np.ndarray, size: Size) -> Rle:
    """The RLE of a label, or of the pixels (H, W) that its polygons have; ValueError says why there is none."""
    if label.get("rle"):
        rle = checked_rle(label["rle"], size)
    elif label.get("poly2d"):
        rle = _encode(drawn)
    else:
        raise ValueError("neither RLE nor polygons")
    if mask_util.area(rle) == 0:
        raise ValueError("a mask without a pixel, or all of them covered")
    return rle


def _class_and_attributes(label: Json) -> tuple[int | None, dict[str, bool]]:
    """A label's category id (None if it has no class), and its attributes."""
    given = label.get("attributes") or {}
    attributes = {name: bool(given.get(name)) for name in ATTRIBUTE_BITS}
    name = label.get("category", "")
    name = OTHER_NAMES.get(name, name)
    if name in IGNORED_NAMES:
        name, attributes["ignored"] = IGNORED_NAMES[name], True
    return (CLASSES.index(name) + 1 if name in CLASSES else None), attributes


def _draw_polygons(labels: Any, size: Size, problems: list[str]) -> np.ndarray:
    """Index (H, W) int64 of the label that each pixel belongs to, or -1."""
    owner = np.full(size, -1)
    paint: Callable[[list[Path]], np.ndarray] | None = None
    for index, label in enumerate(labels):
        outlines = []
        if _class_and_attributes(label)[0] is None:
            continue
        for part in label.get("poly2d") or ():
            try:
                outlines.append(outline(part))
            except ValueError as error:
                problems.append(f"polygon left out: {error}")
        if outlines:
            paint = paint or painter(size)
            owner[paint(outlines)] = index
    return owner


def _encode(mask: np.ndarray) -> Rle:
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def _annotation(category_id: int, attributes: dict[str, bool], rle: Rle, source_id: Any) -> Json:
    """A COCO annotation. COCO's evaluation and the toolkit's ignore one kind of region, ``iscrowd``."""
    return {
        "category_id": category_id,
        "iscrowd": int(attributes["crowd"] or attributes["ignored"]),
        **coco_shape(rle),
        **{name: int(attributes[name]) for name in ATTRIBUTE_BITS},
        "source_id": source_id,
    }
