"""A small BDD100K folder in the official layout, and the recorded results of the official toolkit."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

Json = dict[str, Any]

RECORD = Path(__file__).parents[1] / "data" / "bdd100k_toolkit.json"
BITS = {"truncated": 8, "occluded": 4, "crowd": 2, "ignored": 1}
CATEGORY_IDS = {
    **{"pedestrian": 1, "person": 1, "other person": 1, "rider": 2, "car": 3, "van": 3, "caravan": 3},
    **{"other vehicle": 3, "truck": 4, "trailer": 4, "bus": 5, "train": 6, "motorcycle": 7, "motor": 7},
    **{"bicycle": 8, "bike": 8},
}
REGION_NAMES = ("other person", "other vehicle", "trailer")


@cache
def record() -> Json:
    """Frames, predictions and what the toolkit makes of them; the file says how it was recorded."""
    return json.loads(RECORD.read_text())


def is_region(label: Json) -> bool:
    """Whether a Scalabel label is a crowd or ignored region."""
    attributes = label["attributes"]
    return label["category"] in REGION_NAMES or attributes.get("crowd", False) or attributes.get("ignored", False)


def write_images(root: Path, split: str, names: list[str], size: tuple[int, int]) -> Path:
    """Write gray images of ``size`` (height, width); returns the folder ``bdd100k``."""
    folder = root / "bdd100k"
    images = folder / "images" / "10k" / split
    images.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size[::-1], (90, 90, 90)).save(images / name)
    return folder


def write_frames(folder: Path, split: str, source: str, frames: Any) -> Path:
    """Write the JSON of ``rles`` or ``polygons``."""
    path = folder / "labels" / "ins_seg" / source / f"ins_seg_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(frames))
    return path


def write_bitmask(folder: Path, split: str, name: str, pixels: np.ndarray) -> Path:
    """Write the bitmask (H, W, 4) of the image ``name``."""
    path = folder / "labels" / "ins_seg" / "bitmasks" / split / f"{Path(name).stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def bitmask_of(frame: Json, size: tuple[int, int]) -> np.ndarray:
    """Bitmask (H, W, 4) of a frame whose RLEs do not overlap: category, attribute bits, instance id."""
    pixels = np.zeros((*size, 4), dtype=np.uint8)
    for label in frame["labels"]:
        attributes = {**label["attributes"], **({"ignored": True} if label["category"] in REGION_NAMES else {})}
        bits = sum(BITS[name] for name, value in attributes.items() if value)
        pixels[mask_util.decode(label["rle"]) == 1] = (CATEGORY_IDS[label["category"]], bits, 0, int(label["id"]))
    return pixels
