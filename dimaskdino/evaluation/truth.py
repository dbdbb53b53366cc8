"""A COCO file as ground truth, completed where COCO's evaluation would go wrong silently."""

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from dimaskdino.data.validation.coco import read_json
from dimaskdino.data.validation.rules import Level, Rules, has_mask, read_mask
from dimaskdino.errors import DatasetError

logger = logging.getLogger(__name__)

Json = dict[str, Any]


def read_truth(path: str | Path) -> COCO:
    """Read an annotation file in COCO's format; see :func:`complete_truth`."""
    return complete_truth(read_json(path), str(path))


def truth_of_entries(entries: list[Json], name: str, class_names: Sequence[str], category_ids: Sequence[Any]) -> COCO:
    """Ground truth from images in detectron2's format, as a registered function lists them.

    Args:
        entries: the images; annotations may hold lists or NumPy's arrays.
        name: of the dataset.
        class_names: by class index.
        category_ids: by class index.
    """
    keys = ("file_name", "height", "width")
    images = [{"id": entry["image_id"]} | {key: entry[key] for key in keys} for entry in entries]
    truth: Json = {
        "images": images,
        "categories": [{"id": key, "name": label} for key, label in zip(category_ids, class_names, strict=True)],
    }
    # Without any, predictions are written and not scored.
    if any("annotations" in entry for entry in entries):
        truth["annotations"] = [
            {
                "image_id": entry["image_id"],
                "category_id": category_ids[annotation["category_id"]],
                "bbox": _box_xywh_px(annotation),
                "iscrowd": int(annotation.get("iscrowd", 0)),
                **({"segmentation": _plain(annotation["segmentation"])} if has_mask(annotation) else {}),
            }
            for entry in entries
            for annotation in entry.get("annotations", ())
        ]
    return complete_truth(truth, name)


def _box_xywh_px(annotation: Json) -> list[float]:
    mode = BoxMode(annotation["bbox_mode"])  # a mode may be its number
    return [float(x) for x in BoxMode.convert(list(annotation["bbox"]), mode, BoxMode.XYWH_ABS)]


def _plain(segmentation: Any) -> Any:
    """Polygons as lists of Python's numbers, a compressed RLE as text, as they are in a file."""
    if isinstance(segmentation, list):
        return [[float(x) for x in polygon] for polygon in segmentation]
    counts = segmentation["counts"]
    return {**segmentation, "counts": counts.decode() if isinstance(counts, bytes) else counts}


def complete_truth(dataset: Json, source: str) -> COCO:
    """Index a dataset in COCO's format, which is changed.

    Annotations are numbered anew from 1, since evaluation takes the id 0, and in part negative numbers and text, for no
    match. Polygons without three points are left out, as in training. An area that is missing or not a number is taken
    from the mask, or from the box if there is no mask: faster-coco-eval would count every such object as small.

    Args:
        dataset: what a COCO file holds.
        source: the file or dataset, for the log.

    Raises:
        DatasetError: for an object that no evaluation can use.
    """
    truth = COCO()
    truth.dataset = dataset
    annotations = dataset.get("annotations", [])
    _check_objects(dataset, source)
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)  # pycocotools reads it of every object
        if isinstance(annotation.get("segmentation"), list) and (mask := read_mask(annotation["segmentation"], None)):
            annotation["segmentation"] = mask.polygons
    with quiet():
        truth.createIndex()
    without = [annotation for annotation in annotations if not _is_number(annotation.get("area"))]
    for annotation in without:
        annotation["area"] = _area(truth, annotation)
    if without:
        logger.info(
            "%d of %d annotations of %s have no area; that of their mask, or of their box if there is none, is used.",
            len(without),
            len(annotations),
            source,
        )
    return truth


def _check_objects(dataset: Json, source: str) -> None:
    """Refuse objects that pycocotools would crash at, or compare with nothing."""
    categories = {category["id"]: category["name"] for category in dataset["categories"]}
    rules = Rules(categories=categories, with_masks=False, scored=True, in_file=True)
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    for annotation in dataset.get("annotations", []):
        size = sizes.get(annotation["image_id"])
        for problem in rules.problems(annotation, size) if size else ():
            if problem.level is Level.REFUSED:
                which = f"Annotation {annotation.get('id', '')} of image {annotation['image_id']}"
                raise DatasetError(f"{which} in {source}: {problem}. `python tools/check_dataset.py NAME` lists all.")


def quiet() -> contextlib.AbstractContextManager[Any]:
    """The COCO API prints; results are logged by whoever asks for them."""
    return contextlib.redirect_stdout(io.StringIO())


def _area(truth: COCO, annotation: Json) -> float:
    """In square pixels."""
    if annotation.get("segmentation") and annotation["image_id"] in truth.imgs:
        return float(mask_util.area(truth.annToRLE(annotation)))
    _, _, width, height = annotation.get("bbox") or (0, 0, 0, 0)
    return float(width * height)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
