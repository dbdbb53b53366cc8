"""labelme's JSON files, one for each image: polygons, rectangles, circles, and masks."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dimaskdino.data.coco_file import Json
from dimaskdino.data.conversion.labels import Images, LabeledObject, Labels, Problems, box_around, of_classes, read_text
from dimaskdino.data.conversion.xml_files import Part, ellipse, grouped
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import Size


def read_labelme(source: Path, images: Images, classes: Sequence[str], problems: Problems) -> Labels:
    """The images of all JSON files below ``source``; shapes of one label and group_id are one object of many parts."""
    files = sorted(source.rglob("*.json"))
    if not files:
        raise DatasetError(f"{source} has no .json file.")
    found = []
    for file in files:
        try:
            text = read_text(file)
            content = json.loads(text)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise ValueError("it has no list of shapes, so it is not labelme's")
            image = images.read(_find(images, content, file), problems, str(file))
        except json.JSONDecodeError as error:
            problems.add(f"{file}, line {error.lineno}", f"not valid JSON ({error.msg})")
        except (ValueError, RecursionError) as error:
            problems.add(str(file), str(error))
        else:
            if image:
                parts = _parts(content["shapes"], file, text, image.size, problems)
                found.extend(problems.filled(image, grouped(parts, image.size), str(file)))
    return of_classes(found, classes, problems)


def _find(images: Images, content: Json, file: Path) -> Path:
    try:
        return images.find(str(content.get("imagePath") or file.stem))
    except ValueError:
        return images.find(file.stem)


def _parts(shapes: list[Any], file: Path, text: str, size: Size, problems: Problems) -> Iterator[Part]:
    starts = [match.start() for match in re.finditer(r'"label"\s*:', text)]
    for number, shape in enumerate(shapes):
        line = text.count("\n", 0, starts[number]) + 1 if len(starts) == len(shapes) else None
        where = f"{file}, " + (f"line {line}" if line else f"shape {number}, counted from 0")
        with problems.at(where):
            yield _object(shape, where, size), shape.get("group_id")


def _object(shape: Any, where: str, size: tuple[int, int]) -> LabeledObject:
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise ValueError("a shape without a label")
    if not isinstance(shape.get("group_id"), int | str | None):
        raise ValueError(f"the group_id {shape['group_id']!r:.40} is no number")
    label, kind = shape["label"], shape.get("shape_type") or "polygon"
    try:
        points = np.array(shape.get("points"), dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        raise ValueError(f"the points of {label!r} are not pairs of numbers") from None
    if kind == "polygon":
        return LabeledObject(label, where, polygons=[points.ravel().tolist()])
    if kind in ("rectangle", "circle", "mask") and len(points) != 2:
        raise ValueError(f"a {kind} has two points, not {len(points)}")
    if kind == "rectangle":
        return LabeledObject(label, where, box_around(points))
    if kind == "circle":
        radius = math.dist(*points)
        circle = ellipse(points[0, 0], points[0, 1], radius, radius)
        return LabeledObject(label, where, polygons=[circle.clip(0, (size[1], size[0])).ravel().tolist()])
    if kind == "mask":
        return LabeledObject(label, where, mask=_mask(shape, points, size))
    raise ValueError(f"shape_type {kind!r} has no area; draw a polygon, rectangle, circle, or mask")


def _mask(shape: Json, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask, whose picture covers the points' box with both its corners."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
            pixels = np.asarray(image) > 0
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"the mask of {shape['label']!r} is not a picture in base64 ({type(error).__name__})"
        ) from None
    left, top = (int(value) for value in points[0])
    height, width = pixels.shape[:2]
    if left < 0 or top < 0 or top + height > size[0] or left + width > size[1] or pixels.ndim != 2:
        raise ValueError(f"the mask of {shape['label']!r} lies outside the image of {size[1]}x{size[0]} px")
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = pixels
    return mask
