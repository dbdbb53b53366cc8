"""Checks of an annotation file in COCO's format before detectron2 reads it, each with one clear line."""

import functools
import json
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from dimaskdino.data.rle import Size, checked_rle
from dimaskdino.errors import DatasetError

logger = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What the checks need of a dataset: class names by index, the first image's path, and whether it is labelled."""

    class_names: tuple[str, ...]
    first_image: str
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
        first_image = os.path.join(image_root, images[min(images)]["file_name"]) if images else ""
    except DatasetError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"Annotation file {json_file} is not in COCO's format ({type(error).__name__}: {error}); it needs images, "
            "categories and, but for a test set, annotations."
        ) from error
    if not images:
        raise DatasetError(f"Annotation file {json_file} lists no image.")
    return Summary(class_names=class_names, first_image=first_image, annotated="annotations" in coco)


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
            _flag_complaint(annotation)
            or _box_complaint(annotation, scored=scored)
            or _mask_complaint(annotation, (image["height"], image["width"]), scored=scored)
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


def _flag_complaint(annotation: Json) -> str:
    """What is wrong with an annotation's flags; "" if nothing is, as with the other complaints."""
    if annotation.get("ignore", 0) != 0:
        return 'says "ignore", which detectron2 refuses: write "iscrowd": 1 to leave a region out, or remove the key'
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"has iscrowd {annotation['iscrowd']!r:.40}, which is neither 0 nor 1"
    return ""


def _box_complaint(annotation: Json, *, scored: bool) -> str:
    """Training makes its boxes from the masks; only the evaluation needs those of the file."""
    if "bbox" not in annotation:
        return "has no bbox, which the evaluation needs" if scored else ""
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and _are_finite(box)):
        return f"has the box {box!r:.40}, which is no list of four finite numbers"
    return ""


def _mask_complaint(annotation: Json, size: Size, *, scored: bool) -> str:
    mask = annotation.get("segmentation")
    if not mask:
        # Training never looks at crowd regions.
        needed = scored or not annotation.get("iscrowd", 0)
        return "has no segmentation; give it polygons or an RLE, or remove it" if needed else ""
    if isinstance(mask, dict):
        return _rle_complaint(mask, size)
    if not (isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)):
        return "has a segmentation that is neither a list of polygons, each a list of numbers, nor an RLE"
    if not all(map(_are_finite, mask)):
        return "has a polygon with something else than finite numbers"
    if scored and _is_dropped(mask[0]):
        # pycocotools takes the kind of a whole segmentation from its first list; four numbers are a box there.
        return f"has a polygon of {len(mask[0])} numbers, which needs at least three points x, y to be evaluated on"
    return ""


def _rle_complaint(mask: Json, size: Size) -> str:
    try:
        checked_rle(mask, size)
    except ValueError as error:
        return f"has {error}; encode the mask again at the image's size (height x width {size[0]}x{size[1]})"
    if not all(type(side) is int for side in mask["size"]):
        return f"has an RLE of the size {mask['size']}, which must be whole numbers"
    return ""


def _num_dropped_polygons(annotation: Json) -> int:
    mask = annotation.get("segmentation")
    return sum(map(_is_dropped, mask)) if isinstance(mask, list) else 0


def _is_dropped(polygon: list[float]) -> bool:
    """Whether detectron2 leaves a polygon out with no word, or with it the whole object if it has no other."""
    return len(polygon) < 6 or len(polygon) % 2 == 1


def _are_finite(numbers: list[Any]) -> bool:
    """Whether a list holds finite numbers alone; one sum is faster than a look at each."""
    try:
        return math.isfinite(sum(numbers))
    except (TypeError, OverflowError):
        return False
