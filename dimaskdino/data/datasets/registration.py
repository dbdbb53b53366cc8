"""Registers COCO-format datasets with detectron2, keeping annotation ids so that errors can name them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json


def is_registered_at(name: str, json_file: Path) -> bool:
    """Whether :func:`register_coco_format` registered ``name`` with this annotation file."""
    if name not in DatasetCatalog.list():
        return False
    metadata = MetadataCatalog.get(name)
    return hasattr(metadata, "make") and metadata.json_file == str(json_file)


def register_coco_format(
    name: str,
    json_file: Path,
    image_root: Path,
    thing_classes: list[str],
    make: Callable[[], Any] | None = None,
    **metadata: Any,
) -> None:
    """Register a dataset, in place of one of the same name.

    Args:
        name: name for DATASETS.TRAIN and DATASETS.TEST.
        json_file: annotations in COCO's instances format.
        image_root: folder that the JSON's file names are relative to.
        thing_classes: class names in the order of the JSON's category ids.
        make: called before the files are first read; makes them where they are missing.
        metadata: anything else for detectron2's metadata.
    """
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(_load, name, str(json_file), str(image_root), make))
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        thing_classes=thing_classes,
        make=make,
        **metadata,
    )


def _load(name: str, json_file: str, image_root: str, make: Callable[[], Any] | None) -> list[dict[str, Any]]:
    if make is not None:
        make()
    return load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])
