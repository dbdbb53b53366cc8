"""The synthetic dataset ``shapes``: made from a seed on first use, in COCO format, as shapes_train and shapes_val."""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from iopath.common.file_io import file_lock
from PIL import Image

from dimaskdino.data.datasets.registration import is_registered_at, register_coco_format
from dimaskdino.data.datasets.shapes_drawing import SHAPES, draw_picture
from dimaskdino.data.datasets.shapes_labels import visible_object
from dimaskdino.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

DRAWING_VERSION = 3  # raise when the pictures of a seed change: folders of older versions are then ignored
SPLITS = ("train", "val")
SMALLEST_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """What decides every byte of the dataset: pictures per split, side of the square pictures in pixels, seed.

    Raises:
        ConfigError: for a number out of range.
    """

    num_train: int = 2000
    num_val: int = 200
    image_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name, least in (("num_train", 1), ("num_val", 1), ("image_size", SMALLEST_SIDE), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"DATASETS.SHAPES.{name.upper()} is {value}; it must be at least {least}.")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ShapesSpec":
        """Read ``cfg.DATASETS.SHAPES``."""
        node = cfg.DATASETS.SHAPES
        return cls(num_train=node.NUM_TRAIN, num_val=node.NUM_VAL, image_size=node.IMAGE_SIZE, seed=node.SEED)

    @property
    def folder_name(self) -> str:
        """A name of its own for every spec, so that a changed seed or size never meets an older dataset."""
        return f"{self.image_size}px-{self.num_train}-{self.num_val}-seed{self.seed}-v{DRAWING_VERSION}"

    def num_images(self, split: str) -> int:
        """Pictures in ``train`` or ``val``."""
        return {"train": self.num_train, "val": self.num_val}[split]


def annotation_file(folder: Path, split: str) -> Path:
    """Where the COCO JSON of a split lies inside a dataset folder."""
    return folder / "annotations" / f"instances_{split}.json"


def register_shapes(root: Path, spec: ShapesSpec) -> None:
    """Register shapes_train and shapes_val for one spec under ``root``; nothing is drawn before they are first used."""
    folder = root / spec.folder_name
    make = partial(make_shapes, root, spec)
    for split in SPLITS:
        name, json_file = f"shapes_{split}", annotation_file(folder, split)
        if not is_registered_at(name, json_file):
            register_coco_format(name, json_file, folder / split, list(SHAPES), make)


def make_shapes(root: Path, spec: ShapesSpec, *, num_workers: int = 0) -> Path:
    """Make the dataset unless it is there; safe when several processes ask at once.

    Args:
        root: folder that the dataset's own folder goes into; made if missing.
        spec: decides every byte.
        num_workers: processes that draw; 0 draws in this one. The files do not depend on it.

    Returns:
        The dataset's folder: ``train/*.png``, ``val/*.png``, ``annotations/instances_{train,val}.json``.

    Raises:
        DatasetError: if the folder cannot be written.
    """
    return make_folder(root / spec.folder_name, spec, partial(_write_dataset, spec=spec, num_workers=num_workers))


def make_folder(folder: Path, spec: ShapesSpec, write: Callable[[Path], None]) -> Path:
    """Make a dataset's folder unless it is there.

    Args:
        folder: what to make; its parents are made if missing.
        spec: what it holds, for the log.
        write: writes the dataset into a folder that it makes.

    Raises:
        DatasetError: if the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):
            if not folder.is_dir():
                _make_then_rename(folder, spec, write)
    except OSError as error:
        raise DatasetError(
            f"Cannot write the synthetic dataset to {folder} ({error.strerror or error}); "
            "set DATASETS.SHAPES.ROOT to a folder that can be written."
        ) from error
    return folder


def _make_then_rename(folder: Path, spec: ShapesSpec, write: Callable[[Path], None]) -> None:
    """Write beside ``folder`` and rename, so that a folder of that name is always complete."""
    logger.info("Making the synthetic dataset in %s: %d + %d pictures", folder, spec.num_train, spec.num_val)
    started = time.perf_counter()
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        write(part)
        try:
            part.rename(folder)
        except OSError:
            # On a network folder without locks, another machine may have been first with the same files.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    logger.info("Made it in %.1f s", time.perf_counter() - started)


def _write_dataset(folder: Path, spec: ShapesSpec, num_workers: int) -> None:
    annotation_file(folder, SPLITS[0]).parent.mkdir(parents=True)
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) if num_workers else None
    with pool or nullcontext():
        for split in SPLITS:
            (folder / split).mkdir()
            draw = partial(_write_picture, folder / split, (spec.seed, SPLITS.index(split)), spec.image_size)
            indices = range(spec.num_images(split))
            coco = _coco_json(spec, pool.map(draw, indices, chunksize=32) if pool else map(draw, indices))
            annotation_file(folder, split).write_text(json.dumps(coco, separators=(",", ":")), encoding="utf-8")


def _write_picture(folder: Path, seeds: tuple[int, int], size: int, index: int) -> list[dict[str, Any]]:
    """Draw picture ``index`` from a generator of its own, save it, and return its labels, back to front."""
    picture = draw_picture(np.random.default_rng([*seeds, index]), size)
    Image.fromarray(picture.image).save(folder / file_name(index), compress_level=1)
    return [
        {"category_id": label + 1, **visible_object(picture.owner == shape)}
        for shape, label in enumerate(picture.classes)
    ]


def file_name(index: int) -> str:
    """Of picture ``index``, counted from 0."""
    return f"{index + 1:06d}.png"


def _coco_json(spec: ShapesSpec, labels_per_picture: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, labels in enumerate(labels_per_picture):
        side = spec.image_size
        images.append({"id": index + 1, "file_name": file_name(index), "width": side, "height": side})
        for label in labels:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **label})
    return {
        "info": {"description": "dimaskdino synthetic shapes", "version": spec.folder_name},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(SHAPES)],
    }
