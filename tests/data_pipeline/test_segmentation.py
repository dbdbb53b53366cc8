"""Panoptic and semantic datasets: registered by keys, mapped to objects, and checked before anything is built."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from dimaskdino.analysis.stages import read_dataset
from dimaskdino.config import Config, get_cfg
from dimaskdino.data import build_mapper, build_test_loader, build_train_loader, register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.label_maps import read_label_map, read_semantic
from dimaskdino.data.readers import PilReader, image_reader
from dimaskdino.data.validation.segmentation import inspect_segmentation
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.engine.pictures import picture_inputs
from dimaskdino.errors import ConfigError, DatasetError, UserError
from dimaskdino.evaluation import ImageEvaluator
from tests.data_pipeline.label_maps import (
    CATEGORIES,
    NAMES,
    SEGMENTS,
    SIZE,
    color,
    label_map,
    write_panoptic,
    write_semantic,
)
from tests.data_pipeline.scripts import run_script
from tests.data_pipeline.test_own_data import write_coco

pytestmark = pytest.mark.usefixtures("registrations")

TASKS = {
    "panoptic": {"INPUT.DATASET_MAPPER_NAME": "coco_panoptic_lsj", "MODEL.MaskDINO.TEST.PANOPTIC_ON": True},
    "semantic": {"INPUT.DATASET_MAPPER_NAME": "mask_former_semantic", "MODEL.MaskDINO.TEST.INSTANCE_ON": False},
}
IGNORE_VALUE = "MODEL.SEM_SEG_HEAD.IGNORE_VALUE"
COMMON = {
    **{"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3, "INPUT.IMAGE_SIZE": 32, "INPUT.FORMAT": "RGB"},
    **{
        "INPUT.MIN_SIZE_TRAIN": (16,),
        "INPUT.MIN_SIZE_TEST": 16,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
    },
}


def configured(kind: str, keys: dict[str, Any], **more: Any) -> Config:
    """A configuration that trains and tests on the datasets that ``keys`` name, after they are registered."""
    cfg = get_cfg()
    names = {"DATASETS.TRAIN": (f"{kind}_train",), "DATASETS.TEST": (f"{kind}_val",)}
    pairs = COMMON | TASKS[kind] | names | keys | more
    cfg.merge_from_list([item for pair in pairs.items() for item in pair])
    register_all(cfg=cfg)
    return cfg


@pytest.fixture
def panoptic(tmp_path: Path) -> Config:
    return configured("panoptic", write_panoptic(tmp_path / "set"))


@pytest.fixture
def semantic(tmp_path: Path) -> Config:
    return configured("semantic", write_semantic(tmp_path / "set"))


def test_panoptic_classes_follow_the_category_ids(panoptic):
    metadata = MetadataCatalog.get("panoptic_train")
    assert metadata.stuff_classes == NAMES
    assert metadata.thing_dataset_id_to_contiguous_id == {0: 0, 4: 1}
    assert metadata.stuff_dataset_id_to_contiguous_id == {9: 2}
    first, second = load_dataset("panoptic_train")
    assert [(each["category_id"], each["isthing"]) for each in first["segments_info"]] == [
        (0, True),
        (2, False),
        (0, True),
    ]
    assert second["image_id"] == 2
    assert (second["height"], second["width"]) == SIZE


def test_segments_are_objects_with_the_boxes_of_their_masks(panoptic):
    mapper = build_mapper(panoptic, is_train=False, with_instances=True)
    first, second = (mapper(entry)["instances"] for entry in load_dataset("panoptic_train"))
    assert first.gt_classes.tolist() == [0, 2, 0]
    assert first.gt_boxes.tensor.tolist() == [[0, 0, 10, 8], [0, 8, 24, 16], [10, 0, 20, 6]]
    assert first.gt_masks.tensor.sum((1, 2)).tolist() == [80, 192, 60]
    # The crowd of the second image is left out.
    assert second.gt_classes.tolist() == [1, 2]
    assert second.gt_boxes.tensor.tolist() == [[3, 2, 15, 9], [0, 0, 24, 2]]


def test_crowd_segments_are_regions_by_key(panoptic):
    entries = load_dataset("panoptic_train")
    assert not any("crowd_regions" in each for each in map(build_mapper(panoptic, is_train=True), entries))
    panoptic.MODEL.IGNORE_CROWD_SHARE = 0.5
    mapper = build_mapper(panoptic, is_train=False, with_instances=True)
    for segment in entries[0]["segments_info"]:
        del segment["iscrowd"]
    first, second = (mapper(entry)["crowd_regions"] for entry in entries)
    assert len(first) == 0
    assert second.gt_classes.tolist() == [0]
    assert second.gt_masks.tensor[0, 10:16, :6].all()
    assert second.gt_masks.tensor.sum() == 36


def test_a_class_is_one_object_of_a_semantic_image(semantic):
    mapper = build_mapper(semantic, is_train=False, with_instances=True)
    first, second = (mapper(entry)["instances"] for entry in load_dataset("semantic_train"))
    assert first.gt_classes.tolist() == [0, 2]
    # Two cells in one mask; 255 is in none.
    assert first.gt_boxes.tensor.tolist() == [[0, 0, 20, 8], [0, 8, 24, 16]]
    assert first.gt_masks.tensor.sum((1, 2)).tolist() == [140, 192]
    assert second.gt_classes.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_masks_stay_on_their_pixels(kind, tmp_path):
    write = {"panoptic": write_panoptic, "semantic": write_semantic}[kind]
    options = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": (12, 14)}
    options |= {"INPUT.SIZE_DIVISIBILITY": 20, "INPUT.MIN_SCALE": 0.9, "INPUT.MAX_SCALE": 1.5}
    cfg = configured(kind, write(tmp_path / "set"), **options)
    mapper, entries = build_mapper(cfg, is_train=True), load_dataset(f"{kind}_train")
    np.random.seed(0)
    seen = 0
    for index in range(20):
        mapped = mapper(entries[index % 2])
        image, objects = mapped["image"], mapped["instances"]
        assert image.shape == ((3, 20, 20) if kind == "semantic" else (3, 32, 32))
        for label, mask in zip(objects.gt_classes.tolist(), objects.gt_masks.tensor, strict=True):
            # Resizing blends the colors of a border.
            off = (image.float() - torch.tensor(color(label)).view(3, 1, 1)).abs().amax(0)[mask] > 8
            assert off.float().mean() < 0.4
            seen += 1
    assert seen > 30


def test_a_crop_of_several_classes_is_preferred(tmp_path):
    options = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": (8, 8)}
    several = []
    for share in (1.0, 0.75):
        keys = write_semantic(tmp_path / f"{share}")
        cfg = configured("semantic", keys, **options, **{"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": share})
        mapper, entry = build_mapper(cfg, is_train=True), load_dataset("semantic_train")[0]
        np.random.seed(0)
        several.append(sum(len(mapper(entry)["instances"]) > 1 for _ in range(30)))
    assert several[0] < 25
    assert several[1] > 27


@pytest.mark.parametrize("is_thing", [0, 1])
def test_only_things_or_only_stuff(is_thing, tmp_path, caplog):
    keys = write_panoptic(tmp_path / "set")
    change_json(tmp_path, lambda content: [each.update(isthing=is_thing) for each in content["categories"]])
    cfg = configured("panoptic", keys)
    with caplog.at_level(logging.INFO):
        check_datasets(cfg)
    assert ("panoptic_val has no things" in caplog.text) == (not is_thing)
    metadata = MetadataCatalog.get("panoptic_train")
    ids = metadata.thing_dataset_id_to_contiguous_id, metadata.stuff_dataset_id_to_contiguous_id
    assert ids[1 - is_thing] == {0: 0, 4: 1, 9: 2}
    assert ids[is_thing] == {}
    cfg.merge_from_list(["MODEL.MaskDINO.TEST.PANOPTIC_ON", False, "MODEL.MaskDINO.TEST.SEMANTIC_ON", False])
    if is_thing:
        check_datasets(cfg)
    else:
        assert_refused(lambda: check_datasets(cfg), ["INSTANCE_ON", "panoptic_val", "without things", "PANOPTIC_ON"])
    del MetadataCatalog.get("panoptic_val").thing_dataset_id_to_contiguous_id
    assert_refused(lambda: check_datasets(cfg, train=False), ["panoptic_val", "thing_dataset_id_to_contiguous_id"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda categories: categories[1].update(isthing=0), ["'cell' is a thing in panoptic_train and stuff in"]),
        (lambda categories: categories.append({"id": 5, "name": "new", "isthing": 0}), ["val has 4 classes; give it"]),
    ],
    ids=["stuff", "class"],
)
def test_a_set_to_test_on_has_the_classes_and_things_of_training(change, words, tmp_path):
    keys = write_panoptic(tmp_path / "set")
    content = json.loads((tmp_path / "set" / "panoptic.json").read_text())
    change(content["categories"])
    (tmp_path / "val.json").write_text(json.dumps(content))
    cfg = configured("panoptic", keys | {"DATASETS.PANOPTIC.VAL_JSON": str(tmp_path / "val.json")})
    assert_refused(lambda: check_datasets(cfg), [*words, "panoptic_train", "panoptic_val"])
    check_datasets(configured("panoptic", keys))  # the keys name the other file again


def test_images_of_16_bits_and_turned_photos(tmp_path):
    keys = write_semantic(tmp_path / "set") | {"INPUT.READER": "OpenCvReader"}
    for path in (tmp_path / "set" / "images").rglob("*.png"):
        Image.fromarray(np.full(SIZE, 40000, dtype=np.uint16)).save(path)
    cfg = configured("semantic", keys, **{"MODEL.PIXEL_MEAN": [30000.0], "MODEL.PIXEL_STD": [9000.0]})
    check_datasets(cfg)
    assert inspect_segmentation("semantic_val", ignore=255, apply_exif=True, reader=image_reader(cfg))[2] == []
    quarter_turn = Image.Exif()
    quarter_turn[0x0112] = 6
    for path in (tmp_path / "set" / "images").rglob("*.png"):
        Image.new("RGB", SIZE[::-1]).save(path, exif=quarter_turn)
    cfg = configured("semantic", keys | {"INPUT.READER": ""})
    assert_refused(lambda: check_datasets(cfg), ["labels/below/1.png is 24x16", "INPUT.APPLY_EXIF False"])
    cfg.INPUT.APPLY_EXIF = False
    check_datasets(cfg)


def test_sets_of_several_kinds_go_together(tmp_path):
    keys = write_panoptic(tmp_path / "panoptic") | write_semantic(tmp_path / "semantic")
    names = {"DATASETS.TRAIN": ("panoptic_train", "semantic_train"), "DATASETS.TEST": ("semantic_val", "panoptic_val")}
    cfg = configured("semantic", keys | names)
    check_datasets(cfg)
    assert len(next(iter(build_train_loader(cfg)))) == 2
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    for name in names["DATASETS.TEST"]:  # what pictures and losses of a test set are made of
        assert len(picture_inputs(cfg, name, 1)[0]["instances"]) > 0


@pytest.mark.parametrize(("kind", "classes"), [("panoptic", [0, 2, 0]), ("semantic", [0, 2])])
def test_tools_and_own_evaluators_see_the_labels(kind, classes, tmp_path, monkeypatch):
    write = {"panoptic": write_panoptic, "semantic": write_semantic}[kind]
    keys = write(tmp_path / "set") | {"INPUT.IMAGE_SIZE": 32}
    cfg = configured(kind, keys)
    evaluator = ImageEvaluator(cfg, f"{kind}_val", "")
    image = {"image_id": load_dataset(f"{kind}_val")[0]["image_id"], "height": SIZE[0], "width": SIZE[1]}
    assert evaluator.truth(image).gt_classes.tolist() == classes
    options = [
        "--augmented",
        "--draw",
        1,
        "--output",
        tmp_path,
        "--keys",
        *(item for pair in keys.items() for item in pair),
    ]
    assert run_script(monkeypatch, "tools/check_dataset.py", f"{kind}_train", *options) == 0
    assert [path.name for path in (tmp_path / f"{kind}_train").iterdir()] == ["1_augmented.png"]
    assert_refused(lambda: read_dataset(cfg, f"{kind}_val", 2), [f"{kind} labels", "--dataset"])


def test_a_class_with_the_ignored_number_is_told(tmp_path, caplog):
    check_datasets(configured("semantic", write_semantic(tmp_path / "set")))
    assert "'bug'" not in caplog.text
    with pytest.raises(DatasetError, match="label 255"):
        check_datasets(configured("semantic", write_semantic(tmp_path / "one"), **{IGNORE_VALUE: 1}))
    assert "IGNORE_VALUE is 1, the label of the class 'bug'" in caplog.text


def test_other_folders_of_the_same_files_count(tmp_path):
    keys = write_panoptic(tmp_path / "set")
    configured("panoptic", keys)
    cfg = configured("panoptic", keys | {"DATASETS.PANOPTIC.TRAIN_LABELS": "elsewhere"})
    assert load_dataset("panoptic_train")[0]["pan_seg_file_name"] == "elsewhere/1.png"
    write_coco(tmp_path / "own.json", images=2)
    cfg.DATASETS.TRAIN_JSON = str(tmp_path / "own.json")
    for folder in ("photos", "elsewhere"):
        cfg.DATASETS.TRAIN_IMAGES = folder
        register_all(cfg=cfg)
    assert load_dataset("own_train")[0]["file_name"] == "elsewhere/0.png"


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_sound_sets_pass_and_load(kind, request, caplog):
    cfg = request.getfixturevalue(kind)
    with caplog.at_level(logging.INFO, logger="dimaskdino"):
        check_datasets(cfg)
    assert "3 classes" in caplog.text
    assert f"2 images of {kind}_val, such as" in caplog.text  # which are those of training
    assert ("IGNORE_VALUE" in caplog.text) == (kind == "semantic")
    batch = next(iter(build_train_loader(cfg)))
    assert all(len(each["instances"]) for each in batch)
    tested = [each for batch in build_test_loader(cfg, f"{kind}_val") for each in batch]
    assert len(tested) == 2
    assert "instances" not in tested[0]
    assert ("segments_info" if kind == "panoptic" else "sem_seg_file_name") in tested[0]


def test_rare_classes_can_be_repeated_in_panoptic_sets_alone(panoptic, tmp_path):
    panoptic.merge_from_list(["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"])
    assert len(next(iter(build_train_loader(panoptic)))) == 2
    keys = write_semantic(tmp_path / "semantic")
    cfg = configured("semantic", keys, **{"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"})
    assert_refused(lambda: next(iter(build_train_loader(cfg))), ["SAMPLER_TRAIN", "TrainingSampler"])


def test_semantic_truth_of_a_panoptic_image(panoptic):
    first, second = load_dataset("panoptic_val")
    labels = read_semantic(first, num_classes=3, ignore=255)
    assert np.array_equal(labels, label_map(SEGMENTS[0], [0, 2, 0], 255))
    # Crowd regions have no class.
    assert 0 not in read_semantic(second, num_classes=3, ignore=255)


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_label_maps_may_have_a_palette_or_16_bits(mode, tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(labels if mode == "P" else labels.astype(np.uint16))
    if mode == "P":
        image.putpalette([200, 0, 0] * 256)
    image.save(tmp_path / "labels.png")
    assert Image.open(tmp_path / "labels.png").mode == mode
    assert np.array_equal(read_label_map(str(tmp_path / "labels.png")), labels)


def change_json(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path = tmp_path / "set" / "panoptic.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    os.utime(path, ns=(1, 1))


def segment(content: Any, **values: Any) -> None:
    content["annotations"][0]["segments_info"][0].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: segment(content, category_id=5), ["1.png", "category_id 5"]),
        (lambda content: segment(content, id=2000), ["1.png", "id 2000"]),
        (lambda content: segment(content, id=0), ["1.png", "id 0"]),
        (lambda content: segment(content, id=77), ["labels/1.png", "segment id 1000"]),
        (lambda content: content["categories"][0].pop("isthing"), ["categories", "isthing"]),
        (lambda content: content["categories"].append(CATEGORIES[0]), ["categories", "id more than once"]),
        (lambda content: content["images"][1].update(id="2"), ["some id of images are numbers"]),
        (lambda content: content["annotations"][0].update(image_id=7), ["1.png", "image 7"]),
        (lambda content: content.pop("images"), ["images", "missing"]),
        (lambda content: segment(content, category_id=[4]), ["1.png", "category_id [4]"]),
        (lambda content: segment(content, id=[4]), ["1.png", "id [4]"]),
        (lambda content: content["annotations"][0].update(segments_info=None), ["segments_info None"]),
        (lambda content: content["annotations"][0].update(segments_info=[3]), ["1.png", "3 in segments_info"]),
        (lambda content: content["categories"][0].update(isthing="no"), ["categories", "isthing 'no'"]),
        (lambda content: content["categories"][0].update(id=[9]), ["categories", "id [9]"]),
        (lambda content: content["images"][1].update(file_name=2), ["number 1", "images", "file_name 2"]),
        (lambda content: content["images"][0].update(height=9), ["images/1.png", "24x16", "24x9"]),
        (lambda content: content["images"][0].update(file_name="gone.png"), ["images", "gone.png"]),
        (lambda content: content["annotations"][0].update(file_name="gone.png"), ["label maps", "gone.png"]),
    ],
    ids=lambda value: " in ".join(value[::-1]) if isinstance(value, list) else "",
)
def test_panoptic_json_that_cannot_be_used_is_named(change, words, tmp_path):
    keys = write_panoptic(tmp_path / "set")
    change_json(tmp_path, change)
    assert_refused(lambda: check_datasets(configured("panoptic", keys)), words)


def assert_refused(action: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def replace(path: Path, size: tuple[int, int], mode: str, value: int = 0) -> None:
    Image.new(mode, size, value).save(path)


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        ("panoptic", lambda path: path.unlink(), ["label maps", "1.png"]),
        ("panoptic", lambda path: replace(path, (9, 16), "RGB"), ["1.png", "9x16", "24x16"]),
        ("panoptic", lambda path: replace(path, (24, 16), "L"), ["1.png", "RGB"]),
        ("panoptic", lambda path: path.write_bytes(b"no image"), ["1.png", "Cannot read"]),
        ("semantic", lambda path: path.unlink(), ["1 of 2 images have no label map", "1.png"]),
        ("semantic", lambda path: replace(path.with_suffix(".PNG"), (24, 16), "L"), ["1.png", "1.PNG", "rename"]),
        ("semantic", lambda path: replace(path, (9, 16), "L"), ["1.png", "9x16", "24x16"]),
        ("semantic", lambda path: replace(path, (24, 16), "RGB"), ["1.png", "one channel"]),
        ("semantic", lambda path: replace(path, (24, 16), "L", 3), ["1.png", "label 3", "subtract 1", "IGNORE_VALUE"]),
        ("semantic", lambda path: replace(path, (24, 16), "L", 200), ["1.png", "label 200", "NUM_CLASSES"]),
    ],
)
def test_label_maps_that_cannot_be_used_are_named(kind, damage, words, request, tmp_path):
    cfg = request.getfixturevalue(kind)
    damage(next((tmp_path / "set" / "labels").rglob("1.png")))
    assert_refused(lambda: check_datasets(cfg), words)


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_a_model_of_boxes_alone_needs_objects(kind, request):
    cfg = request.getfixturevalue(kind)
    assert_refused(lambda: check_datasets(cfg, with_masks=False), [f"{kind}_val", f"{kind} labels", "boxes alone"])


def test_label_maps_without_a_class_cannot_be_trained_on(semantic, tmp_path):
    for path in (tmp_path / "set" / "labels").rglob("*.png"):
        replace(path, (24, 16), "L", 255)
    assert_refused(lambda: check_datasets(semantic), ["semantic_train", "nothing to train on", "IGNORE_VALUE"])
    check_datasets(semantic, train=False)


def test_mapper_names_a_label_map_that_breaks_later(panoptic, tmp_path):
    mapper, (first, _) = build_mapper(panoptic, is_train=True), load_dataset("panoptic_train")
    replace(tmp_path / "set" / "labels" / "1.png", (24, 16), "RGB", 5)
    with pytest.raises(DatasetError, match=r"labels/1\.png has pixels of the segment id 5"):
        mapper(first)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("panoptic", {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 80}, ["NUM_CLASSES is 80", "3 classes"]),
        ("semantic", {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4}, ["NUM_CLASSES is 4", "3 classes"]),
        ("panoptic", {"INPUT.DATASET_MAPPER_NAME": "coco_instance_lsj"}, ["DATASET_MAPPER_NAME", "coco_panoptic_lsj"]),
        ("semantic", {"INPUT.DATASET_MAPPER_NAME": "coco_panoptic_lsj"}, ["panoptic_lsj", "mask_former_semantic"]),
        (
            "semantic",
            {"MODEL.MaskDINO.TEST.SEMANTIC_ON": False, "MODEL.MaskDINO.TEST.PANOPTIC_ON": True},
            ["SEMANTIC_ON"],
        ),
        ("semantic", {"DATASETS.SEMANTIC.CLASSES": []}, ["DATASETS.SEMANTIC.CLASSES"]),
        ("semantic", {"DATASETS.SEMANTIC.CLASSES": ["a", "b", "a"]}, ["semantic_train", "'a' more than once"]),
        ("semantic", {"DATASETS.SEMANTIC.VAL_LABELS": ""}, ["DATASETS.SEMANTIC.VAL_LABELS"]),
        ("semantic", {"DATASETS.SEMANTIC.TRAIN_LABELS": "nowhere"}, ["nowhere", "does not exist", "TRAIN_LABELS"]),
        ("semantic", {"DATASETS.SEMANTIC.VAL_LABELS": str(Path(__file__).parent)}, ["end in .png", "VAL_LABELS"]),
        ("semantic", {"DATASETS.SEMANTIC.VAL_IMAGES": "nowhere"}, ["nowhere", "correct DATASETS.SEMANTIC.VAL_IMAGES"]),
        ("panoptic", {"DATASETS.PANOPTIC.TRAIN_IMAGES": "nowhere"}, ["images", "DATASETS.PANOPTIC.TRAIN_IMAGES"]),
        ("panoptic", {"DATASETS.PANOPTIC.VAL_LABELS": "nowhere"}, ["label maps", "DATASETS.PANOPTIC.VAL_LABELS"]),
        ("panoptic", {"DATASETS.PANOPTIC.VAL_JSON": ""}, ["DATASETS.PANOPTIC.VAL_JSON"]),
        ("panoptic", {"DATASETS.PANOPTIC.VAL_JSON": "nowhere"}, ["DATASETS.PANOPTIC.VAL_JSON", "nowhere"]),
    ],
    ids=str,
)
def test_keys_that_do_not_fit_are_named(kind, options, words, tmp_path):
    write = {"panoptic": write_panoptic, "semantic": write_semantic}[kind]
    assert_refused(lambda: check_datasets(configured(kind, write(tmp_path / "set") | options)), words)


def test_a_semantic_model_needs_semantic_truth(cfg):
    cfg.merge_from_list(["DATASETS.TEST", ("shapes_val",), "MODEL.MaskDINO.TEST.INSTANCE_ON", False])
    with pytest.raises(ConfigError, match=r"SEMANTIC_ON cannot be scored on dataset shapes_val.*set INSTANCE_ON"):
        check_datasets(cfg, train=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coco_2017_val_panoptic_with_sem_seg", ["panoptic_val2017.json", "DETECTRON2_DATASETS"]),
        ("ade20k_sem_seg_val", ["images/validation", "DETECTRON2_DATASETS"]),
        ("cityscapes_fine_sem_seg_val", ["leftImg8bit/val", "DETECTRON2_DATASETS"]),
    ],
)
def test_missing_public_sets_say_where_they_belong(name, words, tmp_path):
    register_all(tmp_path)
    kind = "panoptic" if "panoptic" in name else "semantic"
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in TASKS[kind].items() for item in pair])
    cfg.DATASETS.TEST = (name,)
    assert_refused(lambda: check_datasets(cfg, train=False), words)


def test_every_segment_and_label_is_inspected(panoptic, tmp_path):
    options = {"ignore": 255, "apply_exif": True, "reader": PilReader("RGB")}
    entries, counts, findings = inspect_segmentation("panoptic_val", **options)
    assert len(entries) == 2
    assert counts == {"cell": [80 + 60 + 36, 3, 2], "bug": [84, 1, 1], "grass": [192 + 48, 2, 2]}
    assert findings == []
    change_json(tmp_path, lambda content: segment(content, area=7))
    replace(tmp_path / "set" / "labels" / "2.png", (24, 16), "RGB")
    findings = inspect_segmentation("panoptic_val", **options)[2]
    assert [each.kind for each in findings] == ["segment of another area than listed", *["segment without a pixel"] * 3]


def test_semantic_labels_are_inspected(semantic, tmp_path):
    options = {"ignore": 255, "apply_exif": True, "reader": PilReader("RGB")}
    assert inspect_segmentation("semantic_val", **options)[1] == {
        **{"cell": [140, 1, 1], "bug": [84, 1, 1], "grass": [192 + 48, 2, 2]}
    }
    replace(tmp_path / "set" / "labels" / "below" / "2.png", (24, 16), "L", 9)
    (finding,) = inspect_segmentation("semantic_val", **options)[2]
    assert "2.png has the label 9" in finding.where
