"""Small panoptic and semantic datasets whose images are painted by class, so that masks can be compared with pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Json = dict[str, Any]

# Category ids start at 0 and have gaps; classes 0 to 2.
CATEGORIES = [
    {"id": 9, "name": "grass", "isthing": 0},
    {"id": 0, "name": "cell", "isthing": 1},
    {"id": 4, "name": "bug", "isthing": 1},
]
NAMES = ["cell", "bug", "grass"]
# Class, crowd, and (top, bottom, left, right) of each segment of each image of 24 x 16 px; ids are 1000 and on.
SEGMENTS = [
    [(0, 0, (0, 8, 0, 10)), (2, 0, (8, 16, 0, 24)), (0, 0, (0, 6, 10, 20))],
    [(1, 0, (2, 9, 3, 15)), (0, 1, (10, 16, 0, 6)), (2, 0, (0, 2, 0, 24))],
]
SIZE = (16, 24)


def color(label: int) -> list[int]:
    """Of a class in the images; pixels of none are black."""
    return [60 + 60 * label, 250 - 70 * label, 40]


def label_map(segments: list[Any], values: list[int], empty: int) -> np.ndarray:
    """(H, W) with the value of each segment."""
    labels = np.full(SIZE, empty, dtype=np.int32)
    for (_, _, (top, bottom, left, right)), value in zip(segments, values, strict=True):
        labels[top:bottom, left:right] = value
    return labels


def write_images(folder: Path) -> None:
    """Images 1.png and 2.png."""
    folder.mkdir(parents=True)
    for number, segments in enumerate(SEGMENTS, start=1):
        labels = label_map(segments, [label for label, _, _ in segments], -1)
        pixels = np.zeros((*SIZE, 3), dtype=np.uint8)
        for label in range(len(NAMES)):
            pixels[labels == label] = color(label)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write_panoptic(folder: Path) -> dict[str, str]:
    """A panoptic dataset below ``folder``; returns the keys that name it as panoptic_train and panoptic_val."""
    write_images(folder / "images")
    (folder / "labels").mkdir()
    ids_by_class = [0, 4, 9]
    annotations = []
    for number, segments in enumerate(SEGMENTS, start=1):
        ids = [1000 * (index + 1) for index in range(len(segments))]
        labels = label_map(segments, ids, 0)
        pixels = np.stack((labels % 256, labels // 256 % 256, labels // 256**2), axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "labels" / f"{number}.png")
        info = [
            {"id": key, "category_id": ids_by_class[label], "iscrowd": crowd, "area": int((labels == key).sum())}
            for key, (label, crowd, _) in zip(ids, segments, strict=True)
        ]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": info})
    images = [{"id": number, "file_name": f"{number}.png", "height": 16, "width": 24} for number in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "panoptic.json").write_text(json.dumps(content))
    paths = {"JSON": folder / "panoptic.json", "LABELS": folder / "labels", "IMAGES": folder / "images"}
    return {
        f"DATASETS.PANOPTIC.{split}_{kind}": str(path) for split in ("TRAIN", "VAL") for kind, path in paths.items()
    }


def write_semantic(folder: Path) -> dict[str, Any]:
    """A semantic dataset of the same images, 255 where there is no class; returns its keys."""
    write_images(folder / "images" / "below")
    (folder / "labels" / "below").mkdir(parents=True)
    for number, segments in enumerate(SEGMENTS, start=1):
        labels = label_map(segments, [255 if crowd else label for label, crowd, _ in segments], 255)
        Image.fromarray(labels.astype(np.uint8)).save(folder / "labels" / "below" / f"{number}.png")
    keys: dict[str, Any] = {"DATASETS.SEMANTIC.CLASSES": NAMES}
    for split in ("TRAIN", "VAL"):
        keys |= {f"DATASETS.SEMANTIC.{split}_{kind}": str(folder / kind.lower()) for kind in ("IMAGES", "LABELS")}
    return keys
