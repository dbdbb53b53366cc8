"""What is wrong with a dataset is said in one line, before anything is built."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from dimaskdino.config import Config
from dimaskdino.data import build_train_loader, register_all
from dimaskdino.data.checks import check_datasets
from dimaskdino.errors import ConfigError, DatasetError
from tests.data_pipeline.conftest import POLYGON, Json

pytestmark = pytest.mark.usefixtures("registrations")

Write = Callable[[Json], tuple[Path, Path]]


@pytest.fixture
def mine(cfg: Config, coco: Json, write_coco: Write) -> Config:
    """A configuration that trains and tests on a sound dataset "mine"."""
    register_coco_instances("mine", {}, *(str(path) for path in write_coco(coco)))
    cfg.merge_from_list(["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",)])
    return cfg


def message(cfg: Config, **which: bool) -> str:
    """The one line that the checks answer with."""
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


def test_a_sound_dataset_passes(mine: Config) -> None:
    check_datasets(mine)


def test_a_name_that_is_not_registered_is_answered_with_the_closest(mine: Config) -> None:
    mine.DATASETS.TRAIN = ("coco_2017_trian",)
    assert message(mine) == "Dataset coco_2017_trian is not registered; did you mean coco_2017_train?"
    mine.DATASETS.TEST = ("shape_val",)
    assert "did you mean shapes_val?" in message(mine, train=False)


def test_only_the_datasets_of_the_job_are_checked(mine: Config) -> None:
    mine.DATASETS.TRAIN = ("nowhere",)
    check_datasets(mine, train=False)
    mine.DATASETS.TRAIN, mine.DATASETS.TEST = ("mine",), ("nowhere",)
    check_datasets(mine, test=False)


def test_training_on_nothing_names_the_key(mine: Config) -> None:
    mine.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN"):
        check_datasets(mine)
    check_datasets(mine, train=False)


def test_evaluating_on_nothing_names_the_key(mine: Config) -> None:
    mine.DATASETS.TEST = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST names no dataset"):
        check_datasets(mine, train=False)
    check_datasets(mine)


def test_missing_coco_names_the_path_the_variable_and_the_layout(cfg: Config, tmp_path: Path) -> None:
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


def test_a_missing_file_of_another_dataset_does_not_blame_the_variable(mine: Config) -> None:
    Path(MetadataCatalog.get("mine").json_file).unlink()
    text = message(mine)
    assert "annotations.json does not exist" in text
    assert "DETECTRON2_DATASETS" not in text


def test_a_class_count_that_does_not_fit_names_both_numbers_the_key_and_the_dataset(mine: Config) -> None:
    mine.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80
    assert message(mine) == "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 80, but dataset mine has 2 categories; set it to 2."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not in COCO's format"),
        ("[]", "not in COCO's format"),
        ('{"images": [], "annotations": []}', "'categories'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "'file_name'"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no image"),
        ('{"images": [], "annotations": ["text"], "categories": []}', "not in COCO's format"),
    ],
)
def test_a_malformed_annotation_file_is_named(mine: Config, text: str, words: str) -> None:
    path = Path(MetadataCatalog.get("mine").json_file)
    path.write_text(text)
    assert words in message(mine)
    assert str(path) in message(mine)


def test_a_category_that_the_file_does_not_define_names_the_annotation(mine: Config) -> None:
    path = rewrite(lambda coco: coco["annotations"][0].update(category_id=5))
    assert f"Annotation 11 of {path} has category id 5" in message(mine)


@pytest.mark.parametrize(
    ("category", "words"),
    [({"id": 3, "name": "cone"}, "have the id 3;"), ({"id": 9, "name": "box"}, "have the name 'box';")],
)
def test_categories_that_share_an_id_or_a_name_are_refused(mine: Config, category: Json, words: str) -> None:
    path = rewrite(lambda coco: coco["categories"].append(category))
    assert f"2 categories of {path} {words}" in message(mine)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["id"], "Annotation number 0, counted from 0, of {path} has no id."),
        (["category_id"], "Annotation 11 of {path} has no category_id."),
        (["image_id", "category_id"], "Annotation 11 of {path} has no image_id and no category_id."),
    ],
)
def test_an_annotation_that_lacks_a_key_is_named(mine: Config, keys: list[str], words: str) -> None:
    path = rewrite(lambda coco: [coco["annotations"][0].pop(key) for key in keys])
    assert message(mine) == words.format(path=path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ignore": 1}, 'says "ignore", which detectron2 refuses'),
        ({"iscrowd": None}, "has iscrowd None, which is neither 0 nor 1"),
        ({"bbox": []}, "has the box [], which is no list of four finite numbers"),
        ({"bbox": 5}, "has the box 5,"),
        ({"segmentation": 5}, "has a segmentation that is neither a list of polygons"),
        ({"segmentation": [1, 1, 4, 1, 4, 3]}, "has a segmentation that is neither a list of polygons"),
        ({"segmentation": {"size": [6, 8]}}, "has an RLE without size or counts"),
        ({"segmentation": {"size": 6, "counts": [48]}}, "has an RLE without size or counts"),
        ({"segmentation": {"size": ["6", "8"], "counts": [48]}}, "has an RLE of another size than the image"),
        ({"segmentation": {"size": [6, 8], "counts": [7, None]}}, "has an RLE whose runs do not cover the image"),
    ],
)
def test_what_detectron2_would_stop_at_is_named_before_it_loads(mine: Config, change: Json, words: str) -> None:
    path = rewrite(lambda coco: coco["annotations"][0].update(change))
    assert f"Annotation 11 of {path} {words}" in message(mine)
    with pytest.raises((AssertionError, TypeError, ValueError, KeyError)):
        build_train_loader(mine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bbox": [1, 1, 3]}, "has the box [1, 1, 3], which is no list of four finite numbers"),
        ({"bbox": [1, 1, 3, float("nan")]}, "has the box [1, 1, 3, nan], which is no list"),
        ({"bbox": ["1", 1, 3, 2]}, "has the box ['1', 1, 3, 2], which is no list"),
        ({"segmentation": None}, "has no segmentation"),
        ({"segmentation": []}, "has no segmentation"),
        ({"segmentation": [[1, 1, 4, 1, 4, float("inf")]]}, "has a polygon with something else than finite numbers"),
        ({"segmentation": [POLYGON, [1, 1, 4, 1, 4, "3"]]}, "has a polygon with something else than finite numbers"),
        ({"segmentation": {"size": [6, 8], "counts": "abc"}}, "has an RLE whose runs do not cover the image"),
        ({"segmentation": {"size": [6.0, 8], "counts": [48]}}, "has an RLE of the size [6.0, 8], which must be whole"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, "has an RLE of another size than the image"),
    ],
)
@pytest.mark.parametrize("which", [{"train": False}, {"test": False}], ids=["test", "train"])
def test_what_training_or_evaluation_would_stop_at_is_named(
    mine: Config, change: Json, words: str, which: dict[str, bool]
) -> None:
    path = rewrite(lambda coco: coco["annotations"][0].update(change))
    assert f"Annotation 11 of {path} {words}" in message(mine, **which)


def test_a_box_of_negative_width_is_refused_where_it_is_evaluated(mine: Config) -> None:
    path = rewrite(lambda coco: coco["annotations"][0].update(bbox=[5, 1, -3, 2]))
    assert f"Annotation 11 of {path} has the box [5, 1, -3, 2], whose width or height is negative" in message(mine)
    check_datasets(mine, test=False)


def test_boxes_and_masks_of_crowd_regions_are_needed_for_evaluation_alone(mine: Config) -> None:
    path = rewrite(lambda coco: coco["annotations"][0].pop("bbox"))
    assert message(mine) == f"Annotation 11 of {path} has no bbox, which the evaluation needs."
    check_datasets(mine, test=False)
    rewrite(lambda coco: coco["annotations"][0].update(bbox=[1, 1, 3, 2], segmentation=[], iscrowd=1))
    assert "has no segmentation" in message(mine, train=False)
    check_datasets(mine, test=False)


@pytest.mark.parametrize("polygon", [[1, 1, 4, 3], [1, 1, 4, 1, 4, 3, 1]], ids=["two points", "odd"])
def test_polygons_that_detectron2_leaves_out_are_counted_and_never_all_of_an_object_that_is_evaluated(
    mine: Config, polygon: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(lambda coco: coco["annotations"][0].update(segmentation=[POLYGON, polygon, polygon]))
    check_datasets(mine)
    assert "2 polygons with fewer than three points or an odd number of coordinates" in caplog.text
    assert "the first in annotation 11, are left out of training, but not of the evaluation." in caplog.text
    rewrite(lambda coco: coco["annotations"][0].update(segmentation=[polygon]))
    assert f"has a polygon of {len(polygon)} numbers" in message(mine)
    check_datasets(mine, test=False)
    assert "the first in annotation 11, are left out of training." in caplog.text


def test_an_annotation_id_that_is_used_twice_is_named(mine: Config) -> None:
    path = rewrite(lambda coco: coco["annotations"].append({**coco["annotations"][0], "image_id": 2}))
    assert message(mine) == f"Annotation id 11 is used more than once in {path}; number the annotations anew."


def test_what_detectron2_does_not_load_may_be_anything(mine: Config) -> None:
    rewrite(lambda coco: coco["annotations"].append({**coco["annotations"][0], "image_id": 9, "ignore": 1}))
    check_datasets(mine)
    build_train_loader(mine)


def test_double_ids_of_a_minival_file_pass_as_detectron2_has_them_pass(
    mine: Config, tmp_path: Path, write_coco: Write, coco: Json
) -> None:
    coco["annotations"].append({**coco["annotations"][0], "image_id": 2})
    json_file, image_root = write_coco(coco)
    minival = json_file.rename(tmp_path / "minival.json")
    register_coco_instances("again", {}, str(minival), str(image_root))
    mine.DATASETS.TEST = ("again",)
    check_datasets(mine, train=False)


@pytest.mark.parametrize("keys", [["height"], ["height", "width"]])
def test_an_image_without_its_size_is_named(mine: Config, keys: list[str]) -> None:
    path = rewrite(lambda coco: [coco["images"][1].pop(key) for key in keys])
    assert message(mine) == f"Image 2 (two.png) of {path} has no {' and no '.join(keys)} in whole pixels."


@pytest.mark.parametrize("height", [6.0, 6.5, "6", 0, True])
def test_a_size_that_is_no_whole_number_of_pixels_is_refused(mine: Config, height: Any) -> None:
    path = rewrite(lambda coco: coco["images"][1].update(height=height))
    assert message(mine) == f"Image 2 (two.png) of {path} has no height in whole pixels."


@pytest.mark.parametrize(
    "change",
    [
        lambda coco: coco["categories"][0].update(id=None),
        lambda coco: coco["images"][1].update(id="two"),
        lambda coco: coco["images"][1].update(file_name=2),
        lambda coco: coco.update(annotations=0),
    ],
)
def test_ids_and_names_of_another_kind_end_with_one_line(mine: Config, change: Callable[[Json], Any]) -> None:
    path = rewrite(change)
    assert str(path) in message(mine)


def test_a_test_set_without_annotations_can_be_predicted_but_not_trained_on(mine: Config) -> None:
    rewrite(lambda coco: coco.pop("annotations"))
    check_datasets(mine, train=False)
    assert message(mine) == "Dataset mine has no annotations, so it can be predicted but not trained on."


def test_annotations_that_are_null_are_refused(mine: Config) -> None:
    path = rewrite(lambda coco: coco.update(annotations=None))
    assert f'{path} has "annotations": null' in message(mine, train=False)


def test_a_changed_annotation_file_is_read_again(mine: Config) -> None:
    check_datasets(mine)
    rewrite(lambda coco: coco["categories"].append({"id": 9, "name": "cone"}))
    assert "has 3 categories" in message(mine)


def test_a_file_with_other_classes_than_registered_is_told_apart(mine: Config) -> None:
    MetadataCatalog.get("mine").thing_classes = ["ball", "crate"]
    assert "is registered with 2 classes" in message(mine)


def register_with_classes(name: str, *class_names: str) -> None:
    """The sound dataset again, its classes named otherwise."""
    DatasetCatalog.register(name, lambda: DatasetCatalog.get("mine"))
    MetadataCatalog.get(name).thing_classes = list(class_names)


def test_training_datasets_with_other_classes_are_refused(mine: Config) -> None:
    register_with_classes("swapped", "box", "ball")
    register_with_classes("renamed", "ball", "crate")
    mine.DATASETS.TRAIN = ("mine", "swapped")
    text = message(mine)
    assert "Datasets mine and swapped have the same classes in another order" in text
    assert "class 0 is 'ball' in mine and 'box' in swapped" in text
    mine.DATASETS.TRAIN = ("mine", "renamed")
    text = message(mine)
    assert text == (
        "Datasets mine and renamed cannot be trained on together: class 1 is 'box' in mine and 'crate' in renamed."
    )


def test_a_test_dataset_with_the_classes_in_another_order_is_refused(mine: Config) -> None:
    register_with_classes("swapped", "box", "ball")
    mine.DATASETS.TEST = ("swapped",)
    assert "Datasets mine and swapped have the same classes in another order" in message(mine)
    check_datasets(mine, train=False)
    mine.DATASETS.TEST = ("mine", "swapped")
    assert "in another order" in message(mine, train=False)


def test_a_test_dataset_with_classes_of_other_names_is_warned_of_once(
    mine: Config, caplog: pytest.LogCaptureFixture
) -> None:
    register_with_classes("renamed", "ball", "crate")
    mine.DATASETS.TEST = ("mine", "renamed")
    check_datasets(mine)
    (record,) = [
        record for record in caplog.records if record.levelno == logging.WARNING and "other names" in record.message
    ]
    assert "mine and renamed" in record.message
    assert "class 1 is 'box' in mine and 'crate' in renamed" in record.message


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"?")], ids=["missing", "unreadable"])
def test_a_damaged_first_image_is_named(mine: Config, damage: Callable[[Path], Any]) -> None:
    first = Path(MetadataCatalog.get("mine").image_root) / "one.png"
    damage(first)
    assert str(first) in message(mine)


def test_images_of_a_test_dataset_that_are_missing_are_counted_before_anything_is_built(mine: Config) -> None:
    second = Path(MetadataCatalog.get("mine").image_root) / "two.png"
    second.unlink()
    answer = message(mine, train=False)
    assert answer.startswith(f"1 of 2 images of dataset mine do not exist, the first of them {second};")
    check_datasets(mine, test=False)
    mine.DATASETS.MAX_IMAGES = 1
    check_datasets(mine)


def test_a_dataset_registered_as_a_function_is_checked_too(mine: Config) -> None:
    entries = DatasetCatalog.get("mine")
    DatasetCatalog.register("function", lambda: entries)
    mine.merge_from_list(["DATASETS.TRAIN", ("function",)])
    assert "no class names" in message(mine)
    MetadataCatalog.get("function").thing_classes = ["ball", "box", "cone"]
    assert "has 3 categories" in message(mine)
    mine.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    check_datasets(mine, test=False)
    entries.clear()
    assert "is empty" in message(mine)


def test_a_function_whose_images_have_no_annotations_can_be_predicted_but_not_trained_on(mine: Config) -> None:
    entries = DatasetCatalog.get("mine")
    DatasetCatalog.register("function", lambda: entries)
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    mine.merge_from_list(["DATASETS.TRAIN", ("function",), "DATASETS.TEST", ("function",)])
    del entries[0]["annotations"]
    check_datasets(mine)
    del entries[1]["annotations"]
    check_datasets(mine, train=False)
    assert message(mine) == "Dataset function has no annotations, so it can be predicted but not trained on."


def test_a_function_may_name_an_annotation_file_without_a_folder(mine: Config, tmp_path: Path) -> None:
    register_with_classes("function", "ball", "box")
    MetadataCatalog.get("function").set(json_file=str(tmp_path / "annotations.json"), evaluator_type="coco")
    mine.merge_from_list(["DATASETS.TRAIN", ("function",), "DATASETS.TEST", ("function",)])
    check_datasets(mine)


def test_the_synthetic_dataset_is_made_by_the_check(cfg: Config, tmp_path: Path) -> None:
    cfg.merge_from_list(["DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",)])
    assert "dataset shapes_train has 6 categories" in message(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 6
    check_datasets(cfg)
    assert Path(MetadataCatalog.get("shapes_val").json_file).is_relative_to(tmp_path / "shapes")
