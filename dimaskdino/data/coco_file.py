"""Reading a COCO file, and the form that its lists need for anything else to be said of them."""

import contextlib
import functools
import gc
import json
import mmap
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from dimaskdino.errors import DatasetError

Json = dict[str, Any]

MOST_PIXELS = 2**16  # of a side

# Keys that every entry needs, and their types.
_NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "categories": {"id": (int, str), "name": (str,)},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": (int, str, float)},
}

_TYPE_NAMES = {int: "a whole number", str: "text", float: "a number"}


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Pause Python's search for cycles: among millions of objects without any, it takes longer than the work."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@without_collecting()
def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        DatasetError: if it cannot be read, is not valid JSON, or is nested too deep.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise DatasetError(f"Annotation file {path} is not a regular file; give the path of a JSON file.")
    try:
        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4))
            if encoding == "utf-8" and (found := _read_quickly(file)) is not None:
                return found
        with open(path, encoding=encoding) as file:
            return json.load(file)
    except RecursionError:
        raise DatasetError(f"Annotation file {path} is nested too deep to be a COCO file; export it again.") from None
    except OSError as error:
        raise DatasetError(f"Annotation file {path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise DatasetError(f"Annotation file {path} is not valid JSON ({error}); export it again.") from error


def _read_quickly(file: BinaryIO) -> Any:
    """What a file in UTF-8 holds; None where Python's own reader is to say what is wrong, or to allow it (NaN)."""
    try:
        # Pages of the system, not memory of this process, which might keep it.
        return msgspec.json.decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError, RecursionError):
        return None


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


@functools.lru_cache(maxsize=8)  # a job's datasets
def _read_coco(path: str, modified_ns: int) -> Json:
    coco = read_json(path)
    _name_images_by_url(coco)
    try:
        _check_structure(coco)
    except ValueError as error:
        raise DatasetError(
            f"Annotation file {path} is not in COCO's format: {error}. It needs images (id, file_name, height, width), "
            "categories (id, name) and, unless it is a test set, annotations (id, image_id, category_id)."
        ) from None
    return coco


def _name_images_by_url(coco: Any) -> None:
    """Give images without a file_name the last folder and name of their coco_url, as LVIS means them."""
    images = coco.get("images") if isinstance(coco, dict) else None
    for image in images if isinstance(images, list) else ():
        if isinstance(image, dict) and "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])


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
    for key, wanted in types.items():
        if {type(entry.get(key)) for entry in entries} <= set(wanted):
            continue
        position = next(index for index, entry in enumerate(entries) if type(entry.get(key)) not in wanted)
        entry = entries[position]
        names = " or ".join(_TYPE_NAMES[each] for each in wanted if each is not int or float not in wanted)
        which = f"number {position} (counted from 0) of {kind}, with id {entry.get('id')!r:.40},"
        raise ValueError(f"{which} has the {key} {entry.get(key)!r:.40}, not {names}")


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
