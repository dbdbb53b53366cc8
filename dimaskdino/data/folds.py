"""Cross-validation: which images a run trains on and which it is tested on, by DATASETS.FOLDS."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from dimaskdino.errors import ConfigError, DatasetError

FOLDER = "folder"


def check_folds(cfg: CfgNode) -> None:
    """Raise ConfigError if the keys of DATASETS.FOLDS contradict each other."""
    node = cfg.DATASETS.FOLDS
    if node.NUM == 0:
        return
    if node.NUM < 2 or not 0 <= node.FOLD < node.NUM:
        raise ConfigError(
            f"DATASETS.FOLDS.NUM is {node.NUM} and FOLD {node.FOLD}; give at least 2 folds, and one of 0 to NUM - 1 to "
            "test on (or NUM 0 for none)."
        )
    if not set(cfg.DATASETS.TEST) & set(cfg.DATASETS.TRAIN):
        raise ConfigError(
            "DATASETS.FOLDS divides the datasets of DATASETS.TRAIN; name one of them in DATASETS.TEST as well, to test "
            "on the fold that is not trained on."
        )


def image_keys(cfg: CfgNode) -> list[str]:
    """Keys of images that the folds need."""
    node = cfg.DATASETS.FOLDS
    return [node.GROUP] if node.NUM and node.GROUP not in ("", FOLDER) else []


def take_fold(cfg: CfgNode, name: str, entries: list[dict[str, Any]], *, train: bool) -> list[dict[str, Any]]:
    """The images of a dataset that a run trains on, or is tested on.

    Images of one group (DATASETS.FOLDS.GROUP) are in one fold. The folds depend on the groups' names and the seed, not
    on the order of the images.

    Args:
        cfg: reads DATASETS.{FOLDS, TRAIN}.
        name: of the dataset; one that is not trained on is not divided.
        entries: its images.
        train: whether they are for training.

    Raises:
        DatasetError: an image does not have the key of its group, or there are fewer groups than folds.
    """
    node = cfg.DATASETS.FOLDS
    if not node.NUM or name not in cfg.DATASETS.TRAIN:
        return entries
    groups = [_group(entry, node.GROUP) for entry in entries]
    names = sorted(set(groups))
    if len(names) < node.NUM:
        what = f"groups of images (DATASETS.FOLDS.GROUP {node.GROUP})" if node.GROUP else "images"
        raise DatasetError(
            f"DATASETS.FOLDS.NUM is {node.NUM}, but dataset {name} has {len(names)} {what}; give that many or fewer."
        )
    order = np.random.default_rng(node.SEED).permutation(len(names)).tolist()
    fold_of = {names[index]: place % node.NUM for place, index in enumerate(order)}
    return [entry for entry, group in zip(entries, groups, strict=True) if (fold_of[group] == node.FOLD) is not train]


def nothing_to_train_on(names: Iterable[str]) -> DatasetError:
    """The error for datasets of which DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves no image."""
    return DatasetError(
        f"No image with an object (apart from crowd regions) in {', '.join(names)}; check the annotations, or set "
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on background."
    )


def _group(entry: dict[str, Any], key: str) -> str:
    if key == FOLDER:
        return os.path.dirname(entry["file_name"])
    value = entry.get(key or "file_name")
    if value is None:
        raise DatasetError(f"Image {entry['file_name']} has no {key!r}, which DATASETS.FOLDS.GROUP names; add the key.")
    return str(value)
