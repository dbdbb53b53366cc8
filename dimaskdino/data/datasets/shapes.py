"""The synthetic datasets, made from a seed on first use: shapes_{train,val}, and the same with stuff behind the shapes.

shapes_panoptic_{train,val} and shapes_semantic_{train,val} cut the background into regions, each of a class of stuff,
which is a texture of about a hue, or of no class.
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from iopath.common.file_io import file_lock
from PIL import Image

from dimaskdino.data.coco_file import Json, coco_content
from dimaskdino.data.datasets.panoptic import register_panoptic
from dimaskdino.data.datasets.registration import SPLITS, is_registered_at, register_coco_format
from dimaskdino.data.datasets.semantic import register_semantic
from dimaskdino.data.datasets.shapes_drawing import (
    SHAPES,
    STUFF,
    Picture,
    colored_texture,
    draw_picture,
    random_color,
    regions,
)
from dimaskdino.data.datasets.shapes_labels import visible_object
from dimaskdino.data.parallel import parallel_map
from dimaskdino.errors import DatasetError, check_range

logger = logging.getLogger(__name__)

DRAWING_VERSION = 3  # raise when the pictures of a seed change: folders of older versions are then ignored
SMALLEST_SIDE = 32
STUFF_VERSION = 1  # of the pictures with stuff; as above
NO_CLASS_SHARE = 0.15  # of the regions
IGNORE = 255
CLASSES = (*SHAPES, *STUFF)
_STUFF_SEED = 7  # tells the generator of the stuff from that of the shapes


@dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """What decides every byte of the dataset: pictures per split, side of the square pictures in pixels, seed."""

    num_train: int = 2000
    num_val: int = 200
    image_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_train", 1), ("num_val", 1), ("image_size", SMALLEST_SIDE), ("seed", 0)):
            check_range(f"DATASETS.SHAPES.{name.upper()}", getattr(self, name), least)

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

    def seeds(self, split: str) -> tuple[int, int]:
        """What the generators of a split's pictures are made from, with the index of each."""
        return self.seed, SPLITS.index(split)


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
    """Make the dataset unless it is there, safe when several processes ask at once; returns its folder.

    That holds ``train/*.png``, ``val/*.png``, ``annotations/instances_{train,val}.json``, which depend on ``spec``
    alone, not on ``num_workers``.

    Raises:
        DatasetError: if the folder cannot be written.
    """
    write = partial(_write_dataset, spec, "instances", SPLITS, _write_picture, _coco_json, num_workers)
    return make_folder(root / spec.folder_name, spec, write)


def make_folder(folder: Path, spec: ShapesSpec, write: Callable[[Path], None]) -> Path:
    """Make a dataset's folder unless it is there; raises DatasetError if it cannot be written."""
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


def _write_dataset(
    spec: ShapesSpec,
    name: str,
    folders: Sequence[str],
    draw: Callable[[Path, ShapesSpec, tuple[str, int]], list[Json]],
    content: Callable[[ShapesSpec, Sequence[list[Json]]], Json],
    num_workers: int,
    folder: Path,
) -> None:
    """Draw all pictures, and write the ``content`` of what ``draw`` returns for those of each split."""
    for made in ("annotations", *folders):
        (folder / made).mkdir(parents=True)
    tasks = [(split, index) for split in SPLITS for index in range(spec.num_images(split))]
    drawn = parallel_map(partial(draw, folder, spec), tasks, num_workers=num_workers, chunk=32)
    for split in SPLITS:
        text = json.dumps(content(spec, list(islice(drawn, spec.num_images(split)))), separators=(",", ":"))
        (folder / "annotations" / f"{name}_{split}.json").write_text(text, encoding="utf-8")


def _write_picture(folder: Path, spec: ShapesSpec, task: tuple[str, int]) -> list[Json]:
    """Draw a picture from a generator of its own, save it, and return its labels, back to front."""
    split, index = task
    picture = draw_picture(np.random.default_rng([*spec.seeds(split), index]), spec.image_size)
    Image.fromarray(picture.image).save(folder / split / file_name(index), compress_level=1)
    return [
        {"category_id": label + 1, **visible_object(picture.owner == shape)}
        for shape, label in enumerate(picture.classes)
    ]


def file_name(index: int) -> str:
    """Of picture ``index``, counted from 0."""
    return f"{index + 1:06d}.png"


def _coco_json(spec: ShapesSpec, labels: Sequence[list[Json]]) -> Json:
    size = {"width": spec.image_size, "height": spec.image_size}
    images = [{"file_name": file_name(index), **size} for index in range(len(labels))]
    info = {"description": "dimaskdino synthetic shapes", "version": spec.folder_name}
    return coco_content(zip(images, labels, strict=True), list(SHAPES), info=info, licenses=[])


