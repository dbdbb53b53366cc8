"""A dataset that a function lists: what is wrong is said in one line that names the image, before anything is built."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.config import Config
from dimaskdino.data import build_train_loader
from dimaskdino.data.checks import check_datasets
from dimaskdino.errors import DatasetError
from tests.data_pipeline.conftest import HEIGHT, POLYGON, WIDTH, Json

pytestmark = pytest.mark.usefixtures("registrations")

XYXY, XYWH = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS


@pytest.fixture
def listed(cfg: Config, tmp_path: Path) -> tuple[Config, list[Json]]:
    """A configuration that trains and tests on a function's dataset, and the images that the function lists."""
    entries = []
    for number in (1, 2):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
        box = {"category_id": 1, "bbox": [1, 1, 4, 3], "bbox_mode": XYXY, "segmentation": [list(POLYGON)]}
        entry = {"file_name": str(path), "image_id": number, "height": HEIGHT, "width": WIDTH, "annotations": [box]}
        entries.append(entry)
    DatasetCatalog.register("function", lambda: entries)
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    cfg.merge_from_list(["DATASETS.TRAIN", ("function",), "DATASETS.TEST", ("function",)])
    return cfg, entries


def message(cfg: Config, **which: bool) -> str:
    """The one line that the checks answer with."""
    with pytest.raises(DatasetError) as error:
        check_datasets(cfg, **which)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_lists_tuples_and_arrays_pass(listed: tuple[Config, list[Json]]) -> None:
    cfg, entries = listed
    check_datasets(cfg)
    annotation = entries[1]["annotations"][0]
    annotation.update(bbox=np.array([1, 1, 3, 2]), bbox_mode=XYWH, category_id=np.int64(0), iscrowd=np.bool_(False))
    annotation["segmentation"] = [np.array(POLYGON), tuple(POLYGON)]
    entries[1].update(height=np.int64(HEIGHT), image_id="two")
    check_datasets(cfg)
    annotation["segmentation"] = mask_util.encode(np.ones((HEIGHT, WIDTH), dtype=np.uint8, order="F"))
    check_datasets(cfg)
    assert next(iter(build_train_loader(cfg)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"category_id": 2}, "has the category_id 2; classes are numbered from 0 to 1, as in thing_classes"),
        ({"category_id": -1}, "has the category_id -1;"),
        ({"category_id": "box"}, "has the category_id 'box';"),
        ({"category_id": None}, "has the category_id None;"),
        ({"iscrowd": 2}, "has iscrowd 2, which is neither 0 nor 1"),
        ({"segmentation": None}, "has no segmentation"),
        ({"segmentation": np.ones((HEIGHT, WIDTH))}, "has an array as segmentation; give pycocotools.mask.encode("),
        (
            {"segmentation": [[(1, 1), (4, 1), (4, 3)]]},
            "has a polygon with something else than finite numbers x, y, x, y",
        ),
        ({"segmentation": [POLYGON, [1, 1, 4, 1]]}, "has a polygon of 4 numbers"),
        ({"segmentation": {"size": [6, 9], "counts": [54]}}, "has an RLE of another size than the image"),
    ],
)
@pytest.mark.parametrize("which", [{"train": False}, {"test": False}], ids=["test", "train"])
def test_what_neither_training_nor_evaluation_can_use_is_named(
    listed: tuple[Config, list[Json]], change: Json, words: str, which: dict[str, bool]
) -> None:
    cfg, entries = listed
    entries[1]["annotations"][0].update(change)
    place = f"Annotation number 0, counted from 0, of {entries[1]['file_name']} (dataset function)"
    assert f"{place} {words}" in message(cfg, **which)
    entries[1]["annotations"][0]["id"] = 11
    assert message(cfg, **which).startswith(f"Annotation 11 of {entries[1]['file_name']}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bbox_mode": None}, "has the bbox_mode None; give detectron2's BoxMode.XYXY_ABS or BoxMode.XYWH_ABS"),
        ({"bbox_mode": BoxMode.XYWHA_ABS}, "has the bbox_mode <BoxMode.XYWHA_ABS"),
        ({"bbox": [1, 1, 3]}, "has the box [1, 1, 3], which is no list of four finite numbers"),
        ({"bbox": [4, 3, 3, 2]}, "has the box [4, 3, 3, 2], of negative width or height as XYXY_ABS"),
        ({"bbox": [4, 3, 3, -2], "bbox_mode": XYWH}, "of negative width or height as XYWH_ABS"),
    ],
)
def test_boxes_are_needed_for_evaluation_alone(listed: tuple[Config, list[Json]], change: Json, words: str) -> None:
    cfg, entries = listed
    entries[1]["annotations"][0].update(change)
    assert words in message(cfg, train=False)
    check_datasets(cfg, test=False)
    del entries[1]["annotations"][0]["bbox"]
    assert "has no bbox, which the evaluation needs" in message(cfg, train=False)
    check_datasets(cfg, test=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file_name": Path("1.png")}, "of dataset function has the file_name"),
        ({"height": 0}, "has the height 0; give it in whole pixels"),
        ({"width": "8"}, "has the width '8'; give it in whole pixels"),
        ({"annotations": None}, "has annotations that are no list of dictionaries"),
        ({"annotations": [[1, 1, 4, 3]]}, "has annotations that are no list of dictionaries"),
    ],
)
@pytest.mark.parametrize("which", [{"train": False}, {"test": False}], ids=["test", "train"])
def test_an_image_that_cannot_be_used_is_named(
    listed: tuple[Config, list[Json]], change: Json, words: str, which: dict[str, bool]
) -> None:
    cfg, entries = listed
    entries[1].update(change)
    answer = message(cfg, **which)
    assert answer.startswith("Image number 1, counted from 0, of dataset function")
    assert words in answer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.pop("image_id"), "has the image_id None; give each image a number or a text"),
        (lambda entry: entry.update(image_id=np.int64(2)), "has the image_id"),
        (lambda entry: entry.update(image_id=["2"]), "has the image_id ['2']"),
        (lambda entry: entry.update(image_id=1), "have the image_id 1; give each its own"),
        (lambda entry: entry.pop("height"), "has the height None"),
    ],
)
def test_ids_and_sizes_are_needed_for_evaluation_alone(
    listed: tuple[Config, list[Json]], change: Callable[[Json], Any], words: str
) -> None:
    cfg, entries = listed
    change(entries[1])
    assert words in message(cfg, train=False)
    check_datasets(cfg, test=False)


def test_annotations_that_a_file_replaces_in_the_evaluation_may_be_anything(
    listed: tuple[Config, list[Json]], tmp_path: Path
) -> None:
    cfg, entries = listed
    entries[1]["annotations"][0].pop("segmentation")
    MetadataCatalog.get("function").json_file = str(tmp_path / "truth.json")
    check_datasets(cfg, train=False)
    assert "has no segmentation" in message(cfg, test=False)
