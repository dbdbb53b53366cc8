"""Inspects a registered dataset from end to end: its annotation file, every image, every object."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dimaskdino.data.checks import find_dataset, has_coco_file
from dimaskdino.data.inspection_image import image_problems
from dimaskdino.data.parallel import Progress, no_progress, parallel_map
from dimaskdino.data.reports import Problem
from dimaskdino.errors import DatasetError

Json = dict[str, Any]

MOST_PIXELS = 2**20  # of a side: what is larger is a mistake, and may not fit into pycocotools' integers


@dataclass(frozen=True)
class Inspection:
    """A dataset in COCO's format and what is wrong with it.

    Attributes:
        coco: the annotation file's content.
        image_root: folder of the images.
        problems: everything that is wrong.
    """

    coco: Json
    image_root: str
    problems: list[Problem]

    def units(self) -> list[tuple[Json, list[Json]]]:
        """Every image with its annotations, in the file's order."""
        return _units(self.coco)


def inspect_dataset(name: str, *, num_workers: int = 0, progress: Progress = no_progress) -> Inspection:
    """Inspect a dataset that is registered with a COCO annotation file; makes what is made on first use.

    Args:
        name: of the dataset in detectron2's catalog.
        num_workers: processes that read images; 0 reads in this one.
        progress: passes the inspected images on and may draw a bar.

    Raises:
        DatasetError: if it is not registered, lacks its files, lists no image or is not in COCO's format at all.
    """
    metadata = find_dataset(name)
    if metadata.get("evaluator_type") != "coco" or not has_coco_file(metadata):
        raise DatasetError(f"Dataset {name} is not registered with a COCO annotation file, so it cannot be inspected.")
    coco = _read(Path(metadata.json_file))
    problems = [*_category_problems(coco, metadata.get("thing_classes")), *_listing_problems(coco)]
    units = _units(coco)
    check = partial(_inspect_image, metadata.image_root)
    for found in progress(parallel_map(check, units, num_workers=num_workers), total=len(units)):
        problems += found
    return Inspection(coco, metadata.image_root, problems)


def _inspect_image(image_root: str, unit: tuple[Json, list[Json]]) -> list[Problem]:
    return image_problems(*unit, image_root)


def _units(coco: Json) -> list[tuple[Json, list[Json]]]:
    grouped: dict[int, list[Json]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if annotation.get("image_id") in grouped:
            grouped[annotation["image_id"]].append(annotation)
    return [(image, grouped[image["id"]]) for image in coco["images"]]


def _read(path: Path) -> Json:
    try:
        coco = json.loads(path.read_bytes())
        for image in coco["images"]:
            _check_kinds("image", image, {"id": int, "file_name": str, "height": int, "width": int})
            if not 1 <= min(image["height"], image["width"]) <= max(image["height"], image["width"]) <= MOST_PIXELS:
                raise ValueError(f"{image['file_name']} is {image['width']}x{image['height']} pixels")
        for category in coco["categories"]:
            _check_kinds("category", category, {"id": int, "name": str})
        for annotation in coco.setdefault("annotations", []):  # a test set has none
            for key in ("id", "image_id", "category_id"):
                if isinstance(annotation.get(key), list | dict):
                    raise TypeError(f"an annotation's {key} is {annotation[key]!r:.60}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"Annotation file {path} is not in COCO's format ({type(error).__name__}: {error}); it needs "
            "images with id, file_name, height and width, categories with id and name and, but for a test set, "
            "annotations."
        ) from error
    if not coco["images"]:
        raise DatasetError(f"Annotation file {path} lists no image.")
    return coco


def _check_kinds(what: str, entry: Json, kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(entry[key], kind):
            raise TypeError(f"a{'n' * (what == 'image')} {what}'s {key} is {entry[key]!r:.60}")


def _category_problems(coco: Json, registered: list[str] | None) -> Iterator[Problem]:
    for key in ("id", "name"):
        for value in _more_than_once(category[key] for category in coco["categories"]):
            yield Problem(f"category {key} is used more than once", str(value))
    names = [category["name"] for category in sorted(coco["categories"], key=lambda category: category["id"])]
    if registered is not None and names != list(registered):
        yield Problem("categories are not the registered classes", f"{names}, registered: {list(registered)}")


def _listing_problems(coco: Json) -> Iterator[Problem]:
    """Doubles, and annotations of what is not listed."""
    images = {image["id"]: image["file_name"] for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    for key in ("id", "file_name"):
        for value in _more_than_once(image[key] for image in coco["images"]):
            yield Problem(f"image {key} is listed more than once", str(value))
    for annotation in coco["annotations"]:
        if not isinstance(annotation.get("id"), int | None):
            yield Problem("annotation id is not a whole number", repr(annotation["id"]))
    for value in _more_than_once(annotation.get("id") for annotation in coco["annotations"]):
        yield Problem("annotation id is missing or used more than once", str(value))
    seen: set[str] = set()
    for annotation in coco["annotations"]:
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        where = f"annotation {annotation.get('id')} of {images.get(image_id, f'image id {image_id}')}"
        if image_id not in images:
            yield Problem("annotation of an image that is not listed", where)
        if category_id not in categories:
            yield Problem("category that is not listed", f"{where}: {category_id}")
        content = json.dumps([image_id, category_id, annotation.get("segmentation"), annotation.get("bbox")])
        if content in seen:
            yield Problem("object is annotated more than once", where)
        seen.add(content)


def _more_than_once(values: Any) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1 or value is None]
