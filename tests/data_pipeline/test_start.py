"""The check at the start: every mistake in a dataset is one line, before anything is built."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from dimaskdino.config import Config
from dimaskdino.data import build_test_loader, build_train_loader, register_all
from dimaskdino.data.readers import PilReader
from dimaskdino.data.validation import files, start
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import ConfigError, DatasetError
from tests.data_pipeline.conftest import HEIGHT, POLYGON, WIDTH, Json

pytestmark = pytest.mark.usefixtures("registrations")

Write = Callable[[Json], tuple[Path, Path]]


@pytest.fixture
def mine(cfg: Config, coco: Json, write_coco: Write) -> Config:
    """A configuration that trains and tests on a sound dataset "mine"."""
    register_coco_instances("mine", {}, *(str(path) for path in write_coco(coco)))
    cfg.merge_from_list(["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",)])
    return cfg


@pytest.fixture
def listed(cfg: Config, tmp_path: Path) -> tuple[Config, list[Json]]:
    """A configuration that trains and tests on a function's dataset, and the images that the function lists."""
    entries = []
    for number in (1, 2):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
        box = {"category_id": 1, "bbox": [1, 1, 4, 3], "bbox_mode": BoxMode.XYXY_ABS, "segmentation": [list(POLYGON)]}
        entry = {"file_name": str(path), "image_id": number, "height": HEIGHT, "width": WIDTH, "annotations": [box]}
        entries.append(entry)
    DatasetCatalog.register("function", lambda: entries)
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    cfg.merge_from_list(["DATASETS.TRAIN", ("function",), "DATASETS.TEST", ("function",)])
    return cfg, entries


def message(cfg: Config, **which: bool) -> str:
    """The one line that the check answers with."""
    with pytest.raises(DatasetError) as error:
        check_datasets(cfg, **which)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(change: Callable[[Json], Any]) -> Path:
    """Change the annotation file of "mine"."""
    path = Path(MetadataCatalog.get("mine").json_file)
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))
    return path


def logged_table(cfg: Config, caplog: pytest.LogCaptureFixture) -> list[list[str]]:
    """The cells of the table that the check logs."""
    with caplog.at_level(logging.INFO):
        check_datasets(cfg)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines() if "|" in line]


def image_path(name: str) -> Path:
    return Path(MetadataCatalog.get("mine").image_root) / name


def test_sound_dataset_passes_with_a_table(mine: Config, caplog: pytest.LogCaptureFixture) -> None:
    rows = logged_table(mine, caplog)
    assert rows[0] == ["class", "kept", "images"]
    assert rows[2:] == [["ball", "0", "0"], ["box", "1", "1"], ["all", "1", "1"]]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_unknown_name_is_answered_with_the_closest(mine: Config) -> None:
    mine.DATASETS.TRAIN = ("coco_2017_trian",)
    assert "did you mean coco_2017_train?" in message(mine)
    mine.DATASETS.TEST = ("shape_val",)
    assert "did you mean shapes_val?" in message(mine, train=False)


def test_names_that_are_no_text_name_the_key(mine: Config) -> None:
    mine.DATASETS.TEST = ("mine", 3)
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is .*3"):
        check_datasets(mine)


def test_only_datasets_of_the_job_are_checked(mine: Config) -> None:
    mine.DATASETS.TRAIN = ("nowhere",)
    check_datasets(mine, train=False)
    mine.DATASETS.TRAIN, mine.DATASETS.TEST = ("mine",), ("nowhere",)
    check_datasets(mine, test=False)


def test_no_dataset_names_the_key(mine: Config) -> None:
    mine.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN"):
        check_datasets(mine)
    check_datasets(mine, train=False)
    mine.DATASETS.TEST = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST names no dataset"):
        check_datasets(mine, train=False)


def test_missing_coco_names_path_variable_and_layout(cfg: Config, tmp_path: Path) -> None:
    register_all(tmp_path)
    cfg.merge_from_list(["DATASETS.TRAIN", ("coco_2017_train",), "DATASETS.TEST", ()])
    annotations = tmp_path / "coco/annotations/instances_train2017.json"
    text = message(cfg)
    assert f"annotation file {annotations} does not exist" in text
    assert f"set DETECTRON2_DATASETS (now {tmp_path})" in text
    assert "coco/annotations/instances_train2017.json and coco/train2017/" in text
    annotations.parent.mkdir(parents=True)
    annotations.write_text("{}")
    assert f"image folder {tmp_path / 'coco/train2017'} does not exist" in message(cfg)


