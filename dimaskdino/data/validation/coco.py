"""Reading a COCO file, and the rules for its lists of images, categories and annotations."""

import functools
import gc
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from dimaskdino.data.validation.rules import MOST_PIXELS, Json, Level, Problem
from dimaskdino.errors import DatasetError

UNLISTED = "image_id: not among the file's images"

# Keys that every entry needs, and their types.
_NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "categories": {"id": (int, str), "name": (str,)},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": (int, str, float)},
}

_TYPE_NAMES = {int: "a whole number", str: "text", float: "a number"}

Found = tuple[str, Problem]  # where, and what


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        DatasetError: if it cannot be read, is not valid JSON, or is nested too deep.
    """
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects and no cycles: collecting takes longer than parsing
    try:
        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4))
        with open(path, encoding=encoding) as file:
            return json.load(file)
    except RecursionError:
        raise DatasetError(f"Annotation file {path} is nested too deep to be a COCO file; export it again.") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"Annotation file {path} is not valid JSON ({error}); export it again.") from error
    finally:
        if collecting:
            gc.enable()


def read_coco(path: str) -> Json:
    """Read a COCO file whose lists have the form that every other check and reader relies on.

    The last files stay in memory until :func:`forget_files`, so that a job parses a file of hundreds of megabytes once
    for the check and the loader.

    Raises:
        DatasetError: naming the first entry that cannot be used.
    """
    return _read_coco(str(path), os.stat(path).st_mtime_ns)


def forget_files() -> None:
    """Free what :func:`read_coco` keeps."""
    _read_coco.cache_clear()


@functools.lru_cache(maxsize=2)
def _read_coco(path: str, modified_ns: int) -> Json:
    coco = read_json(path)
    try:
        _check_structure(coco)
    except ValueError as error:
        raise DatasetError(
            f"Annotation file {path} is not in COCO's format: {error}. It needs images (id, file_name, height, width), "
            "categories (id, name) and, unless it is a test set, annotations (id, image_id, category_id)."
        ) from None
    return coco


def _check_structure(coco: Any) -> None:
    """Raise ValueError unless the lists hold dictionaries with usable ids, names and sizes."""
    if not isinstance(coco, dict):
        raise ValueError(f"it holds a {type(coco).__name__}, not a dictionary")
    for kind, types in _NEEDED.items():
        if kind != "annotations" or kind in coco:
            _check_entries(kind, coco.get(kind), types)
    if not coco["images"]:
        raise ValueError("it lists no image")
    for image in coco["images"]:
        if not 1 <= min(image["height"], image["width"]) <= max(image["height"], image["width"]) <= MOST_PIXELS:
            sizes = f"{image['width']}x{image['height']}"
            raise ValueError(f"image {image['id']} ({image['file_name']}) is {sizes} px, not 1 to {MOST_PIXELS} a side")
    for kind in ("images", "categories"):
        if len({isinstance(entry["id"], str) for entry in coco[kind]}) > 1:
            raise ValueError(f"some ids of {kind} are numbers and some are text; write all in one way")


def _check_entries(kind: str, entries: Any, types: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        hint = "; remove the key for a test set" if kind == "annotations" else ""
        raise ValueError(f'"{kind}" is {entries!r:.40}, not a list of dictionaries{hint}')
    for position, entry in enumerate(entries):
        for key, wanted in types.items():
            if not isinstance(entry.get(key), wanted) or isinstance(entry[key], bool):
                which = f"number {position} (counted from 0) of {kind}, with id {entry.get('id')!r:.40},"
                names = " or ".join(_TYPE_NAMES[each] for each in wanted)
                raise ValueError(f"{which} has the {key} {entry.get(key)!r:.40}, not {names}")


def listing_problems(coco: Json, path: str, registered: list[str] | None) -> Iterator[Found]:
    """What is wrong with the lists of a COCO file, apart from its objects.

    Args:
        coco: what :func:`read_coco` returns.
        path: of the file.
        registered: class names that the dataset is registered with, if any.
    """
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
    for value, _, _ in _repeated(coco["images"], "file_name"):
        yield value, Problem("image file_name: listed more than once", Level.NOTE)
    annotations = coco.get("annotations", [])
    # COCO 2014's minival files list some annotations twice, which detectron2 lets pass.
    level = Level.NOTE if "minival" in path else Level.REFUSED
    for value, _, _ in _repeated(annotations, "id"):
        problem = Problem("annotation id: used more than once", level, "", "number the annotations anew")
        yield f"annotation {value}", problem
    yield from _unlisted(annotations, {image["id"] for image in coco["images"]})


def _unlisted(annotations: list[Json], images: set[Any]) -> Iterator[Found]:
    """Annotations of images that the file does not list."""
    as_text = None
    for annotation in annotations:
        image_id = annotation["image_id"]
        if image_id in images:
            continue
        as_text = {str(value) for value in images} if as_text is None else as_text
        where = f"annotation {annotation['id']} of image id {image_id!r:.40}"
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


def _repeated(entries: Iterable[Json], key: str) -> Iterator[tuple[Any, Json, Json]]:
    """Every value of ``key`` that occurs again, with the first entry that has it and one that has it again."""
    entries = list(entries)
    if len({entry[key] for entry in entries}) == len(entries):
        return
    first: dict[Any, Json] = {}
    again: dict[Any, Json] = {}
    for entry in entries:
        if first.setdefault(entry[key], entry) is not entry:
            again.setdefault(entry[key], entry)
    yield from ((value, first[value], entry) for value, entry in again.items())


def annotations_by_image(coco: Json) -> list[tuple[Json, list[Json]]]:
    """Every image of a COCO file with its annotations, in the order of the image ids."""
    grouped: dict[Any, list[Json]] = {image["id"]: [] for image in coco["images"]}
    nowhere: list[Json] = []
    for annotation in coco.get("annotations", ()):
        grouped.get(annotation["image_id"], nowhere).append(annotation)
    images = {image["id"]: image for image in coco["images"]}
    return [(images[key], grouped[key]) for key in sorted(images)]


def category_names(coco: Json) -> dict[Any, str]:
    """Category id -> class name, in the order of the class indices."""
    return {category["id"]: category["name"] for category in sorted(coco["categories"], key=lambda each: each["id"])}
