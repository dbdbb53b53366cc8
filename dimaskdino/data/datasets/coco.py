"""detectron2's COCO datasets under a chosen root, with annotation ids kept for error messages."""

from pathlib import Path

from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

from dimaskdino.data.datasets.registration import is_registered_at, register_coco_format


def register_coco(root: Path) -> None:
    """Register detectron2's COCO instance datasets (coco_2017_train, coco_2017_val, ...) under ``root``.

    Args:
        root: the folder that holds ``coco/``.
    """
    for name, (image_root, json_file) in _PREDEFINED_SPLITS_COCO["coco"].items():
        if not is_registered_at(name, root / json_file):
            register_coco_format(name, root / json_file, root / image_root, **_get_builtin_metadata("coco"))
