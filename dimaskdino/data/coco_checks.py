"""Checks of an annotation file in COCO's format before detectron2 reads it, each with one clear line."""

import functools
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from dimaskdino.data.annotation_checks import box_complaint, flag_complaint, is_dropped, mask_complaint
from dimaskdino.errors import DatasetError

logger = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What the checks need of a dataset: class names by index, paths of its images, and whether it is labelled."""

    class_names: tuple[str, ...]
    images: tuple[str, ...]
    annotated: bool


@functools.lru_cache(maxsize=8)
def summarize_coco(json_file: str, image_root: str, modified_ns: int, *, scored: bool) -> Summary:
    """Check a COCO annotation file.

    Args:
        json_file: the file.
        image_root: folder of its images.
        modified_ns: when the file was changed; makes a changed one be read again.
        scored: whether predictions are compared with its annotations, which asks more of them than training does.

    Raises:
        DatasetError: naming what is wrong with it first.
    """
    try:
        coco = json.loads(Path(json_file).read_bytes())
        categories = {category["id"]: category["name"] for category in coco["categories"]}
        images = {image["id"]: image for image in coco["images"]}
        annotations = coco.get("annotations", [])
        if annotations is None:
            raise DatasetError(f'{json_file} has "annotations": null; write a list, or remove the key for a test set.')
        _check_categories(json_file, coco["categories"])
        _check_images(json_file, coco["images"])
        _check_annotations(json_file, annotations, categories)
        _check_objects(json_file, [each for each in annotations if each["image_id"] in images], images, scored=scored)
        class_names = tuple(categories[key] for key in sorted(categories))
        paths = tuple(os.path.join(image_root, images[key]["file_name"]) for key in sorted(images))
    except DatasetError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"Annotation file {json_file} is not in COCO's format ({type(error).__name__}: {error}); it needs images, "
            "categories and, but for a test set, annotations."
        ) from error
    if not images:
        raise DatasetError(f"Annotation file {json_file} lists no image.")
    return Summary(class_names=class_names, images=paths, annotated="annotations" in coco)


def _check_categories(json_file: str, categories: list[Json]) -> None:
    """Categories of one id, or of one name, would share a class or a row of the table by class."""
    for key in ("id", "name"):
        value, count = max(
            Counter(category[key] for category in categories).items(), key=itemgetter(1), default=("", 0)
        )
        if count > 1:
            raise DatasetError(f"{count} categories of {json_file} have the {key} {value!r}; give each its own.")


def _check_images(json_file: str, images: list[Json]) -> None:
    for image in images:
        if not isinstance(image["file_name"], str):
            raise DatasetError(f"Image {image['id']} of {json_file} has the file_name {image['file_name']!r:.40}.")
        missing = [key for key in ("height", "width") if type(image.get(key)) is not int or image[key] < 1]
        if missing:
            where = f"Image {image['id']} ({image['file_name']}) of {json_file}"
            raise DatasetError(f"{where} has no {' and no '.join(missing)} in whole pixels.")


def _check_annotations(json_file: str, annotations: list[Json], categories: dict[int, str]) -> None:
    for position, annotation in enumerate(annotations):
        missing = [key for key in ("id", "image_id", "category_id") if key not in annotation]
        if missing:
            raise DatasetError(
                f"Annotation {annotation.get('id', f'number {position}, counted from 0,')} of {json_file} has no "
                f"{' and no '.join(missing)}."
            )
        if annotation["category_id"] not in categories:
            raise DatasetError(
                f"Annotation {annotation['id']} of {json_file} has category id {annotation['category_id']}, "
                "which is not among the file's categories."
            )


def _check_objects(json_file: str, annotations: list[Json], images: dict[int, Json], *, scored: bool) -> None:
    """What detectron2, training and evaluation take for granted of the annotations of listed images."""
    dropped = []
    for annotation in annotations:
        image = images[annotation["image_id"]]
        complaint = (
            _ignore_complaint(annotation)
            or flag_complaint(annotation)
            or box_complaint(annotation, scored=scored)
            or _side_complaint(annotation, scored=scored)
            or mask_complaint(annotation, (image["height"], image["width"]), scored=scored)
        )
        if complaint:
            raise DatasetError(f"Annotation {annotation['id']} of {json_file} {complaint}.")
        dropped += [annotation["id"]] * _num_dropped_polygons(annotation)
    if dropped:
        where = "training, but not of the evaluation" if scored else "training"
        logger.warning(
            "%s: %d polygons with fewer than three points or an odd number of coordinates, the first in annotation %s, "
            "are left out of %s.",
            *(json_file, len(dropped), dropped[0], where),
        )
    ids = [annotation["id"] for annotation in annotations]
    # detectron2 knows that COCO 2014's minival files list annotations twice.
    if len(set(ids)) < len(ids) and "minival" not in json_file:
        twice = next(key for key, count in Counter(ids).items() if count > 1)
        raise DatasetError(f"Annotation id {twice} is used more than once in {json_file}; number the annotations anew.")


def _ignore_complaint(annotation: Json) -> str:
    if annotation.get("ignore", 0) != 0:
        return 'says "ignore", which detectron2 refuses: write "iscrowd": 1 to leave a region out, or remove the key'
    return ""


def _side_complaint(annotation: Json, *, scored: bool) -> str:
    if scored and min(annotation["bbox"][2:]) < 0:
        return (
            f"has the box {annotation['bbox']}, whose width or height is negative; COCO's boxes are x, y, width, height"
        )
    return ""


def _num_dropped_polygons(annotation: Json) -> int:
    mask = annotation.get("segmentation")
    return sum(map(is_dropped, mask)) if isinstance(mask, list) else 0
