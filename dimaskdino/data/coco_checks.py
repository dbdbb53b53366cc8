"""Checks of an annotation file in COCO's format before detectron2 reads it, each with one clear line."""

import functools
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dimaskdino.data.rle import checked_rle
from dimaskdino.errors import DatasetError


@dataclass(frozen=True)
class Summary:
    """What the checks need of a dataset: class names by index, the first image's path, and whether it is labelled."""

    class_names: tuple[str, ...]
    first_image: str
    annotated: bool = True


@functools.lru_cache(maxsize=8)
def summarize_coco(json_file: str, image_root: str, modified_ns: int) -> Summary:
    """Read a COCO annotation file; ``modified_ns`` makes a changed file be read again."""
    try:
        coco = json.loads(Path(json_file).read_bytes())
        categories = {category["id"]: category["name"] for category in coco["categories"]}
        images = {image["id"]: image["file_name"] for image in coco["images"]}
        given = coco.get("annotations")
        annotations = [] if given is None else given
        _check_images(json_file, coco["images"])
        _check_annotations(json_file, annotations, categories)
        _check_for_detectron2(json_file, [each for each in annotations if each["image_id"] in images])
        class_names = tuple(categories[key] for key in sorted(categories))
        first_image = os.path.join(image_root, images[min(images)]) if images else ""
    except DatasetError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"Annotation file {json_file} is not in COCO's format ({type(error).__name__}: {error}); it needs images, "
            "categories and, but for a test set, annotations."
        ) from error
    if not images:
        raise DatasetError(f"Annotation file {json_file} lists no image.")
    return Summary(class_names=class_names, first_image=first_image, annotated=given is not None)


def _check_images(json_file: str, images: list[dict]) -> None:
    for image in images:
        if not isinstance(image["file_name"], str):
            raise DatasetError(f"Image {image['id']} of {json_file} has the file_name {image['file_name']!r:.40}.")
        missing = [key for key in ("height", "width") if not isinstance(image.get(key), int | float)]
        if missing:
            where = f"Image {image['id']} ({image['file_name']}) of {json_file}"
            raise DatasetError(f"{where} has no {' and no '.join(missing)} in pixels.")


def _check_annotations(json_file: str, annotations: list[dict], categories: dict[int, str]) -> None:
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


def _check_for_detectron2(json_file: str, annotations: list[dict]) -> None:
    """What detectron2 takes for granted of the annotations of listed images while it loads them."""
    for annotation in annotations:
        complaint = _complaint(annotation)
        if complaint:
            raise DatasetError(f"Annotation {annotation['id']} of {json_file} {complaint}.")
    ids = [annotation["id"] for annotation in annotations]
    # detectron2 knows that COCO 2014's minival files list annotations twice.
    if len(set(ids)) < len(ids) and "minival" not in json_file:
        twice = next(key for key, count in Counter(ids).items() if count > 1)
        raise DatasetError(f"Annotation id {twice} is used more than once in {json_file}; number the annotations anew.")


def _complaint(annotation: dict) -> str:
    """What keeps detectron2 from loading an annotation; "" if nothing does."""
    if annotation.get("ignore", 0) != 0:
        return 'says "ignore", which detectron2 refuses: write "iscrowd": 1 to leave a region out, or remove the key'
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"has iscrowd {annotation['iscrowd']!r:.40}, which is neither 0 nor 1"
    box = annotation.get("bbox", (0,))
    if not box or not isinstance(box, list | tuple):
        return f"has the box {box!r:.40}, which is no list of four numbers"
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        return _rle_complaint(mask)
    if mask and not (isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)):
        return "has a segmentation that is neither a list of polygons, each a list of numbers, nor an RLE"
    return ""


def _rle_complaint(mask: dict) -> str:
    """As :func:`_complaint`; detectron2 unpacks lists of run lengths at once."""
    try:
        if not isinstance(mask["counts"], str):
            height, width = mask["size"]
            checked_rle(mask, (height, width))
    except (KeyError, TypeError, ValueError):
        return "has a malformed RLE; it needs size, [height, width], and counts, whose sum is their product"
    return ""
