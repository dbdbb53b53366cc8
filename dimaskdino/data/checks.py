"""Checks of the configured datasets before anything is built, each with one clear line."""

import difflib
import functools
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from dimaskdino.data.datasets import data_root, register_all
from dimaskdino.data.images import read_image
from dimaskdino.data.rle import checked_rle
from dimaskdino.errors import ConfigError, DatasetError

__all__ = ["DatasetError", "check_datasets", "find_dataset"]


@dataclass(frozen=True)
class _Summary:
    """What the checks need of a dataset: class names by index, the first image's path, and whether it is labelled."""

    class_names: tuple[str, ...]
    first_image: str
    annotated: bool = True


def check_datasets(cfg: CfgNode, *, train: bool = True, test: bool = True) -> None:
    """Check the datasets that a job will use; makes the synthetic dataset if it is named and not there yet.

    Args:
        cfg: reads DATASETS, MODEL.SEM_SEG_HEAD.NUM_CLASSES and INPUT.FORMAT.
        train: whether DATASETS.TRAIN will be used.
        test: whether DATASETS.TEST will be used.

    Raises:
        ConfigError: if there is no dataset to train on, or, without training, to evaluate on.
        DatasetError: if a dataset is not registered, lacks a file, is malformed or does not fit the configuration.
    """
    register_all(cfg=cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN names no dataset; set it, for example to ('coco_2017_train',).")
    if test and not train and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST names no dataset to evaluate on; set it, for example to ('coco_2017_val',).")
    names = [*(cfg.DATASETS.TRAIN if train else ()), *(cfg.DATASETS.TEST if test else ())]
    for name in dict.fromkeys(names):
        summary = _summarize(name)
        if train and name in cfg.DATASETS.TRAIN and not summary.annotated:
            raise DatasetError(f"Dataset {name} has no annotations, so it can be predicted but not trained on.")
        _check_classes(name, summary.class_names, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        read_image(summary.first_image, cfg.INPUT.FORMAT)


def find_dataset(name: str) -> Metadata:
    """The metadata of a registered dataset whose files are there; makes what is made on first use.

    Raises:
        DatasetError: if it is not registered, or its annotation file or image folder is missing.
    """
    registered = DatasetCatalog.list()
    if name not in registered:
        closest = difflib.get_close_matches(name, registered, n=1, cutoff=0)[0]
        raise DatasetError(f"Dataset {name} is not registered; did you mean {closest}?")
    metadata = MetadataCatalog.get(name)
    make = metadata.get("make")
    if make is not None:
        make()
    if hasattr(metadata, "json_file"):
        _check_files(name, Path(metadata.json_file), Path(metadata.image_root))
    return metadata


def _summarize(name: str) -> _Summary:
    metadata = find_dataset(name)
    if metadata.get("evaluator_type") != "coco":
        return _summarize_entries(name)
    summary = _summarize_coco(metadata.json_file, metadata.image_root, os.stat(metadata.json_file).st_mtime_ns)
    names = tuple(metadata.get("thing_classes", summary.class_names))
    if names != summary.class_names:
        raise DatasetError(
            f"Dataset {name} is registered with {len(names)} classes, but {metadata.json_file} has "
            f"{len(summary.class_names)} categories or other names; register that file under a name of its own."
        )
    return summary


def _check_files(name: str, json_file: Path, image_root: Path) -> None:
    for kind, path, found in (
        ("annotation file", json_file, json_file.is_file()),
        ("image folder", image_root, image_root.is_dir()),
    ):
        if not found:
            raise DatasetError(f"Dataset {name}: {kind} {path} does not exist; {_layout_hint(json_file, image_root)}")


def _layout_hint(json_file: Path, image_root: Path) -> str:
    root = data_root()
    if not (json_file.is_relative_to(root) and image_root.is_relative_to(root)):
        return "correct the paths that the dataset is registered with."
    return (
        f"set DETECTRON2_DATASETS (now {root}) to the folder that holds {json_file.relative_to(root)} and "
        f"{image_root.relative_to(root)}/ (layouts: datasets/README.md)."
    )


@functools.lru_cache(maxsize=8)
def _summarize_coco(json_file: str, image_root: str, modified_ns: int) -> _Summary:
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
    return _Summary(class_names=class_names, first_image=first_image, annotated=given is not None)


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


def _summarize_entries(name: str) -> _Summary:
    """For datasets that are not in COCO's format: load them through detectron2."""
    entries = DatasetCatalog.get(name)
    if not entries:
        raise DatasetError(f"Dataset {name} is empty; check the function that it is registered with.")
    class_names = MetadataCatalog.get(name).get("thing_classes")
    if class_names is None:
        raise DatasetError(f"Dataset {name} has no class names; set thing_classes in its metadata.")
    return _Summary(class_names=tuple(class_names), first_image=entries[0]["file_name"])


def _check_classes(name: str, class_names: tuple[str, ...], num_classes: int) -> None:
    if len(class_names) != num_classes:
        raise DatasetError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}, but dataset {name} has {len(class_names)} categories; "
            f"set it to {len(class_names)}."
        )
