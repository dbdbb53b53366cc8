"""The loaders: which images they keep, in which order, and the error when none is left."""

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from dimaskdino.config import Config
from dimaskdino.data import build_test_loader, build_train_loader
from dimaskdino.data.datasets.registration import known_classes
from dimaskdino.data.mapper import MAPPER_REGISTRY
from dimaskdino.errors import ConfigError, DatasetError
from tests.data_pipeline.conftest import HEIGHT, WIDTH, Json

pytestmark = pytest.mark.usefixtures("registrations")


@pytest.fixture
def mine(cfg: Config, coco: Json, write_coco: Callable[[Json], tuple[Path, Path]]) -> Config:
    """Image 1 holds an object, image 2 nothing, image 3 only a crowd region."""
    coco["images"].append({**coco["images"][0], "id": 3, "file_name": "three.png"})
    coco["annotations"].append({**coco["annotations"][0], "id": 12, "image_id": 3, "iscrowd": 1})
    register_coco_instances("mine", {}, *(str(path) for path in write_coco(coco)))
    cfg.merge_from_list(["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",), "SOLVER.IMS_PER_BATCH", 1])
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    return cfg


def drawn_objects(cfg: Config) -> dict[int, int]:
    """Image id -> number of its targets, of every image that training draws from."""
    loader = build_train_loader(cfg)
    return {image["image_id"]: len(image["instances"]) for batch in islice(loader, 3) for image in batch}