def test_missing_file_of_own_data_does_not_blame_the_variable(mine: Config) -> None:
    Path(MetadataCatalog.get("mine").json_file).unlink()
    text = message(mine)
    assert "annotations.json does not exist" in text
    assert "DETECTRON2_DATASETS" not in text


def test_class_count_names_both_numbers_key_and_dataset(mine: Config) -> None:
    mine.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80
    assert message(mine) == "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 80, but dataset mine has 2 classes; set it to 2."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_every_unicode_encoding_is_read(mine: Config, encoding: str) -> None:
    path = Path(MetadataCatalog.get("mine").json_file)
    path.write_bytes(path.read_text().replace("ball", "Bälle").encode(encoding))
    check_datasets(mine)
    assert len(list(build_test_loader(mine, "mine"))) == 2
    assert MetadataCatalog.get("mine").thing_classes == ["Bälle", "box"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ('{"a": "\ud800"}', "not valid JSON"),
        ("[" * 3000 + "]" * 3000, "nested too deep"),
        ("[]", "not in COCO's format"),
        ('{"images": [], "annotations": []}', '"categories"'),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "file_name"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no image"),
        ('{"images": [], "annotations": ["text"], "categories": []}', "not in COCO's format"),
    ],
)
def test_malformed_annotation_file_is_named(mine: Config, text: str, words: str) -> None:
    path = Path(MetadataCatalog.get("mine").json_file)
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    assert words in message(mine)
    assert str(path) in message(mine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda coco: coco["categories"][0].update(id=None), "has the id None"),
        (lambda coco: coco["categories"][0].update(id="3"), "some ids of categories are numbers and some are text"),
        (lambda coco: coco["categories"][0].update(name=None), "has the name None, not text"),
        (lambda coco: coco["images"][1].update(id="two"), "some ids of images are numbers"),
        (lambda coco: coco["images"][1].update(file_name=2), "has the file_name 2"),
        (lambda coco: coco["images"][1].pop("height"), "has the height None, not a whole number"),
        (lambda coco: coco["images"][1].update(height=6.0), r"has the height 6\.0"),
        (lambda coco: coco["images"][1].update(height=True), "has the height True"),
        (lambda coco: coco["images"][1].update(height=0), r"two\.png\) is 8x0 px"),
        (lambda coco: coco["images"][1].update(width=2**40), r"two\.png\) is 1099511627776x6 px"),
        (lambda coco: coco.update(annotations=None), '"annotations" is None'),
        (lambda coco: coco["annotations"][0].pop("id"), "has the id None"),
        (lambda coco: coco["annotations"][0].pop("category_id"), "with id 11, has the category_id None"),
        (lambda coco: coco["annotations"][0].update(image_id=[1]), r"with id 11, has the image_id \[1\]"),
        (lambda coco: coco["categories"].append({"id": 3, "name": "cone"}), "category id 3.*used more than once"),
        (lambda coco: coco["categories"].append({"id": 9, "name": "box"}), "category name 'box'.*used more than once"),
        (lambda coco: coco["images"][1].update(id=1), "image id 1 of one.png and two.png.*used more than once"),
        (
            lambda coco: coco["annotations"].append({**coco["annotations"][0], "image_id": 2}),
            "annotation 11.*used more",
        ),
        (lambda coco: coco["annotations"][0].update(image_id="1"), "annotation 11.*'1'"),
    ],
)
def test_entry_that_cannot_be_used_is_named(mine: Config, change: Callable[[Json], Any], words: str) -> None:
    path, found = rewrite(change), message(mine)
    assert re.search(words, found)
    assert str(path) in found


