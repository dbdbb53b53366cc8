"""A dataset of your own in COCO's format: own_train and own_val, by DATASETS.TRAIN_JSON and its relatives."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from detectron2.config import CfgNode

from dimaskdino.data.coco_file import Json, category_names, read_coco
from dimaskdino.data.datasets.registration import is_registered_at, register_coco_format
from dimaskdino.errors import ConfigError, DatasetError

SPLITS = ("train", "val")


def own_name(split: str) -> str:
    """The name of a split ("train", "val") for DATASETS.TRAIN and DATASETS.TEST."""
    return f"own_{split}"


def read_own(cfg: CfgNode, split: str) -> Json | None:
    """What the COCO file of a split holds; None if the keys name none.

    Raises:
        ConfigError: the file or the folder of images is named without the other, or is not there.
        DatasetError: the file is not in COCO's format.
    """
    json_key, images_key = f"DATASETS.{split.upper()}_JSON", f"DATASETS.{split.upper()}_IMAGES"
    json_file, images = _paths(cfg, split)
    if json_file is None and images is None:
        return None
    for key, path, other in ((json_key, json_file, images_key), (images_key, images, json_key)):
        if path is None:
            raise ConfigError(f"{other} is set and {key} is empty; a dataset of your own needs both.")
    assert json_file is not None
    assert images is not None
    if not json_file.is_file():
        raise DatasetError(f"{json_key} names {json_file}, which is not a file; correct the path.")
    if not images.is_dir():
        raise DatasetError(f"{images_key} names {images}, which is not a folder; correct the path.")
    return read_coco(str(json_file))


def register_own(cfg: CfgNode, known: Mapping[str, list[str]] = MappingProxyType({})) -> None:
    """Register own_train and own_val where the keys name files that are there; prediction does without them.

    The file of a split whose class names are ``known`` is not read.

    Raises:
        DatasetError: a file is not in COCO's format.
    """
    for split in SPLITS:
        json_file, images = _paths(cfg, split)
        if json_file is None or images is None or not json_file.is_file():
            continue
        if not is_registered_at(own_name(split), json_file):
            names = known.get(split) or list(category_names(read_coco(str(json_file))).values())
            register_coco_format(own_name(split), json_file, images, names)


def _paths(cfg: CfgNode, split: str) -> tuple[Path | None, Path | None]:
    """The annotation file and the folder of images of a split, as far as they are named."""
    json_file, images = (cfg.DATASETS[f"{split.upper()}_{kind}"] for kind in ("JSON", "IMAGES"))
    return (Path(json_file).expanduser() if json_file else None, Path(images).expanduser() if images else None)
