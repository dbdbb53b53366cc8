"""The images of a registered dataset with their true objects."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util

from dimaskdino.analysis.stages import TrueObjects
from dimaskdino.config import Config
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.truth import Truth, truth_of_entries
from dimaskdino.visualization import Objects


def read_dataset(cfg: Config, name: str, count: int) -> tuple[list[str], list[dict[str, Any]], Truth]:
    """Class names, the first images, and their truth, whose category ids are class indices plus one.

    Raises:
        DatasetError: they have no annotated objects, or the dataset has another number of classes than the model.
    """
    register_all(cfg=cfg)
    entries = load_dataset(name)[:count]
    names = list(MetadataCatalog.get(name).get("thing_classes") or [])
    if not names or not any(entry.get("annotations") for entry in entries):
        raise DatasetError(f"{name} has no objects in its first {count} images; choose another --dataset.")
    if len(names) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        raise DatasetError(
            f"{name} has {len(names)} classes, but the model predicts {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES} "
            "(MODEL.SEM_SEG_HEAD.NUM_CLASSES); choose another --dataset."
        )
    entries = [entry if "annotations" in entry else {**entry, "annotations": []} for entry in entries]
    return names, entries, truth_of_entries(entries, name, names, range(1, len(names) + 1))


def true_objects(truth: Truth, entries: list[dict[str, Any]]) -> Iterator[TrueObjects]:
    """The objects of each image, without crowd regions."""
    of_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in truth.annotations or ():
        if not annotation["iscrowd"]:
            of_image.setdefault(annotation["image_id"], []).append(annotation)
    for entry in entries:
        own = of_image.get(truth.image_numbers[entry["image_id"]], [])
        yield TrueObjects(
            classes=[annotation["category_id"] - 1 for annotation in own],
            boxes=np.array([annotation["bbox"] for annotation in own], dtype=np.float64).reshape(-1, 4),
            rles=[truth.coco.ann_to_rle(annotation) for annotation in own] if truth.has_masks else None,
            image_id=entry["image_id"],
        )


def drawn_truth(objects: TrueObjects, names: list[str], size: tuple[int, int]) -> Objects:
    """True objects of an image of ``size`` (height, width), to be drawn."""
    boxes = objects.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if objects.rles is not None:
        masks = np.array([mask_util.decode(rle) for rle in objects.rles], dtype=bool).reshape(-1, *size)
    return Objects(classes=objects.classes, names=[names[label] for label in objects.classes], boxes=boxes, masks=masks)
