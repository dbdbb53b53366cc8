"""Ground truth in the form that the evaluation reads: COCO's format with ids counted from 1."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hotcoco
from detectron2.structures import BoxMode

from dimaskdino.data.datasets.registration import CATEGORY_LISTS
from dimaskdino.data.json_file import Json, read_json
from dimaskdino.data.validation.rules import Level, Rules, has_mask, read_mask
from dimaskdino.errors import DatasetError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """Ground truth of a dataset. Its own ids may be of any kind; the numbers here follow their order."""

    coco: hotcoco.COCO  # the images, categories, and annotations, with ids counted from 1
    image_numbers: dict[Any, int]  # number by the dataset's image id
    category_numbers: dict[Any, int]  # number by the dataset's category id
    annotations: list[Json] | None  # those in ``coco``; None if the dataset has no annotations and so cannot be scored

    @cached_property
    def has_masks(self) -> bool:
        """Whether every annotation has a mask, so that masks can be scored."""
        return all(annotation.get("segmentation") for annotation in self.annotations or ())

    @cached_property
    def objects(self) -> Counter[tuple[int, int]]:
        """Objects, without crowd regions, by the numbers of image and category."""
        objects = (each for each in self.annotations or () if not each["iscrowd"])
        return Counter((each["image_id"], each["category_id"]) for each in objects)


def read_truth(path: str | Path) -> Truth:
    """Read an annotation file in COCO's format; see :func:`make_truth`."""
    return make_truth(read_json(path), str(path))


def truth_of_entries(entries: list[Json], name: str, class_names: Sequence[str], category_ids: Sequence[Any]) -> Truth:
    """Make ground truth of images in detectron2's format, as a registered function lists them."""
    images = [{"id": entry["image_id"], "height": entry["height"], "width": entry["width"]} for entry in entries]
    dataset: Json = {
        "images": images,
        "categories": [{"id": key, "name": label} for key, label in zip(category_ids, class_names, strict=True)],
    }
    # Without any, predictions are written and not scored.
    if any("annotations" in entry for entry in entries):
        dataset["annotations"] = [
            {
                "image_id": entry["image_id"],
                "category_id": category_ids[each["category_id"]],
                "bbox": [*map(float, BoxMode.convert([*each["bbox"]], BoxMode(each["bbox_mode"]), BoxMode.XYWH_ABS))],
                "iscrowd": int(each.get("iscrowd", 0)),
                **({"segmentation": _plain(each["segmentation"])} if has_mask(each) else {}),
            }
            for entry in entries
            for each in entry.get("annotations", ())
        ]
    return make_truth(dataset, name)


def make_truth(dataset: Json, source: str) -> Truth:
    """Renumber a dataset in COCO's format and fill in what annotations may lack.

    COCO's evaluation treats the annotation id 0 as "no match", and fast implementations read whole numbers alone.
    A missing area is that of the mask, or of the box where there is no mask; a missing ``iscrowd`` is 0. Annotations
    of images or categories that the dataset does not list are left out, as COCO's evaluation does.

    Raises:
        DatasetError: there are annotations, but none of a listed image and category; or an object that no evaluation
            can use.
    """
    _check_objects(dataset, source)
    images, categories = _numbers(dataset["images"]), _numbers(dataset["categories"])
    annotations = dataset.get("annotations")
    kept = None if annotations is None else _numbered(annotations, images, categories, source)
    plain: Json = {
        "images": [_plain_image(image, images[image["id"]], categories) for image in dataset["images"]],
        "categories": [
            {
                "id": categories[category["id"]],
                "name": str(category["name"]),
                **({"frequency": found} if (found := category.get("frequency")) in ("r", "c", "f") else {}),
            }
            for category in dataset["categories"]
        ],
        "annotations": kept or [],
    }
    coco = hotcoco.COCO(plain)
    without = [annotation for annotation in plain["annotations"] if annotation["area"] is None]
    if without:
        for annotation in without:
            annotation["area"] = _area_px2(coco, annotation)
        coco = hotcoco.COCO(plain)
        logger.info(
            "%d of %d annotations of %s have no area; the area of the mask, or of the box without a mask, stands in.",
            *(len(without), len(plain["annotations"]), source),
        )
    return Truth(coco, images, categories, kept)


