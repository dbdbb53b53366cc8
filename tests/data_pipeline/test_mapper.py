"""The mappers by name: sizes, random ranges, background images, test time, images that cannot be read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.config import Config
from dimaskdino.data import build_mapper, build_train_loader
from dimaskdino.data.datasets.registration import register_coco_format
from dimaskdino.data.fields import check_fields, fields_of, unlabeled_classes
from dimaskdino.errors import ConfigError, DatasetError
from tests.tiny_model import NUM_CLASSES, tiny_cfg

GRAY = 128
Entry = dict[str, Any]


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """A 100 x 50 image, red in its left half and blue in its right half; one object covers each half."""
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    pixels[:, :50, 0] = pixels[:, 50:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    halves = ([0, 0, 50, 0, 50, 50, 0, 50], [50, 0, 100, 0, 100, 50, 50, 50])
    return {
        "file_name": str(tmp_path / "image.png"),
        "height": 50,
        "width": 100,
        "image_id": 9,
        "annotations": [{"id": k, "category_id": k, "segmentation": [half]} for k, half in enumerate(halves)],
    }


def masked_colors(mapped: Entry) -> list[tuple[int, list[int]]]:
    """Class and mean color under the mask of every object whose mask is large enough to judge."""
    instances = mapped["instances"]
    return [
        (label, mapped["image"][:, mask].float().mean(dim=1).round().int().tolist())
        for label, mask in zip(instances.gt_classes.tolist(), instances.gt_masks.tensor, strict=True)
        if mask.sum() >= 200
    ]


@pytest.mark.parametrize("size", [64, 96, 160])
def test_large_scale_jitter_fills_a_square_canvas(cfg: Config, entry: Entry, size: int) -> None:
    cfg.INPUT.IMAGE_SIZE = size
    mapper = build_mapper(cfg, is_train=True)
    np.random.seed(size)
    widths = []
    for _ in range(60):
        mapped = mapper(entry)
        image = mapped["image"]
        assert image.shape == (3, size, size)
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert mapped["instances"].image_size == (size, size)
        is_picture = (image != GRAY).any(dim=0)
        width, height = int(is_picture.any(dim=0).sum()), int(is_picture.any(dim=1).sum())
        # The picture lies in the top left corner, undistorted: 2:1 unless the crop cut its width.
        assert is_picture[:height, :width].all()
        assert height == pytest.approx(width / 2, abs=1) or width == size
        widths.append(width)
    assert min(widths) >= round(0.1 * size)
    assert min(widths) < 0.4 * size, "small scales occur"
    assert widths.count(size) > 15, "so do scales above one, about half of all"


def test_large_scale_jitter_reaches_its_configured_scale(cfg: Config, entry: Entry) -> None:
    cfg.merge_from_list(["INPUT.IMAGE_SIZE", 100, "INPUT.MIN_SCALE", 0.5, "INPUT.MAX_SCALE", 0.5])
    image = build_mapper(cfg, is_train=True)(entry)["image"]
    # Scale one fits the 100 x 50 picture into the canvas exactly, so that half of it leaves 50 x 25.
    assert (image != GRAY).any(dim=0).sum() == 50 * 25


@pytest.mark.parametrize("name", ["coco_instance_lsj", "coco_instance_detr"])
@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_masks_and_boxes_stay_on_their_objects(cfg: Config, entry: Entry, name: str, flip: str) -> None:
    cfg.merge_from_list(["INPUT.DATASET_MAPPER_NAME", name, "INPUT.RANDOM_FLIP", flip])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (30, 60), "INPUT.CROP.ENABLED", True])
    mapper = build_mapper(cfg, is_train=True)
    np.random.seed(1)
    red_is_left = set()
    for _ in range(20):
        mapped = mapper(entry)
        for label, color in masked_colors(mapped):
            assert color[label * 2] > 240
            assert color[2 - label * 2] < 15
        instances = mapped["instances"]
        for box, mask in zip(instances.gt_boxes.tensor.tolist(), instances.gt_masks.tensor, strict=True):
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            pixels = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            assert box == pytest.approx(pixels, abs=1), "a box of polygons lies within a pixel of the mask's"
        if len(instances) == 2:
            red_is_left.add(bool(instances.gt_boxes.tensor[0, 0] < instances.gt_boxes.tensor[1, 0]))
    assert red_is_left == ({True, False} if flip == "horizontal" else {True})


@pytest.mark.parametrize("short_edges", [(32,), (40, 56)])
def test_detr_mapper_resizes_the_shortest_edge(cfg: Config, entry: Entry, short_edges: tuple[int, ...]) -> None:
    cfg.merge_from_list(["INPUT.DATASET_MAPPER_NAME", "coco_instance_detr", "INPUT.MIN_SIZE_TRAIN", short_edges])
    mapper = build_mapper(cfg, is_train=True)
    np.random.seed(0)
    sizes = {tuple(mapper(entry)["image"].shape[1:]) for _ in range(12)}
    assert sizes == {(edge, 2 * edge) for edge in short_edges}


def test_detr_mapper_crops_about_half_of_the_images(cfg: Config, entry: Entry) -> None:
    cfg.merge_from_list(["INPUT.DATASET_MAPPER_NAME", "coco_instance_detr", "INPUT.MIN_SIZE_TRAIN", (32,)])
    cfg.merge_from_list(
        ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", (384, 600)]
    )
    mapper = build_mapper(cfg, is_train=True)
    np.random.seed(0)
    shapes = [tuple(mapper(entry)["image"].shape[1:]) for _ in range(40)]
    assert 8 <= shapes.count((32, 64)) <= 32
    assert len(set(shapes)) > 4


def test_image_without_an_object_left_is_background(cfg: Config, entry: Entry) -> None:
    corner = {"id": 0, "category_id": 0, "segmentation": [[98, 48, 100, 48, 100, 50, 98, 50]]}
    cfg.merge_from_list(["INPUT.MIN_SCALE", 2.0])
    mapper = build_mapper(cfg, is_train=True)
    np.random.seed(0)
    counts = [len(mapper({**entry, "annotations": [corner]})["instances"]) for _ in range(10)]
    assert 0 in counts
    assert len(mapper({**entry, "annotations": []})["instances"]) == 0


def test_mapping_keeps_the_entry_and_repeats_with_the_seed(cfg: Config, entry: Entry) -> None:
    mapper = build_mapper(cfg, is_train=True)
    before = repr(entry)
    np.random.seed(3)
    first = mapper(entry)
    np.random.seed(3)
    second = mapper(entry)
    assert repr(entry) == before
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["instances"].gt_masks.tensor, second["instances"].gt_masks.tensor)


@pytest.mark.parametrize("name", ["coco_instance_lsj", "coco_instance_detr"])
def test_test_time_only_resizes(cfg: Config, entry: Entry, name: str) -> None:
    cfg.merge_from_list(["INPUT.DATASET_MAPPER_NAME", name, "INPUT.MIN_SIZE_TEST", 20, "INPUT.MAX_SIZE_TEST", 30])
    mapped = build_mapper(cfg, is_train=False)(entry)
    # The longest edge of 40 would pass 30, so that the picture shrinks to 30 x 15.
    assert mapped["image"].shape == (3, 15, 30)
    assert (mapped["height"], mapped["width"], mapped["image_id"]) == (50, 100, 9)
    assert mapped["file_name"] == entry["file_name"]
    assert "annotations" not in mapped
    assert "instances" not in mapped
    assert len(build_mapper(cfg, is_train=False, with_instances=True)(entry)["instances"]) == 2


@pytest.mark.parametrize(("image_format", "first"), [("RGB", [255, 0, 0]), ("BGR", [0, 0, 255])])
def test_channels_come_in_the_configured_order(cfg: Config, entry: Entry, image_format: str, first: list[int]) -> None:
    cfg.INPUT.FORMAT = image_format
    assert build_mapper(cfg, is_train=False)(entry)["image"][:, 0, 0].tolist() == first


def test_color_distortion_changes_only_colors(cfg: Config, entry: Entry) -> None:
    pytest.importorskip("cv2")
    cfg.merge_from_list(["INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0, "INPUT.COLOR_AUG_SSD", True])
    np.random.seed(0)
    mapper = build_mapper(cfg, is_train=True)
    mapped = [mapper(entry) for _ in range(6)]
    assert len({tuple(m["image"][:, 5, 5].tolist()) for m in mapped}) > 1
    assert {tuple(m["instances"].gt_boxes.tensor[0].tolist()) for m in mapped} == {(0, 0, 32, 32)}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b"no image at all"), "Cannot read image"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "Cannot read image"),
        (lambda path: Image.new("RGB", (9, 9)).save(path), "9x9 .* 100x50"),
    ],
    ids=["missing", "no image", "cut short", "other size"],
)
def test_damaged_image_is_named(cfg: Config, entry: Entry, damage: Callable[[Path], Any], words: str) -> None:
    damage(Path(entry["file_name"]))
    with pytest.raises(DatasetError, match=words) as error:
        build_mapper(cfg, is_train=True)(entry)
    assert entry["file_name"] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("INPUT.DATASET_MAPPER_NAME", "coco_instance_lsg", "coco_instance_detr, coco_instance_lsj"),
        ("INPUT.RANDOM_FLIP", "diagonal", "one of none, horizontal, vertical"),
    ],
)
def test_unknown_name_is_answered_with_the_known_ones(cfg: Config, key: str, value: str, words: str) -> None:
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=words) as error:
        build_mapper(cfg, is_train=True)
    assert key in str(error.value)


def test_classes_that_nobody_looked_for_are_unlabeled() -> None:
    entry = {"neg_category_ids": [0], "not_exhaustive_category_ids": [1]}
    assert unlabeled_classes(entry, [{"category_id": 1}, {"category_id": 2}], 5) == [1, 3, 4]
    assert unlabeled_classes({"not_exhaustive_category_ids": [2]}, [{"category_id": 2}], 5) == [2]
    assert unlabeled_classes({}, [{"category_id": 2}], 5) == []


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Callable[..., dict]]:
    """``data(image, *annotations)`` registers an image of 48 x 32 pixels and gives its training sample."""

    def sample(image: dict, annotations: list[dict], **options: Any) -> dict:
        Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8)).save(tmp_path / "1.png")
        names = [f"class {number}" for number in range(NUM_CLASSES)]
        content = {
            "images": [{"id": 1, "file_name": "1.png", "height": 32, "width": 48, **image}],
            "annotations": [{"id": n, "image_id": 1, "iscrowd": 0, **each} for n, each in enumerate(annotations)],
            "categories": [{"id": 10 * number, "name": name} for number, name in enumerate(names)],
        }
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(content))
        register_coco_format("partly", path, tmp_path, names)
        options = {"DATASETS.TRAIN": ("partly",), "SOLVER.IMS_PER_BATCH": 1, "INPUT.MIN_SIZE_TRAIN": (32,)} | options
        options |= {"DATALOADER.NUM_WORKERS": 0, "INPUT.DATASET_MAPPER_NAME": "coco_instance_detr"}
        options |= {"INPUT.RANDOM_FLIP": "none"}
        return next(iter(build_train_loader(tiny_cfg(options))))[0]

    yield sample
    DatasetCatalog.remove("partly")
    MetadataCatalog.remove("partly")


TRIANGLE = {"category_id": 10, "bbox": [2, 3, 30, 20], "segmentation": [[4, 4, 14, 4, 14, 10]], "area": 30}


def test_lists_and_regions_reach_the_model(data) -> None:
    pixels = np.zeros((32, 48), dtype=np.uint8)
    pixels[20:30, 20:40] = 1
    rle = mask_util.encode(np.asfortranarray(pixels))
    crowd = {"category_id": 20, "bbox": [20, 20, 20, 10], "area": 200, "iscrowd": 1}
    crowd["segmentation"] = {"size": [32, 48], "counts": rle["counts"].decode()}
    box = {"category_id": 20, "bbox": [0, 20, 8, 8], "area": 64, "iscrowd": 1, "ignored": True}
    lists = {"neg_category_ids": [40], "not_exhaustive_category_ids": [10]}
    options = {"INPUT.PARTIAL_LABELS": True, "MODEL.IGNORE_CROWD_SHARE": 0.5}
    sample = data(lists, [TRIANGLE, crowd, box], **options)
    assert sample["unlabeled_classes"] == [0, 1, 3]
    regions = sample["crowd_regions"]
    assert np.array_equal(regions.gt_masks.tensor[0], pixels)
    assert regions.gt_masks.tensor[1].sum() == 64
    assert regions.gt_any_class.tolist() == [False, True]
    assert len(sample["instances"]) == 1
    assert "crowd_regions" not in data(lists, [TRIANGLE, crowd])
    with pytest.raises(DatasetError, match="neg_category_ids of 1.png has 41"):
        data({"neg_category_ids": [41]}, [TRIANGLE])


def test_annotated_boxes_and_weights_reach_the_model(data) -> None:
    assert data({}, [TRIANGLE])["instances"].gt_boxes.tensor.tolist() == [[4, 4, 14, 10]]
    found = data({}, [TRIANGLE | {"box_weight": 0.5}, TRIANGLE], **{"INPUT.BOXES_OF_ANNOTATIONS": True})["instances"]
    assert found.gt_boxes.tensor.tolist() == [[2, 3, 32, 23]] * 2
    assert found.gt_box_weight.tolist() == [0.5, 1.0]
    with pytest.raises(DatasetError, match=r"1\.png.*box_weight.*-1"):
        data({}, [TRIANGLE | {"box_weight": -1}])


def test_missing_field_gives_the_closest_name() -> None:
    annotations = [{"id": 7, "occluded": 1}, {"id": 8}]
    check_fields(annotations, ["occluded"], "mine")
    with pytest.raises(DatasetError, match="mine has 'ocluded'.*occluded"):
        check_fields(annotations, ["ocluded"], "mine")
    with pytest.raises(DatasetError, match="annotation 7 of dataset mine: occluded is 'yes'"):
        check_fields([{"id": 7, "occluded": "yes"}], ["occluded"], "mine")


def test_fields_are_numbers_or_lists_of_one_length() -> None:
    found = fields_of([{"age": 3}, {}, {"age": True}], ["age"], "a.png")["gt_age"]
    assert found[[0, 2]].tolist() == [3.0, 1.0]
    assert found[1].isnan()
    assert fields_of([{"at": [1, 2]}, {}], ["at"], "a.png")["gt_at"].shape == (2, 2)
    assert fields_of([], ["at"], "a.png")["gt_at"].shape == (0,)
    for broken in ([{"at": "x"}], [{"at": [1, 2]}, {"at": [1]}], [{"at": [[1]]}], [{"at": [1]}, {"at": 1}]):
        with pytest.raises(DatasetError, match=r"a\.png.*at"):
            fields_of(broken, ["at"], "a.png")