def test_annotations_of_unlisted_images_are_counted(mine: Config, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(lambda coco: coco["annotations"].append({**coco["annotations"][0], "image_id": 9, "ignore": 1, "id": 12}))
    check_datasets(mine)
    assert "image_id: not among the file's images (1, first annotation 12" in caplog.text
    build_train_loader(mine)
    rewrite(lambda coco: coco["annotations"].pop(0))
    assert "no annotation belongs to a listed image" in message(mine)


def test_repeated_ids_of_minival_files_pass(mine: Config, tmp_path: Path, write_coco: Write, coco: Json) -> None:
    coco["annotations"].append({**coco["annotations"][0], "image_id": 2})
    json_file, image_root = write_coco(coco)
    register_coco_instances("again", {}, str(json_file.rename(tmp_path / "minival.json")), str(image_root))
    mine.DATASETS.TEST = ("again",)
    check_datasets(mine, train=False)


def test_set_without_annotations_can_only_be_predicted(mine: Config) -> None:
    rewrite(lambda coco: coco.pop("annotations"))
    check_datasets(mine, train=False)
    assert message(mine) == "Dataset mine has no annotations, so it can be predicted but not trained on."


def test_changed_annotation_file_is_read_again(mine: Config) -> None:
    check_datasets(mine)
    rewrite(lambda coco: coco["categories"].append({"id": 9, "name": "cone"}))
    assert "has 3 classes" in message(mine)


def test_other_classes_than_registered_name_the_first(mine: Config) -> None:
    MetadataCatalog.get("mine").thing_classes = ["ball", "crate"]
    assert "class 1 is 'box', registered as 'crate'" in message(mine)


def register_with_classes(name: str, *class_names: str) -> None:
    """The sound dataset again, with other class names."""
    DatasetCatalog.register(name, lambda: DatasetCatalog.get("mine"))
    MetadataCatalog.get(name).thing_classes = list(class_names)


def test_training_datasets_with_other_classes_are_refused(mine: Config) -> None:
    register_with_classes("swapped", "box", "ball")
    register_with_classes("renamed", "ball", "crate")
    mine.DATASETS.TRAIN = ("mine", "swapped")
    assert "the same classes in another order: class 0 is 'ball' in mine and 'box' in swapped" in message(mine)
    mine.DATASETS.TRAIN = ("mine", "renamed")
    assert "cannot be trained on together: class 1 is 'box' in mine and 'crate' in renamed" in message(mine)


def test_test_dataset_with_classes_in_another_order_is_refused(mine: Config) -> None:
    register_with_classes("swapped", "box", "ball")
    mine.DATASETS.TEST = ("swapped",)
    assert "in another order" in message(mine)
    check_datasets(mine, train=False)
    mine.DATASETS.TEST = ("mine", "swapped")
    assert "in another order" in message(mine, train=False)


def test_test_dataset_with_other_class_names_gives_one_warning(mine: Config, caplog: pytest.LogCaptureFixture) -> None:
    register_with_classes("renamed", "ball", "crate")
    mine.DATASETS.TEST = ("mine", "renamed")
    check_datasets(mine)
    (record,) = [record for record in caplog.records if "class names" in record.message]
    assert "mine and renamed" in record.message
    assert "class 1 is 'box' in mine and 'crate' in renamed" in record.message


def test_images_that_two_datasets_share_are_noted(mine: Config, caplog: pytest.LogCaptureFixture) -> None:
    register_with_classes("again", "ball", "box")
    mine.DATASETS.TEST = ("mine", "again")
    check_datasets(mine)
    (record,) = [record for record in caplog.records if "new images" in record.message]
    assert record.message.startswith(f"1 images of again, such as {image_path('one.png')}, are in mine as well")
    caplog.clear()
    mine.DATASETS.TRAIN, mine.DATASETS.TEST = ("mine", "again"), ()
    check_datasets(mine)
    (record,) = [record for record in caplog.records if "background" in record.message]
    assert f"{image_path('one.png')}, are in again and in mine" in record.message


NORMALIZED = {"segmentation": [[0.1, 0.2, 0.5, 0.2, 0.5, 0.6, 0.1, 0.6]], "bbox": [0.1, 0.2, 0.4, 0.4], "area": 1}
AS_CORNERS = {"segmentation": [[3, 3, 6, 3, 6, 5, 3, 5]], "bbox": [3, 3, 6, 5]}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (NORMALIZED, "1 have coordinates that look normalized"),
        (AS_CORNERS, "1 have boxes that read as x1, y1, x2, y2"),
        ({"segmentation": [[20, 1, 24, 1, 24, 3]]}, "(1 outside the image); no object is left of class 'box'"),
    ],
)
@pytest.mark.parametrize("which", [{"train": False}, {"test": False}], ids=["test", "train"])
def test_dataset_that_loses_its_objects_is_refused(mine, change, cause, which):
    rewrite(lambda coco: coco["annotations"][0].update(change))
    text = message(mine, **which)
    assert cause in text
    assert "DATASETS.MAX_DROPPED_SHARE" in text
    mine.DATASETS.MAX_DROPPED_SHARE = 1.0
    check_datasets(mine, **which)


def test_dropped_objects_are_counted_by_class_and_reason(mine: Config, caplog: pytest.LogCaptureFixture) -> None:
    def add(coco: Json) -> None:
        first = coco["annotations"][0]
        coco["annotations"] += [{**first, "id": number} for number in range(20, 30)]
        coco["annotations"] += [
            {**first, "segmentation": [[1, 1, 4, 1, 2, 1]], "id": 12},
            {**first, "id": 13, "iscrowd": 1},
        ]

    rewrite(add)
    rows = logged_table(mine, caplog)
    assert rows[0] == ["class", "kept", "crowd", "no pixel", "images"]
    assert rows[3] == ["box", "11", "1", "1", "1"]
    mine.DATASETS.MAX_DROPPED_SHARE = 1 / 13
    assert "1 of 12 objects would be dropped (1 no pixel)" in message(mine)


