"""Draws annotated images of a dataset: masks, boxes and names."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import hsv_to_rgb
from pycocotools import mask as mask_util

from dimaskdino.data.images import read_image
from dimaskdino.data.inspection import Inspection
from dimaskdino.data.inspection_image import mask_and_extent
from dimaskdino.data.reports import region_kind
from dimaskdino.data.rle import Size
from dimaskdino.errors import DatasetError

# Turning by this much of a circle gives every object a hue far from those of the objects before it.
GOLDEN_RATIO = (5**0.5 - 1) / 2
SHORTEST_SIDE_PX = 600  # of a picture; smaller images are enlarged so that names can be read

Json = dict[str, Any]


def draw_samples(inspection: Inspection, count: int, folder: Path) -> list[Path]:
    """Draw images that have annotations, chosen evenly over the dataset; one that cannot be read is passed over.

    Args:
        inspection: of the dataset.
        count: pictures to draw; fewer where fewer images have annotations.
        folder: where they go, as PNG; made if missing.

    Returns:
        The pictures' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    annotated = [(image, found) for image, found in inspection.units() if found]
    chosen = np.unique(np.linspace(0, len(annotated) - 1, min(count, len(annotated))).astype(int))
    names = {category["id"]: category["name"] for category in inspection.coco["categories"]}
    paths: list[Path] = []
    for index in chosen.tolist():
        image, annotations = annotated[index]
        try:
            pixels = read_image(str(Path(inspection.image_root) / image["file_name"]), "RGB")
        except DatasetError:
            continue
        paths.append(_free_path(folder, Path(image["file_name"]).stem, paths))
        shown = [annotation for annotation in annotations if annotation.get("category_id") in names]
        _draw(pixels, shown, names).save(paths[-1])
    return paths


def _free_path(folder: Path, stem: str, taken: list[Path]) -> Path:
    """A picture's path by the image's name, numbered from the second of a name on: 0.png, 0_2.png."""
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(path for name in names if (path := folder / f"{name}.png") not in taken)


def _draw(pixels: np.ndarray, annotations: list[Json], names: dict[int, str]) -> Any:
    size = pixels.shape[:2]
    return Visualizer(pixels, scale=max(1.0, SHORTEST_SIDE_PX / min(size))).overlay_instances(
        masks=[_pixels_of(annotation, size) for annotation in annotations],
        boxes=np.array([_corners_of(annotation) for annotation in annotations]).reshape(-1, 4),
        labels=[_text(annotation, names) for annotation in annotations],
        assigned_colors=[hsv_to_rgb((index * GOLDEN_RATIO % 1, 0.85, 1.0)) for index in range(len(annotations))],
    )


def _text(annotation: Json, names: dict[int, str]) -> str:
    name, kind = names[annotation["category_id"]], region_kind(annotation)
    return name if kind == "objects" else f"{name} ({kind})"


def _pixels_of(annotation: Json, size: Size) -> np.ndarray:
    """The mask (H, W) bool; empty where it cannot be used."""
    try:
        return mask_util.decode(mask_and_extent(annotation.get("segmentation"), size)[0]).astype(bool)
    except ValueError:
        return np.zeros(size, dtype=bool)


def _corners_of(annotation: Json) -> list[float]:
    try:
        left, top, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return [0.0] * 4
    return [left, top, left + width, top + height]
