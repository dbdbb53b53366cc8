"""The rules for the lists of images, categories and annotations of a COCO file."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dimaskdino.data.coco_file import Json, column
from dimaskdino.data.validation.rules import Level, Problem

UNLISTED = "image_id: not among the file's images"

Found = tuple[str, Problem]  # where, and what


def listing_problems(coco: Json, path: str, registered: list[str] | None) -> Iterator[Found]:
    """What is wrong with the lists of a COCO file, registered with these classes if any, apart from its objects."""
    for key in ("id", "name"):
        for value, first, _ in _repeated(coco["categories"], key):
            problem = Problem(f"category {key}: used more than once", Level.REFUSED, "", "give each category its own")
            yield f"category {key} {value!r}, first of {first['name']!r}", problem
    names = [category["name"] for category in sorted(coco["categories"], key=lambda category: category["id"])]
    if registered is not None and names != registered:
        yield os.path.basename(path), _class_problem(names, registered)
    for value, first, second in _repeated(coco["images"], "id"):
        remedy = "number the images anew, as after merging files, or labels land on other images"
        both = f"{first['file_name']} and {second['file_name']}"
        yield f"image id {value!r} of {both}", Problem("image id: used more than once", Level.REFUSED, "", remedy)
    for value, _, _ in _repeated(coco["images"], "file_name", os.path.normpath):
        yield value, Problem("image file_name: listed more than once", Level.NOTE)
    annotations = coco.get("annotations", [])
    # COCO 2014's minival files list some annotations twice, which detectron2 lets pass.
    level = Level.NOTE if "minival" in path else Level.REFUSED
    for value, _, _ in _repeated(annotations, "id"):
        problem = Problem("annotation id: used more than once", level, "", "number the annotations anew")
        yield f"annotation {value}", problem
    yield from _unlisted(annotations, {image["id"] for image in coco["images"]})


def _unlisted(annotations: Sequence[Json], images: set[Any]) -> Iterator[Found]:
    """Annotations of images that the file does not list."""
    as_text, ids = None, column(annotations, "id")
    for index, image_id in enumerate(column(annotations, "image_id").tolist()):
        if image_id in images:
            continue
        as_text = {str(value) for value in images} if as_text is None else as_text
        where = f"annotation {ids[index]} of image id {image_id!r:.40}"
        if str(image_id) in as_text:
            remedy = "write ids of images and image_id both as numbers or both as text"
            yield where, Problem("image_id: the id is of another type", Level.REFUSED, f"{image_id!r:.40}", remedy)
        else:
            yield where, Problem(UNLISTED, Level.NOTE)


def _class_problem(names: list[str], registered: list[str]) -> Problem:
    index = next((i for i, pair in enumerate(zip(names, registered, strict=False)) if len({*pair}) > 1), None)
    if index is None:
        detail = f"{len(names)} categories, registered with {len(registered)} classes"
    else:
        detail = f"class {index} is {names[index]!r:.40}, registered as {registered[index]!r:.40}"
    remedy = "register this file under a name of its own"
    return Problem("categories: not the registered classes", Level.REFUSED, detail, remedy)


def _repeated(
    entries: Sequence[Json], key: str, plain: Callable[[Any], Any] | None = None
) -> Iterator[tuple[Any, Json, Json]]:
    """Every value of ``key``, or what ``plain`` makes of it, that occurs again, with its first and its next entry."""
    values = column(entries, key)
    values = values if plain is None else np.fromiter(map(plain, values), dtype=object)
    if len({*values}) == len(values) if values.dtype == object else np.diff(np.sort(values)).all():
        return
    first: dict[Any, Json] = {}
    again: dict[Any, Json] = {}
    for value, entry in zip(values.tolist(), entries, strict=True):
        if first.setdefault(value, entry) is not entry:
            again.setdefault(value, entry)
    yield from ((value, first[value], entry) for value, entry in again.items())
