"""Checks of the configured datasets before anything is built, each with one clear line."""

import difflib
import logging
import os
from collections.abc import Collection
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from dimaskdino.data.coco_checks import Summary, summarize_coco
from dimaskdino.data.datasets import data_root, register_all
from dimaskdino.data.entry_checks import check_entries
from dimaskdino.data.images import check_images_exist, read_image
from dimaskdino.errors import ConfigError, DatasetError

__all__ = ["DatasetError", "check_datasets", "find_dataset", "has_coco_file"]

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode, *, train: bool = True, test: bool = True) -> None:
    """Check the datasets that a job will use; makes the synthetic dataset if it is named and not there yet.

    Args:
        cfg: reads DATASETS, MODEL.SEM_SEG_HEAD.NUM_CLASSES and INPUT.FORMAT.
        train: whether DATASETS.TRAIN will be used.
        test: whether DATASETS.TEST will be used.

    Raises:
        ConfigError: if there is no dataset to train on, or, without training, to evaluate on.
        DatasetError: if a dataset is not registered, lacks a file, is malformed, or does not fit the configuration or
            the other datasets.
    """
    register_all(cfg=cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN names no dataset; set it, for example to ('coco_2017_train',).")
    if test and not train and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST names no dataset to evaluate on; set it, for example to ('coco_2017_val',).")
    trained, tested = cfg.DATASETS.TRAIN if train else (), cfg.DATASETS.TEST if test else ()
    classes: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys((*trained, *tested)):
        summary = _summarize(name, trained=name in trained, tested=name in tested)
        if name in trained and not summary.annotated:
            raise DatasetError(f"Dataset {name} has no annotations, so it can be predicted but not trained on.")
        _check_classes(name, summary.class_names, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        if name in tested:  # which images are trained on is known once they are loaded
            check_images_exist(name, summary.images[: cfg.DATASETS.MAX_IMAGES or None])
        read_image(summary.images[0], cfg.INPUT.FORMAT)
        classes[name] = summary.class_names
    _check_same_classes(classes, trained)


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
    if has_coco_file(metadata):
        _check_files(name, Path(metadata.json_file), Path(metadata.image_root))
    return metadata


def _summarize(name: str, *, trained: bool, tested: bool) -> Summary:
    metadata = find_dataset(name)
    if metadata.get("evaluator_type") != "coco" or not has_coco_file(metadata):
        return _summarize_entries(name, trained=trained, tested=tested)
    modified_ns = os.stat(metadata.json_file).st_mtime_ns
    summary = summarize_coco(metadata.json_file, metadata.image_root, modified_ns, scored=tested)
    names = tuple(metadata.get("thing_classes", summary.class_names))
    if names != summary.class_names:
        raise DatasetError(
            f"Dataset {name} is registered with {len(names)} classes, but {metadata.json_file} has "
            f"{len(summary.class_names)} categories or other names; register that file under a name of its own."
        )
    return summary


def has_coco_file(metadata: Metadata) -> bool:
    """Whether a dataset is read from an annotation file; one of a function may name a file for the evaluation alone."""
    return bool(metadata.get("json_file") and metadata.get("image_root"))


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


def _summarize_entries(name: str, *, trained: bool, tested: bool) -> Summary:
    """For datasets that are not in COCO's format: load them through detectron2."""
    entries, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    if not entries:
        raise DatasetError(f"Dataset {name} is empty; check the function that it is registered with.")
    class_names = metadata.get("thing_classes")
    if class_names is None:
        raise DatasetError(f"Dataset {name} has no class names; set thing_classes in its metadata.")
    scored = tested and not metadata.get("json_file")
    check_entries(name, entries, len(class_names), trained=trained, tested=tested, scored=scored)
    annotated = any("annotations" in entry for entry in entries)
    paths = tuple(entry["file_name"] for entry in entries)
    return Summary(class_names=tuple(class_names), images=paths, annotated=annotated)


def _check_classes(name: str, class_names: tuple[str, ...], num_classes: int) -> None:
    if len(class_names) != num_classes:
        raise DatasetError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}, but dataset {name} has {len(class_names)} categories; "
            f"set it to {len(class_names)}."
        )


def _check_same_classes(classes: dict[str, tuple[str, ...]], trained: Collection[str]) -> None:
    """Class numbers must mean the same everywhere: against other ones even perfect predictions score AP 0.

    Args:
        classes: dataset -> class names by number, as many in each; the others are compared with the first.
        trained: the datasets that are trained on.
    """
    first = next(iter(classes), "")
    for name, names in classes.items():
        expected = classes[first]
        if names == expected:
            continue
        index = next(index for index in range(len(names)) if names[index] != expected[index])
        where = f"class {index} is {expected[index]!r} in {first} and {names[index]!r} in {name}"
        if set(names) == set(expected):
            raise DatasetError(
                f"Datasets {first} and {name} have the same classes in another order: {where}; give their categories "
                "the same order."
            )
        if name in trained:
            raise DatasetError(f"Datasets {first} and {name} cannot be trained on together: {where}.")
        logger.warning("Datasets %s and %s have classes of other names, compared by number: %s.", first, name, where)
