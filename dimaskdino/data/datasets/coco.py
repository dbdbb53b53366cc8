"""Public datasets in COCO's format under a chosen root: COCO, LVIS and Objects365."""

from pathlib import Path

from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

from dimaskdino.data.datasets.registration import is_registered_at, register_coco_format


def register_coco(root: Path) -> None:
    """Register detectron2's COCO instance datasets (coco_2017_train, coco_2017_val, ...) under ``root``/coco."""
    for name, (image_root, json_file) in _PREDEFINED_SPLITS_COCO["coco"].items():
        if not is_registered_at(name, root / json_file):
            register_coco_format(name, root / json_file, root / image_root, **_get_builtin_metadata("coco"))


def register_lvis(root: Path) -> None:
    """Register lvis_v1_{train,val} of ``root``/lvis in place of detectron2's, which need another package."""
    for split in ("train", "val"):
        name, json_file = f"lvis_v1_{split}", root / "lvis" / f"lvis_v1_{split}.json"
        if not is_registered_at(name, json_file):
            register_coco_format(name, json_file, root / "coco", None, evaluator_type="lvis")


def register_objects365(root: Path) -> None:
    """Register objects365_{train,val} of ``root``/objects365; their class names are read with the annotations."""
    for split in ("train", "val"):
        name, folder = f"objects365_{split}", root / "objects365"
        json_file = folder / "annotations" / f"zhiyuan_objv2_{split}.json"
        if not is_registered_at(name, json_file):
            register_coco_format(name, json_file, folder / split, None)
