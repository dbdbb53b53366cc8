"""Checks of images and annotations in detectron2's format, as a registered function lists them."""

from typing import Any, TypeGuard

import numpy as np
from detectron2.structures import BoxMode

from dimaskdino.data.annotation_checks import box_complaint, flag_complaint, is_dropped, mask_complaint
from dimaskdino.errors import DatasetError

Json = dict[str, Any]

MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def check_entries(
    name: str, entries: list[Json], num_classes: int, *, trained: bool, tested: bool, scored: bool
) -> None:
    """Check what training and evaluation take for granted.

    Args:
        name: of the dataset.
        entries: its images.
        num_classes: category ids must lie in [0, num_classes).
        trained: whether it is trained on.
        tested: whether its images are predicted.
        scored: whether predictions are compared with the annotations of these entries, and not with those of a file.

    Raises:
        DatasetError: naming the first image or annotation that will not do.
    """
    files: dict[Any, str] = {}
    for position, entry in enumerate(entries):
        _check_image(entry, f"Image number {position}, counted from 0, of dataset {name}", tested=tested, scored=scored)
        for index, annotation in enumerate(entry.get("annotations", ()) if trained or scored else ()):
            complaint = _complaint(annotation, entry, num_classes, scored=scored)
            if complaint:
                which = annotation.get("id", f"number {index}, counted from 0,")
                raise DatasetError(f"Annotation {which} of {entry['file_name']} (dataset {name}) {complaint}.")
        if not tested:
            continue
        if entry["image_id"] in files:
            both = f"{files[entry['image_id']]} and {entry['file_name']}"
            raise DatasetError(f"Dataset {name}: {both} have the image_id {entry['image_id']!r}; give each its own.")
        files[entry["image_id"]] = entry["file_name"]


def _check_image(entry: Json, where: str, *, tested: bool, scored: bool) -> None:
    if not isinstance(entry.get("file_name"), str):
        raise DatasetError(f"{where} has the file_name {entry.get('file_name')!r:.40}; give its path as text.")
    where = f"{where} ({entry['file_name']})"
    if tested and not isinstance(entry.get("image_id"), int | str):
        raise DatasetError(
            f"{where} has the image_id {entry.get('image_id')!r:.40}; give each image a number or a text."
        )
    sides = {key: entry.get(key) for key in ("height", "width") if scored or key in entry}
    for key, value in sides.items():
        if not (_is_whole(value) and value > 0):
            raise DatasetError(f"{where} has the {key} {value!r:.40}; give it in whole pixels.")
    annotations = entry.get("annotations", [])
    if not (isinstance(annotations, list) and all(isinstance(annotation, dict) for annotation in annotations)):
        raise DatasetError(f"{where} has annotations that are no list of dictionaries; leave the key out for none.")


def _complaint(annotation: Json, entry: Json, num_classes: int, *, scored: bool) -> str:
    return (
        _class_complaint(annotation, num_classes)
        or flag_complaint(annotation)
        or _box_complaint(annotation, scored=scored)
        or _mask_complaint(annotation, entry, scored=scored)
    )


def _class_complaint(annotation: Json, num_classes: int) -> str:
    label = annotation.get("category_id")
    if _is_whole(label) and 0 <= label < num_classes:
        return ""
    return f"has the category_id {label!r:.40}; classes are numbered from 0 to {num_classes - 1}, as in thing_classes"


def _box_complaint(annotation: Json, *, scored: bool) -> str:
    if not scored:  # training makes its boxes from the masks
        return ""
    complaint = box_complaint(annotation, scored=True)
    if complaint:
        return complaint
    mode = annotation.get("bbox_mode")
    if mode not in MODES:
        return f"has the bbox_mode {mode!r}; give detectron2's BoxMode.XYXY_ABS or BoxMode.XYWH_ABS"
    left, top, right, bottom = BoxMode.convert(list(annotation["bbox"]), BoxMode(mode), BoxMode.XYXY_ABS)
    if right < left or bottom < top:
        return f"has the box {list(annotation['bbox'])}, of negative width or height as {BoxMode(mode).name}"
    return ""


def _mask_complaint(annotation: Json, entry: Json, *, scored: bool) -> str:
    mask = annotation.get("segmentation")
    if isinstance(mask, np.ndarray):
        return "has an array as segmentation; give pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))"
    # Training reads the size of an image whose entry leaves it out from its file.
    size = (entry["height"], entry["width"]) if "height" in entry and "width" in entry else None
    complaint = mask_complaint(annotation, size, scored=scored)
    if complaint or not isinstance(mask, list) or (annotation.get("iscrowd", 0) and not scored):
        return complaint
    short = next((polygon for polygon in mask if is_dropped(polygon)), None)
    return "" if short is None else f"has a polygon of {len(short)} numbers, which needs at least three points x, y"


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