def test_crowd_regions_alone_are_no_training_set(mine: Config, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(lambda coco: coco["annotations"][0].update(iscrowd=1))
    assert "No image with an object (apart from crowd regions) in mine" in message(mine)
    assert "class: all of its annotations are crowd regions (1, first class 'box')" in caplog.text
    check_datasets(mine, train=False)
    mine.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    check_datasets(mine)


def test_folds_are_checked_with_the_images(mine: Config) -> None:
    mine.DATASETS.FOLDS.NUM = 3
    assert "DATASETS.FOLDS.NUM is 3, but dataset mine has 2 images" in message(mine)
    mine.DATASETS.FOLDS.GROUP = "patient"
    assert "has no 'patient', which DATASETS.FOLDS.GROUP names" in message(mine, train=False)
    mine.merge_from_list(["DATASETS.FOLDS.GROUP", "", "DATASETS.FOLDS.NUM", 2])
    rewrite(lambda coco: coco["annotations"].append({**coco["annotations"][0], "id": 12, "image_id": 2}))
    image_path("one.png").unlink()

    def misses_it(fold: int) -> bool:
        mine.DATASETS.FOLDS.FOLD = fold
        try:
            check_datasets(mine, test=False)
        except DatasetError as error:
            return "one.png" in str(error)
        return False

    assert sorted(map(misses_it, (0, 1))) == [False, True]


def test_boxes_alone_suffice_without_masks(mine: Config) -> None:
    rewrite(lambda coco: coco["annotations"][0].pop("segmentation"))
    text = message(mine)
    assert "mine has boxes but no masks" in text
    assert "annotation 11" not in text
    check_datasets(mine, with_masks=False)
    rewrite(lambda coco: coco["annotations"][0].update(bbox=[0.1, 0.1, 0.5, 0.5]))
    with pytest.raises(DatasetError, match="look normalized"):
        check_datasets(mine, with_masks=False)
    rewrite(lambda coco: coco["annotations"][0].update(bbox=[3, 3, 6, 5]))
    with pytest.raises(DatasetError, match="x1, y1, x2, y2"):
        check_datasets(mine, with_masks=False)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"?")], ids=["missing", "unreadable"])
def test_damaged_image_is_named(mine: Config, damage: Callable[[Path], Any]) -> None:
    damage(image_path("one.png"))
    assert str(image_path("one.png")) in message(mine)


def test_pipe_in_place_of_an_image_is_refused(mine: Config) -> None:
    image_path("one.png").unlink()
    os.mkfifo(image_path("one.png"))
    assert str(image_path("one.png")) in message(mine)


def test_missing_images_of_each_use_are_counted(mine: Config) -> None:
    image_path("two.png").unlink()
    assert f"1 of 2 images of dataset mine do not exist, the first of them {image_path('two.png')};" in message(mine)
    check_datasets(mine, test=False)  # the image holds no object, so that training leaves it out
    mine.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert "1 of 2 images" in message(mine, test=False)
    mine.DATASETS.MAX_IMAGES = 1
    check_datasets(mine)


