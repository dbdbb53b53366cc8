"""Objects365 (v2), on which DINO is pre-trained; it has boxes alone."""

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

SPLITS = ("train", "val")


def register_objects365(root: Path) -> None:
    """Register objects365_train and objects365_val; their class names are read with the annotations.

    Args:
        root: the folder that holds ``objects365/``.
    """
    for split in SPLITS:
        name, folder = f"objects365_{split}", root / "objects365"
        json_file = str(folder / "annotations" / f"zhiyuan_objv2_{split}.json")
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).json_file == json_file:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_coco_instances(name, {}, json_file, str(folder / split))
