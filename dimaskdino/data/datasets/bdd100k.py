"""BDD100K instance segmentation as bdd100k_ins_seg_train and bdd100k_ins_seg_val."""

from functools import partial
from pathlib import Path

from dimaskdino.data.datasets.registration import is_registered_at, register_coco_format
from dimaskdino.errors import DatasetError

SPLITS = ("train", "val")
# In the order of the category ids 1 to 8 of bitmasks and of the COCO file.
CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


def annotation_file(folder: Path, split: str) -> Path:
    """Where datasets/prepare_bdd100k.py puts the COCO JSON of a split inside the folder ``bdd100k``."""
    return folder / "annotations" / f"bdd100k_ins_seg_{split}.json"


def image_folder(folder: Path, split: str) -> Path:
    """Where the images of a split lie inside the folder ``bdd100k``."""
    return folder / "images" / "10k" / split


def register_bdd100k(root: Path) -> None:
    """Register bdd100k_ins_seg_train and bdd100k_ins_seg_val under ``root``, the folder that holds ``bdd100k/``."""
    folder = root / "bdd100k"
    for split in SPLITS:
        name, json_file = f"bdd100k_ins_seg_{split}", annotation_file(folder, split)
        if not is_registered_at(name, json_file):
            register_coco_format(
                name,
                json_file,
                image_folder(folder, split),
                list(CLASSES),
                partial(_check_prepared, name, json_file, root),
                thing_dataset_id_to_contiguous_id={index + 1: index for index in range(len(CLASSES))},
            )


def _check_prepared(name: str, json_file: Path, root: Path) -> None:
    if not json_file.is_file():
        raise DatasetError(
            f"Dataset {name}: annotation file {json_file} does not exist; make it with `python "
            f"datasets/prepare_bdd100k.py --root {root}`, or set DETECTRON2_DATASETS (now {root}) to the folder that "
            "holds bdd100k/ (layout: datasets/README.md)."
        )