def _plain_image(image: Json, number: int, categories: dict[Any, int]) -> Json:
    lists = {key: image[key] for key in CATEGORY_LISTS if key in image}
    known = {key: [categories[each] for each in listed if each in categories] for key, listed in lists.items()}
    return {"id": number, "height": image.get("height", 0), "width": image.get("width", 0), **known}


def _check_objects(dataset: Json, source: str) -> None:
    """Refuse objects that the evaluation would crash at, or compare with nothing."""
    categories = {category["id"]: category["name"] for category in dataset["categories"]}
    rules = Rules(categories=categories, with_masks=False, scored=True, in_file=True)
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"] if "height" in image}
    for annotation in dataset.get("annotations", []):
        size = sizes.get(annotation["image_id"])
        for problem in rules.problems(annotation, size) if size else ():
            if problem.level is Level.REFUSED:
                which = f"Annotation {annotation.get('id', '')} of image {annotation['image_id']}"
                raise DatasetError(f"{which} in {source}: {problem}. `python tools/check_dataset.py NAME` lists all.")


def _usable_mask(segmentation: Any) -> Any:
    """A mask without the polygons of fewer than three points, which training leaves out as well."""
    mask = read_mask(segmentation, None) if isinstance(segmentation, list) else None
    return mask.polygons if mask else segmentation


def _numbers(listed: Iterable[Json]) -> dict[Any, int]:
    """The place of each id in their order, from 1. Text comes after numbers."""
    ids = sorted({entry["id"] for entry in listed}, key=lambda value: (isinstance(value, str), value))
    return {value: number for number, value in enumerate(ids, start=1)}


def _numbered(annotations: list[Json], images: dict[Any, int], categories: dict[Any, int], source: str) -> list[Json]:
    listed = [a for a in annotations if a["image_id"] in images and a["category_id"] in categories]
    if annotations and not listed:
        first = annotations[0]
        raise DatasetError(
            f"{source}: none of the {len(annotations)} annotations can be scored. The first names image "
            f"{first['image_id']!r} and category {first['category_id']!r}; the file's images begin with "
            f"{next(iter(images), None)!r} and its categories with {next(iter(categories), None)!r}. Give annotations "
            "the ids that the file lists, of the same kind (text or number)."
        )
    if len(listed) < len(annotations):
        left_out = len(annotations) - len(listed)
        logger.warning("%s: %d annotations of unlisted images or categories are not scored.", source, left_out)
    return [
        {
            "id": number,
            "image_id": images[annotation["image_id"]],
            "category_id": categories[annotation["category_id"]],
            "bbox": annotation.get("bbox"),
            "area": annotation["area"] if _is_number(annotation.get("area")) else None,
            "iscrowd": int(annotation.get("iscrowd", 0)),
            **({"segmentation": _usable_mask(annotation["segmentation"])} if annotation.get("segmentation") else {}),
        }
        for number, annotation in enumerate(listed, start=1)
    ]


def _area_px2(coco: hotcoco.COCO, annotation: Json) -> float:
    if "segmentation" in annotation:
        return float(hotcoco.mask.area(coco.ann_to_rle(annotation)))
    width, height = annotation["bbox"][2:]
    return float(width * height)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(segmentation: Any) -> Any:
    """Polygons as lists of Python numbers and a compressed RLE as text, the form that files have."""
    if isinstance(segmentation, list):
        return [[float(x) for x in polygon] for polygon in segmentation]
    counts = segmentation["counts"]
    return {**segmentation, "counts": counts.decode() if isinstance(counts, bytes) else counts}
