"""Small COCO datasets written into a test's own folder, and configurations for them."""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dimaskdino.config import Config, get_cfg
from dimaskdino.data import datasets, parallel, register_all

Json = dict[str, Any]

WIDTH, HEIGHT = 8, 6
# Columns 1 to 3, rows 1 to 2 of the 8 x 6 image.
POLYGON = [1, 1, 4, 1, 4, 3, 1, 3]


@pytest.fixture
def registrations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test registers and the root that it sets."""
    monkeypatch.setattr(datasets, "_given_root", None)
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.undo()
    register_all()


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need not import the libraries anew; test_bdd100k.py has real ones."""
    monkeypatch.setattr(parallel, "get_context", lambda method: multiprocessing.get_context("fork"))


@pytest.fixture
def coco() -> Json:
    """Two images of 8 x 6 pixels, an object of class "box" in the first, none in the second; category ids 3 and 7."""
    return {
        "images": [
            {"id": 1, "file_name": "one.png", "width": WIDTH, "height": HEIGHT},
            {"id": 2, "file_name": "two.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {
                "id": 11,
                "image_id": 1,
                "category_id": 7,
                "segmentation": [POLYGON],
                "area": 6,
                "bbox": [1, 1, 3, 2],
                "iscrowd": 0,
            }
        ],
        "categories": [{"id": 3, "name": "ball"}, {"id": 7, "name": "box"}],
    }


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[[Json], tuple[Path, Path]]:
    """Write the images and the annotations; returns the annotation file and the image folder."""

    def write(coco: Json) -> tuple[Path, Path]:
        image_root = tmp_path / "images"
        image_root.mkdir(exist_ok=True)
        for image in coco["images"]:
            pixels = np.full((image["height"], image["width"], 3), 200, dtype=np.uint8)
            Image.fromarray(pixels).save(image_root / image["file_name"])
        json_file = tmp_path / "annotations.json"
        json_file.write_text(json.dumps(coco))
        return json_file, image_root

    return write


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """Two classes, tiny sizes, no random flip; shapes_train and shapes_val lie in the test's own folder."""
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2, "INPUT.FORMAT", "RGB", "INPUT.RANDOM_FLIP", "none"),
            *("INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SIZE_TEST", 12, "DATALOADER.NUM_WORKERS", 0),
            *("DATASETS.SHAPES.ROOT", str(tmp_path / "shapes"), "DATASETS.SHAPES.NUM_TRAIN", 4),
            *("DATASETS.SHAPES.NUM_VAL", 2, "DATASETS.SHAPES.IMAGE_SIZE", 64),
        ]
    )
    return cfg
