"""Semantic datasets, folders of images and of label maps: ADE20K, Cityscapes, and one's own by DATASETS.SEMANTIC."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, _get_builtin_metadata

from dimaskdino.data.datasets.registration import SPLITS, made_metadata, own_paths, register
from dimaskdino.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CITYSCAPES_ENDINGS: dict[str, tuple[str, ...]] = {
    "images": ("_leftImg8bit.png",),
    "labels": ("_gtFine_labelTrainIds.png",),
}
_OWN = {
    "train": ("DATASETS.SEMANTIC.TRAIN_IMAGES", "DATASETS.SEMANTIC.TRAIN_LABELS"),
    "val": ("DATASETS.SEMANTIC.VAL_IMAGES", "DATASETS.SEMANTIC.VAL_LABELS"),
}
ADE20K_FOLDER = "ADEChallengeData2016"
ADE20K_SPLITS = {"train": "training", "val": "validation"}


def register_ade20k(root: Path) -> None:
    """Register ade20k_sem_seg_train and ade20k_sem_seg_val, 150 classes, under ``root``."""
    folder = root / ADE20K_FOLDER
    for split, name in ADE20K_SPLITS.items():
        register_semantic(
            f"ade20k_sem_seg_{split}",
            image_root=folder / "images" / name,
            label_root=folder / "annotations_detectron2" / name,
            classes=list(ADE20K_SEM_SEG_CATEGORIES),
            hint=f"make the label maps with `python datasets/prepare_ade20k_sem_seg.py --root {root}`",
        )


def register_cityscapes(root: Path) -> None:
    """Register cityscapes_fine_sem_seg_{train,val,test}, 19 classes, under ``root``."""
    for split in (*SPLITS, "test"):
        register_semantic(
            f"cityscapes_fine_sem_seg_{split}",
            image_root=root / "cityscapes/leftImg8bit" / split,
            label_root=root / "cityscapes/gtFine" / split,
            classes=list(_get_builtin_metadata("cityscapes")["stuff_classes"]),
            hint=f"make the label maps with `python datasets/prepare_cityscapes_sem_seg.py --root {root}`",
            endings=CITYSCAPES_ENDINGS,
        )


def register_own_semantic(cfg: CfgNode) -> None:
    """Register semantic_train and semantic_val where DATASETS.SEMANTIC names both folders, and the classes."""
    for split, keys in _OWN.items():
        paths = own_paths(cfg, keys)
        if not paths:
            continue
        if not cfg.DATASETS.SEMANTIC.CLASSES:
            raise ConfigError("DATASETS.SEMANTIC.CLASSES is empty; list the class names, first that of label 0.")
        (images_key, images), (labels_key, labels) = paths.items()
        register_semantic(
            f"semantic_{split}",
            image_root=images,
            label_root=labels,
            classes=[str(name) for name in cfg.DATASETS.SEMANTIC.CLASSES],
            hint=f"correct {labels_key}",
            image_hint=f"correct {images_key}",
        )


def register_semantic(
    name: str,
    *,
    image_root: Path,
    label_root: Path,
    classes: list[str],
    hint: str,
    image_hint: str = "check its path, or DETECTRON2_DATASETS (layouts: datasets/README.md)",
    endings: dict[str, tuple[str, ...]] | None = None,
    make: Callable[[], Any] | None = None,
) -> None:
    """Register a folder of images with a folder of label maps, in place of a dataset of the same name.

    Subfolders are included, and label maps have the names of their images but for the ``endings`` of "images" and
    "labels", by default those of image files and .png. ``classes`` are named by label, from 0 on. ``make`` is called
    before the files are first read. The hints say what to do where label maps, or images, are missing.
    """
    source = (str(image_root), str(label_root), tuple(classes))
    if MetadataCatalog.get(name).get("source") == source:
        return
    metadata = {
        **{"truth": "semantic", "evaluator_type": "sem_seg", "ignore_label": 255, "stuff_classes": classes},
        **{"image_root": str(image_root), "sem_seg_root": str(label_root)},
        **{"source": source, "hint": hint, "image_hint": image_hint, "make": make},
    }
    register(name, partial(load_semantic, name, endings or {}), metadata)


def load_semantic(name: str, endings: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """List the images of a dataset of :func:`register_semantic` in detectron2's format, by name.

    Raises:
        DatasetError: a folder is missing or empty, images have no label map, or two files differ by their ending alone.
    """
    metadata = made_metadata(name)
    images, labels = (
        _files(name, folder, ends, hint)
        for folder, ends, hint in (
            (metadata.image_root, endings.get("images", IMAGE_ENDINGS), metadata.image_hint),
            (metadata.sem_seg_root, endings.get("labels", (".png",)), metadata.hint),
        )
    )
    missing = sorted(images.keys() - labels.keys())
    if missing:
        raise DatasetError(
            f"Dataset {name}: {len(missing)} of {len(images)} images have no label map in {metadata.sem_seg_root}, the "
            f"first of them {images[missing[0]]}; {metadata.hint}."
        )
    if len(labels) > len(images):
        logger.warning("Dataset %s: %d label maps have no image; they are not used.", name, len(labels) - len(images))
    return [{"file_name": images[stem], "sem_seg_file_name": labels[stem], "image_id": stem} for stem in sorted(images)]


def _files(dataset: str, root: str, endings: Sequence[str], hint: str) -> dict[str, str]:
    """Path by name relative to ``root`` and without ending, of the files with one of the endings."""
    found: dict[str, str] = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            ending = next((each for each in endings if name.lower().endswith(each.lower())), None)
            if ending is not None:
                path = os.path.join(folder, name)
                stem = os.path.relpath(path, root)[: -len(ending)].replace(os.sep, "/")
                if stem in found:
                    raise DatasetError(f"{found[stem]} and {path} differ by their ending alone; rename or remove one.")
                found[stem] = path
    if not found:
        missing = f"holds no files of names that end in {', '.join(endings)}"
        state = missing if os.path.isdir(root) else "does not exist"
        raise DatasetError(f"Dataset {dataset}: folder {root} {state}; {hint}.")
    return found