def turn(path: Path, orientation: int) -> None:
    """Store a photo of 8 x 6 pixels with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, format="JPEG", exif=exif)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_that_contradicts_the_size_names_the_key(mine: Config, orientation: int) -> None:
    turn(image_path("one.png"), orientation)
    for text in (message(mine), message(mine, train=False)):
        assert "EXIF" in text
        assert "set INPUT.APPLY_EXIF False" in text
        assert "one.png" in text
    mine.INPUT.APPLY_EXIF = False
    check_datasets(mine)
    rewrite(lambda coco: coco["images"][0].update(width=HEIGHT, height=WIDTH))
    assert "set INPUT.APPLY_EXIF True" in message(mine)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_exif_that_only_mirrors_is_said(mine: Config, orientation: int, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one.png", "two.png"):
        turn(image_path(name), orientation)
    check_datasets(mine)
    assert "2 images have an EXIF orientation" in caplog.text
    assert "2 of them one that mirrors" in caplog.text
    assert "INPUT.APPLY_EXIF True reads upright photos, False the pixels as stored" in caplog.text
    assert "one.png" in caplog.text


@pytest.mark.parametrize(("seconds", "number"), [(0.0, 3), (3600.0, 9)], ids=["no time", "time enough"])
def test_headers_are_read_evenly_and_then_in_time(mine, monkeypatch, caplog, seconds, number):
    image = Path(image_path("two.png")).read_bytes()
    for other in range(3, 10):
        image_path(f"{other}.png").write_bytes(image)
    sizes = {"width": WIDTH, "height": HEIGHT}
    rewrite(lambda coco: coco["images"].extend({"id": i, "file_name": f"{i}.png", **sizes} for i in range(3, 10)))
    read: list[str] = []
    header = PilReader.header
    monkeypatch.setattr(PilReader, "header", lambda self, path: read.append(Path(path).name) or header(self, path))
    monkeypatch.setattr(start, "LEAST_HEADERS", 3)
    monkeypatch.setattr(files, "MOST_SECONDS", seconds)
    mine.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    with caplog.at_level(logging.INFO):
        check_datasets(mine, test=False)
    assert read[:3] == ["one.png", "5.png", "9.png"]
    assert len(read) == len({*read}) == number
    assert f"the headers of {number} of 9 images" in caplog.text
    assert ("tools/check_dataset.py mine" in caplog.text) == (number < 9)
    read.clear()
    check_datasets(mine)
    assert read == ["one.png", "two.png", *(f"{number}.png" for number in range(3, 10))]  # tested on: all, once


def test_function_needs_class_names_images_and_annotations(listed: tuple[Config, list[Json]]) -> None:
    cfg, entries = listed
    check_datasets(cfg)
    MetadataCatalog.get("function").thing_classes += ["cone"]
    assert "has 3 classes" in message(cfg)
    del MetadataCatalog.get("function").thing_classes
    assert "no class names" in message(cfg)
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    del entries[0]["annotations"]
    check_datasets(cfg)
    del entries[1]["annotations"]
    check_datasets(cfg, train=False)
    assert message(cfg) == "Dataset function has no annotations, so it can be predicted but not trained on."
    entries.clear()
    assert "is empty" in message(cfg)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file_name": Path("1.png")}, "of dataset function has the file_name"),
        ({"height": 0}, "has the height 0; give it in whole pixels"),
        ({"width": "8"}, "has the width '8'; give it in whole pixels"),
        ({"annotations": None}, "has annotations that are not a list of dictionaries"),
        ({"annotations": [[1, 1, 4, 3]]}, "has annotations that are not a list of dictionaries"),
    ],
)
@pytest.mark.parametrize("which", [{"train": False}, {"test": False}], ids=["test", "train"])
def test_unusable_image_of_a_function_is_named(listed, change, words, which):
    cfg, entries = listed
    entries[1].update(change)
    text = message(cfg, **which)
    assert text.startswith("Image number 1, counted from 0, of dataset function")
    assert words in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.pop("image_id"), "image_id: not a number or text (None)"),
        (lambda entry: entry.update(image_id=np.int64(2)), "image_id: not a number or text"),
        (lambda entry: entry.update(image_id=["2"]), "image_id: not a number or text (['2'])"),
        (lambda entry: entry.update(image_id=1), "image_id: used more than once (1)"),
        (lambda entry: entry.pop("height"), "size: missing"),
    ],
)
def test_evaluation_needs_ids_and_sizes_of_a_function(listed, change, words):
    cfg, entries = listed
    change(entries[1])
    assert words in message(cfg, train=False)
    assert entries[1]["file_name"] in message(cfg, train=False)
    check_datasets(cfg, test=False)


def test_file_that_replaces_annotations_in_evaluation_is_checked(listed, coco, write_coco):
    cfg, entries = listed
    entries[1]["annotations"][0].pop("segmentation")
    json_file, _ = write_coco(coco)
    MetadataCatalog.get("function").json_file = str(json_file)
    check_datasets(cfg, train=False)
    assert "mask: missing" in message(cfg, test=False)
    coco["annotations"][0]["bbox"] = [1, 1, 3]
    write_coco(coco)
    assert "annotation 11 of one.png: box: not four finite numbers" in message(cfg, train=False)


def test_synthetic_dataset_is_made_by_the_check(cfg: Config, tmp_path: Path) -> None:
    cfg.merge_from_list(["DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",)])
    assert "dataset shapes_train has 6 classes" in message(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 6
    cfg.DATASETS.MAX_DROPPED_SHARE = 1.0
    check_datasets(cfg)
    assert Path(MetadataCatalog.get("shapes_val").json_file).is_relative_to(tmp_path / "shapes")
