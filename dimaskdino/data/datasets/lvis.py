"""LVIS v1: 1,203 classes on COCO's photos, of which each image has labels of some alone."""

from pathlib import Path

from dimaskdino.data.datasets.registration import is_registered_at, register_coco_format


def register_lvis(root: Path) -> None:
    """Register lvis_v1_train and lvis_v1_val, in place of detectron2's, which need another package.

    Args:
        root: the folder that holds ``lvis/lvis_v1_train.json`` and ``coco/train2017``.
    """
    for split in ("train", "val"):
        name, json_file = f"lvis_v1_{split}", root / "lvis" / f"lvis_v1_{split}.json"
        if not is_registered_at(name, json_file):
            register_coco_format(name, json_file, root / "coco", None, evaluator_type="lvis")
