"""Datasets in COCO's format: COCO, LVIS, Objects365, and own_train and own_val by DATASETS.TRAIN_JSON."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

from dimaskdino.data.coco_file import Json, category_names, read_coco
from dimaskdino.data.datasets.registration import SPLITS, is_registered_at, own_paths, register_coco_format
from dimaskdino.errors import DatasetError

_KINDS = ("JSON", "IMAGES")


def register_coco(root: Path) -> None:
    """Register detectron2's COCO instance datasets (coco_2017_train, coco_2017_val, ...) under ``root``/coco."""
    for name, (image_root, json_file) in _PREDEFINED_SPLITS_COCO["coco"].items():
        if not is_registered_at(name, root / json_file):
            register_coco_format(name, root / json_file, root / image_root, **_get_builtin_metadata("coco"))


def register_lvis(root: Path) -> None:
    """Register lvis_v1_{train,val} of ``root``/lvis in place of detectron2's, which need another package."""
    for split in SPLITS:
        name, json_file = f"lvis_v1_{split}", root / "lvis" / f"lvis_v1_{split}.json"
        if not is_registered_at(name, json_file):
            register_coco_format(name, json_file, root / "coco", None, evaluator_type="lvis")


def register_objects365(root: Path) -> None:
    """Register objects365_{train,val} of ``root``/objects365; their class names are read with the annotations."""
    for split in SPLITS:
        name, folder = f"objects365_{split}", root / "objects365"
        json_file = folder / "annotations" / f"zhiyuan_objv2_{split}.json"
        if not is_registered_at(name, json_file):
            register_coco_format(name, json_file, folder / split, None)


def own_name(split: str) -> str:
    """The name of a split ("train", "val") for DATASETS.TRAIN and DATASETS.TEST."""
    return f"own_{split}"


def read_own(cfg: CfgNode, split: str) -> Json | None:
    """What the COCO file of a split holds, None if its keys are empty; the error for a path of no use names its key."""
    paths = own_paths(cfg, [f"DATASETS.{split.upper()}_{kind}" for kind in _KINDS])
    if not paths:
        return None
    (json_key, json_file), (images_key, images) = paths.items()
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
        json_file, images = (Path(cfg.DATASETS[f"{split.upper()}_{kind}"]).expanduser() for kind in _KINDS)
        if not json_file.is_file() or not cfg.DATASETS[f"{split.upper()}_IMAGES"]:
            continue
        registered = is_registered_at(own_name(split), json_file)
        if not registered or MetadataCatalog.get(own_name(split)).image_root != str(images):
            names = known.get(split) or list(category_names(read_coco(str(json_file))).values())
            keys = {"images": f"DATASETS.{split.upper()}_IMAGES"}
            register_coco_format(own_name(split), json_file, images, names, keys=keys)