def test_images_without_an_object_are_left_out(mine: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert set(drawn_objects(mine)) == {1}
    assert "Removed 2 images with no usable annotations. 1 images left." in caplog.text


def test_background_images_are_trained_on_if_asked(mine: Config) -> None:
    mine.merge_from_list(["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0])
    assert drawn_objects(mine) == {1: 1, 2: 0, 3: 0}


@pytest.mark.parametrize("without", [[0], [1, 2], [0, 1, 2]], ids=["first", "others", "all"])
def test_images_without_annotations_are_background(mine: Config, without: list[int]) -> None:
    entries = DatasetCatalog.get("mine")
    for index in without:
        del entries[index]["annotations"]
    DatasetCatalog.register("function", lambda: entries)
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    mine.merge_from_list(["DATASETS.TRAIN", ("function",), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False])
    mine.merge_from_list(["INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0])
    assert drawn_objects(mine) == {1: 0 if 0 in without else 1, 2: 0, 3: 0}
    assert sum("annotations" not in entry for entry in entries) == len(without)
    assert len(list(build_test_loader(mine, "function"))) == 3
    mine.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    if 0 in without:
        with pytest.raises(DatasetError, match="No image with an object"):
            build_train_loader(mine)


def test_training_repeats_without_end_by_default(mine: Config) -> None:
    batches = iter(build_train_loader(mine))
    assert [next(batches)[0]["image_id"] for _ in range(3)] == [1, 1, 1]


def test_images_of_a_batch_are_all_wide_or_all_tall(mine: Config) -> None:
    wide, tall, _ = DatasetCatalog.get("mine")
    with Image.open(tall["file_name"]) as image:
        image.rotate(90, expand=True).save(tall["file_name"])
    tall |= {"height": WIDTH, "width": HEIGHT}
    DatasetCatalog.register("function", lambda: [wide, tall])
    MetadataCatalog.get("function").thing_classes = ["ball", "box"]
    mine.merge_from_list(["DATASETS.TRAIN", ("function",), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False])
    mine.merge_from_list(["DATALOADER.ASPECT_RATIO_GROUPING", True, "SOLVER.IMS_PER_BATCH", 4])
    batches = [{image["image_id"] for image in batch} for batch in islice(build_train_loader(mine), 8)]
    assert {1} in batches
    assert {2} in batches
    assert {1, 2} not in batches


def test_seed_0_is_a_seed_like_any_other(mine: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    mine.merge_from_list(["SEED", 0, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False])
    orders = []
    for of_none in (11, 12):  # what a run without a seed would draw
        monkeypatch.setattr("detectron2.utils.comm.shared_random_seed", lambda of_none=of_none: of_none)
        batches = iter(build_train_loader(mine))
        orders.append([next(batches)[0]["image_id"] for _ in range(12)])
    assert orders[0] == orders[1]


def test_unknown_sampler_names_the_known_ones(mine: Config) -> None:
    mine.merge_from_list(["DATALOADER.SAMPLER_TRAIN", "Foo"])
    message = r"DATALOADER\.SAMPLER_TRAIN is 'Foo'; it must be one of TrainingSampler, RepeatFactorTrainingSampler"
    with pytest.raises(ConfigError, match=message):
        build_train_loader(mine)


def test_every_test_image_comes_once_and_in_order(mine: Config) -> None:
    batches = list(build_test_loader(mine, "mine"))
    assert [[image["image_id"] for image in batch] for batch in batches] == [[1], [2], [3]]
    assert all("instances" not in batch[0] for batch in batches)


def test_only_the_first_images_if_asked(mine: Config) -> None:
    mine.merge_from_list(["DATASETS.MAX_IMAGES", 2, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False])
    assert set(drawn_objects(mine)) == {1, 2}
    assert len(list(build_test_loader(mine, "mine"))) == 2


def test_negative_number_of_images_is_refused(mine: Config) -> None:
    mine.DATASETS.MAX_IMAGES = -1
    for build in (lambda: build_train_loader(mine), lambda: build_test_loader(mine, "mine")):
        with pytest.raises(ConfigError, match=r"DATASETS\.MAX_IMAGES is -1; .* 0 for all"):
            build()


def test_training_without_objects_names_dataset_and_key(mine, coco, write_coco):
    coco["annotations"] = [annotation for annotation in coco["annotations"] if annotation["iscrowd"]]
    write_coco(coco)
    with pytest.raises(DatasetError, match=r"No image with an object .* in mine; .*FILTER_EMPTY_ANNOTATIONS"):
        build_train_loader(mine)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mapped: mapped | {"image": mapped["image"].numpy()}, "image.*ndarray"),
        (lambda mapped: mapped | {"image": mapped["image"][0]}, r"image.*Tensor \(64, 64\).*\(C, H, W\)"),
        (lambda mapped: {"image": mapped["image"]}, "instances.*NoneType"),
        (lambda mapped: mapped | {"image": mapped["image"][:, :-1]}, r"instances of \(64, 64\).*\(3, 63, 64\)"),
        (lambda mapped: 3, "image"),
    ],
)
def test_mapper_that_gives_something_else_is_named(mine: Config, change: Callable, said: str) -> None:
    def own_mapper(cfg: Config, **options: bool) -> Callable:
        mapper = MAPPER_REGISTRY.get("coco_instance_lsj")(cfg, **options)
        return lambda entry: change(mapper(entry))

    MAPPER_REGISTRY.register(own_mapper)
    mine.INPUT.DATASET_MAPPER_NAME = "own_mapper"
    mine.MODEL.META_ARCHITECTURE = "DIMaskDINO"
    try:
        with pytest.raises(ConfigError, match=rf"own_mapper \(INPUT\.DATASET_MAPPER_NAME\).*{said}"):
            next(iter(build_train_loader(mine)))
    finally:
        del MAPPER_REGISTRY._obj_map["own_mapper"]


def test_known_classes_have_the_ids_of_their_dataset(mine: Config, coco: Json) -> None:
    names, ids = known_classes("mine")  # of the file, which nothing has loaded
    assert sorted(ids) == sorted(category["id"] for category in coco["categories"])
    metadata = MetadataCatalog.get("mine")
    metadata.thing_classes = names
    assert known_classes("mine") == (names, [*range(1, len(names) + 1)])
    metadata.thing_dataset_id_to_contiguous_id = {7 * number: index for index, number in enumerate(ids)}
    assert known_classes("mine") == (names, [7 * number for number in ids])
    assert known_classes("unknown") == ([], [])