def stuff_folder(root: Path, spec: ShapesSpec) -> Path:
    """Where the pictures with stuff lie, beside those of shapes alone."""
    return root / f"{spec.folder_name}-stuff{STUFF_VERSION}"


def register_shapes_with_stuff(root: Path, spec: ShapesSpec) -> None:
    """Register the four datasets for one spec under ``root``; nothing is drawn before they are first used."""
    folder = stuff_folder(root, spec)
    make = partial(make_shapes_with_stuff, root, spec)
    metadata = {
        "thing_classes": list(CLASSES),
        "stuff_classes": list(CLASSES),
        "thing_dataset_id_to_contiguous_id": {index + 1: index for index in range(len(SHAPES))},
        "stuff_dataset_id_to_contiguous_id": {index + 1: index for index in range(len(SHAPES), len(CLASSES))},
        "make": make,
    }
    for split in SPLITS:
        register_panoptic(
            f"shapes_panoptic_{split}",
            json_file=folder / "annotations" / f"panoptic_{split}.json",
            panoptic_root=folder / f"panoptic_{split}",
            image_root=folder / split,
            metadata=metadata,
        )
        register_semantic(
            f"shapes_semantic_{split}",
            image_root=folder / split,
            label_root=folder / f"semantic_{split}",
            classes=list(CLASSES),
            hint="remove the folder of the synthetic dataset, and it is made again",
            make=make,
        )


def make_shapes_with_stuff(root: Path, spec: ShapesSpec, *, num_workers: int = 0) -> Path:
    """Make the datasets unless they are there; see :func:`dimaskdino.data.datasets.shapes.make_shapes`."""
    folders = [f"{kind}{split}" for kind in ("", "panoptic_", "semantic_") for split in SPLITS]
    write = partial(_write_dataset, spec, "panoptic", folders, _write_picture_with_stuff, _panoptic_json, num_workers)
    return make_folder(stuff_folder(root, spec), spec, write)


def _write_picture_with_stuff(folder: Path, spec: ShapesSpec, task: tuple[str, int]) -> list[Json]:
    """Draw a picture, save it with its label maps, and return its segments."""
    split, index = task
    picture, stuff = draw_with_stuff(spec.seeds(split), index, spec.image_size)
    labels = np.where(picture.owner < 0, stuff, np.array([*picture.classes, 0])[picture.owner])
    # Shapes have the ids from 1 on, the classes of stuff those after them.
    first_stuff = len(picture.classes) + 1 - len(SHAPES)
    ids = np.where(picture.owner >= 0, picture.owner + 1, np.where(stuff == IGNORE, 0, stuff + first_stuff))
    name = file_name(index)
    Image.fromarray(picture.image).save(folder / split / name, compress_level=1)
    Image.fromarray(labels.astype(np.uint8)).save(folder / f"semantic_{split}" / name)
    channels = np.stack((ids, np.zeros_like(ids), np.zeros_like(ids)), axis=-1).astype(np.uint8)
    Image.fromarray(channels).save(folder / f"panoptic_{split}" / name)
    classes = {
        **dict(enumerate(picture.classes, start=1)),
        **{k + first_stuff: k for k in range(len(SHAPES), len(CLASSES))},
    }
    present, areas = np.unique(ids[ids > 0], return_counts=True)
    return [
        {"id": key, "category_id": classes[key] + 1, "area": area, "iscrowd": 0}
        for key, area in zip(present.tolist(), areas.tolist(), strict=True)
    ]


def draw_with_stuff(seeds: tuple[int, int], index: int, size: int) -> tuple[Picture, np.ndarray]:
    """Picture ``index`` of a split, and the class (S, S) int64 of the stuff behind it, IGNORE for none."""
    rng = np.random.default_rng([*seeds, index, _STUFF_SEED])
    cells = regions(rng, size)
    canvas, stuff = np.zeros((size, size, 3), dtype=np.float32), np.full((size, size), IGNORE)
    for cell in range(int(cells.max()) + 1):
        label = int(rng.integers(len(STUFF)))
        if rng.random() < NO_CLASS_SHARE:
            canvas[cells == cell] = random_color(rng, max_saturation=0.3)
            continue
        canvas[cells == cell] = colored_texture(rng, label, size)[cells == cell]
        stuff[cells == cell] = len(SHAPES) + label
    return draw_picture(np.random.default_rng([*seeds, index]), size, canvas), stuff


def _panoptic_json(spec: ShapesSpec, segments: Sequence[list[Json]]) -> Json:
    images, annotations = [], []
    for index, of_picture in enumerate(segments):
        name, side = file_name(index), spec.image_size
        images.append({"id": index + 1, "file_name": name, "width": side, "height": side})
        annotations.append({"image_id": index + 1, "file_name": name, "segments_info": of_picture})
    categories = [
        {"id": index + 1, "name": name, "isthing": int(index < len(SHAPES))} for index, name in enumerate(CLASSES)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}
