"""Draws annotated images of a dataset: masks, boxes and names."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import hsv_to_rgb
from pycocotools import mask as mask_util

from dimaskdino.data.images import read_image
from dimaskdino.data.validation.dataset import Dataset
from dimaskdino.data.validation.report import region_kind
from dimaskdino.data.validation.rle import Size
from dimaskdino.data.validation.rules import Json, Rules, read_mask
from dimaskdino.errors import DatasetError

# Turning by this much of a circle gives every object a hue far from those of the objects before it.
GOLDEN_RATIO = (5**0.5 - 1) / 2
SHORTEST_SIDE_PX = 600  # of a picture; smaller images are enlarged so that names can be read


def draw_samples(dataset: Dataset, count: int, folder: Path, *, apply_exif: bool = True) -> list[Path]:
    """Draw images that have annotations, chosen evenly over the dataset; skips those that cannot be read.

    Args:
        dataset: what to draw.
        count: pictures to draw; fewer where fewer images have annotations.
        folder: where they go, as PNG; made if missing.
        apply_exif: read photos as INPUT.APPLY_EXIF says.

    Returns:
        The pictures' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    annotated = [picture for picture in dataset.pictures if picture.annotations]
    chosen = np.unique(np.linspace(0, len(annotated) - 1, min(count, len(annotated))).astype(int))
    paths: list[Path] = []
    for picture in (annotated[index] for index in chosen.tolist()):
        try:
            pixels = read_image(picture.path, "RGB", apply_exif=apply_exif)
        except DatasetError:
            continue
        paths.append(_free_path(folder, Path(picture.path).stem, paths))
        _draw(pixels, picture.annotations, dataset.rules(with_masks=False, scored=False)).save(paths[-1])
    return paths


def _free_path(folder: Path, stem: str, taken: list[Path]) -> Path:
    """A picture's path by the image's name, numbered from the second of a name on: 0.png, 0_2.png."""
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(path for name in names if (path := folder / f"{name}.png") not in taken)


def _draw(pixels: np.ndarray, annotations: list[Json], rules: Rules) -> Any:
    size = pixels.shape[:2]
    shown = [annotation for annotation in annotations if rules.class_name(annotation, [])]
    return Visualizer(pixels, scale=max(1.0, SHORTEST_SIDE_PX / min(size))).overlay_instances(
        masks=[_pixels_of(annotation, size) for annotation in shown],
        boxes=np.array([rules.box(annotation, size, []) or [0.0] * 4 for annotation in shown]).reshape(-1, 4),
        labels=[_text(annotation, rules.class_name(annotation, [])) for annotation in shown],
        assigned_colors=[hsv_to_rgb((index * GOLDEN_RATIO % 1, 0.85, 1.0)) for index in range(len(shown))],
    )


def _text(annotation: Json, name: str) -> str:
    kind = region_kind(annotation)
    return name if kind == "objects" else f"{name} ({kind})"


def _pixels_of(annotation: Json, size: Size) -> np.ndarray:
    """The mask (H, W) bool; empty where it cannot be used."""
    try:
        mask = read_mask(annotation.get("segmentation"), size)
    except ValueError:
        mask = None
    if mask is None or not (mask.polygons or mask.rle):
        return np.zeros(size, dtype=bool)
    return mask_util.decode(mask.rasterized(size)).astype(bool)
