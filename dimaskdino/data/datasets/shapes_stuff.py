"""The synthetic pictures with stuff behind the shapes: shapes_panoptic_{train,val} and shapes_semantic_{train,val}.

The background is cut into regions, each of a class of stuff, which is a texture of about a hue, or of no class.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dimaskdino.data.datasets.panoptic import register_panoptic
from dimaskdino.data.datasets.semantic import register_semantic
from dimaskdino.data.datasets.shapes import SPLITS, ShapesSpec, file_name, make_folder
from dimaskdino.data.datasets.shapes_drawing import SHAPES, Picture, draw_picture
from dimaskdino.data.datasets.shapes_textures import STUFF, colored_texture, random_color, regions

STUFF_VERSION = 1  # raise when the pictures of a seed change
NO_CLASS_SHARE = 0.15  # of the regions
IGNORE = 255
CLASSES = (*SHAPES, *STUFF)
_STUFF_SEED = 7  # tells the generator of the stuff from that of the shapes


def stuff_folder(root: Path, spec: ShapesSpec) -> Path:
    """Where the pictures with stuff lie, beside those of shapes alone."""
    return root / f"{spec.folder_name}-stuff{STUFF_VERSION}"


def register_shapes_with_stuff(root: Path, spec: ShapesSpec) -> None:
    """Register the four datasets for one spec under ``root``; nothing is drawn before they are first used."""
    folder = stuff_folder(root, spec)
    make = partial(make_shapes_with_stuff, root, spec)
    numbers = {index + 1: index for index in range(len(CLASSES))}
    is_thing = {number: index < len(SHAPES) for number, index in numbers.items()}
    metadata = {
        "thing_classes": list(CLASSES),
        "stuff_classes": list(CLASSES),
        "thing_dataset_id_to_contiguous_id": {key: index for key, index in numbers.items() if is_thing[key]},
        "stuff_dataset_id_to_contiguous_id": {key: index for key, index in numbers.items() if not is_thing[key]},
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
    return make_folder(stuff_folder(root, spec), spec, partial(_write, spec=spec, num_workers=num_workers))


def _write(folder: Path, spec: ShapesSpec, num_workers: int) -> None:
    (folder / "annotations").mkdir(parents=True)
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) if num_workers else None
    with pool or nullcontext():
        for split in SPLITS:
            for name in (split, f"panoptic_{split}", f"semantic_{split}"):
                (folder / name).mkdir()
            draw = partial(_write_picture, folder, split, (spec.seed, SPLITS.index(split)), spec.image_size)
            indices = range(spec.num_images(split))
            segments = pool.map(draw, indices, chunksize=32) if pool else map(draw, indices)
            content = _panoptic_json(spec.image_size, segments)
            path = folder / "annotations" / f"panoptic_{split}.json"
            path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _write_picture(folder: Path, split: str, seeds: tuple[int, int], size: int, index: int) -> list[dict[str, Any]]:
    """Draw picture ``index``, save it with its label maps, and return its segments."""
    picture, stuff = draw_with_stuff(seeds, index, size)
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


def _panoptic_json(size: int, segments_per_picture: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    images, annotations = [], []
    for index, segments in enumerate(segments_per_picture):
        name = file_name(index)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        annotations.append({"image_id": index + 1, "file_name": name, "segments_info": segments})
    categories = [
        {"id": index + 1, "name": name, "isthing": int(index < len(SHAPES))} for index, name in enumerate(CLASSES)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}
