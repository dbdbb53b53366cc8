"""The synthetic dataset: the same bytes from the same seed, valid COCO, honest labels, made once."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from dimaskdino.config import Config, get_cfg
from dimaskdino.data import build_mapper, register_all
from dimaskdino.data.datasets import shapes
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.datasets.shapes import ShapesSpec, annotation_file, make_shapes, make_shapes_with_stuff
from dimaskdino.data.datasets.shapes_drawing import MIN_VISIBLE_PIXELS, SHAPES, draw_picture
from dimaskdino.data.datasets.shapes_labels import trace_outlines, visible_object
from dimaskdino.data.label_maps import read_label_map, read_segment_ids, relabel
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import ConfigError, DatasetError

SPEC = ShapesSpec(num_train=60, num_val=6, image_size=96, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of SPEC, made once for this file."""
    return make_shapes(tmp_path_factory.mktemp("shapes"), SPEC)


@pytest.fixture(scope="module")
def coco(folder: Path) -> COCO:
    """Its training split, as pycocotools reads it."""
    return COCO(str(annotation_file(folder, "train")))


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("forked_workers")
def test_files_depend_only_on_the_seed(tmp_path: Path) -> None:
    spec = ShapesSpec(num_train=6, num_val=2, image_size=48, seed=5)
    alone = contents(make_shapes(tmp_path / "alone", spec))
    assert len(alone) == 6 + 2 + 2
    assert {f"train/{number:06d}.png" for number in range(1, 7)} < alone.keys()
    assert contents(make_shapes(tmp_path / "two", spec, num_workers=2)) == alone
    other = contents(make_shapes(tmp_path / "alone", ShapesSpec(num_train=6, num_val=2, image_size=48, seed=6)))
    assert all(other[name] != alone[name] for name in alone)


def test_longer_dataset_begins_with_the_shorter_one(folder: Path, tmp_path: Path) -> None:
    shorter = make_shapes(tmp_path, ShapesSpec(num_train=3, num_val=1, image_size=96, seed=3))
    for picture in sorted((shorter / "train").iterdir()):
        assert picture.read_bytes() == (folder / "train" / picture.name).read_bytes()


def test_train_and_val_share_no_picture(folder: Path) -> None:
    train, val = ({path.read_bytes() for path in (folder / split).iterdir()} for split in ("train", "val"))
    assert (len(train), len(val)) == (60, 6)
    assert not train & val


def test_areas_and_boxes_are_those_of_the_masks(coco: COCO) -> None:
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        assert annotation["area"] == mask.sum() >= MIN_VISIBLE_PIXELS
        left, top, width, height = annotation["bbox"]
        assert (left, left + width) == (columns.min(), columns.max() + 1)
        assert (top, top + height) == (rows.min(), rows.max() + 1)


def test_every_picture_is_a_png_of_the_listed_size(folder: Path, coco: COCO) -> None:
    for image in coco.imgs.values():
        with Image.open(folder / "train" / image["file_name"]) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert picture.size == (image["width"], image["height"]) == (96, 96)


def test_masks_of_one_picture_never_share_a_pixel(coco: COCO) -> None:
    for image_id in coco.imgs:
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]]
        assert not masks or np.sum(masks, axis=0).max() == 1


def test_dataset_has_the_promised_variety(coco: COCO) -> None:
    annotations = list(coco.anns.values())
    counts = [len(coco.imgToAnns[image_id]) for image_id in coco.imgs]
    assert {category["name"] for category in coco.loadCats(coco.getCatIds())} == set(SHAPES)
    assert {annotation["category_id"] for annotation in annotations} == set(range(1, len(SHAPES) + 1))
    assert min(counts) == 0, "empty pictures"
    assert max(counts) >= 6, "crowded ones"
    sides = [max(annotation["bbox"][2:]) for annotation in annotations]
    assert min(sides) < 0.1 * 96
    assert max(sides) > 0.5 * 96
    is_rle = [isinstance(annotation["segmentation"], dict) for annotation in annotations]
    assert any(is_rle)
    assert not all(is_rle)
    pieces = [len(a["segmentation"]) for a in annotations if isinstance(a["segmentation"], list)]
    assert max(pieces) > 1, "shapes that another one cuts in two"


@pytest.mark.parametrize("size", [32, 64, 200])
def test_shapes_scale_with_the_picture(size: int) -> None:
    sides = []
    for index in range(25):
        picture = draw_picture(np.random.default_rng(index), size)
        assert picture.image.shape == (size, size, 3)
        assert picture.owner.shape == (size, size)
        for shape in range(len(picture.classes)):
            rows, columns = np.nonzero(picture.owner == shape)
            sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert max(sides) <= 0.7 * size + 1
    assert max(sides) > 0.4 * size


@pytest.mark.parametrize(
    ("rows", "num_outlines", "is_polygon"),
    [
        (["#"], 1, True),
        ([".##", "##.", "#.."], 1, True),
        (["#.#", "#.#"], 2, True),
        (["#.", ".#"], 2, True),
        (["###", "#.#", "###"], 2, False),
        (["##.", "#.#", "###"], 1, True),
        ([".#.", "#.#", ".#."], 4, True),
    ],
    ids=["pixel", "steps", "two pieces", "touching corners", "hole", "notch open at a corner", "diamond of pixels"],
)
def test_outlines_give_back_the_mask(rows: list[str], num_outlines: int, is_polygon: bool) -> None:
    mask = np.array([[cell == "#" for cell in row] for row in rows])
    padded = np.pad(mask, ((2, 1), (3, 2)))
    label = visible_object(padded)
    assert len(trace_outlines(mask)) == num_outlines
    assert isinstance(label["segmentation"], list) == is_polygon
    segmentation = label["segmentation"]
    rles = mask_util.frPyObjects(segmentation, *padded.shape) if is_polygon else [segmentation]
    assert np.array_equal(mask_util.decode(mask_util.merge(rles)).astype(bool), padded)


@pytest.mark.parametrize("seed", range(5))
def test_outlines_give_back_random_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(30):
        mask = rng.random(rng.integers(1, 12, 2)) < rng.uniform(0.2, 0.9)
        mask[0, 0] = True
        label = visible_object(mask)
        if isinstance(label["segmentation"], list):
            rles = mask_util.frPyObjects(label["segmentation"], *mask.shape)
            assert np.array_equal(mask_util.decode(mask_util.merge(rles)).astype(bool), mask)


def test_concurrent_processes_make_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = ShapesSpec(num_train=5, num_val=1, image_size=32)
    with caplog.at_level(logging.INFO, logger=shapes.__name__), ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: make_shapes(tmp_path, spec), range(4)))
    assert folders == {tmp_path / spec.folder_name}
    assert sum("Making" in record.message for record in caplog.records) == 1


def test_interruption_leaves_no_folder_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ShapesSpec(num_train=3, num_val=1, image_size=32)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shapes, "draw_picture", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_shapes(tmp_path, spec)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert annotation_file(make_shapes(tmp_path, spec), "val").is_file()


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(DatasetError, match=r"Cannot write .*file.* DATASETS\.SHAPES\.ROOT"):
        make_shapes(blocker, SPEC)


@pytest.mark.parametrize(("key", "value"), [("NUM_TRAIN", 0), ("NUM_VAL", -1), ("IMAGE_SIZE", 16), ("SEED", -1)])
def test_numbers_out_of_range_are_named_by_their_key(cfg: Config, key: str, value: int) -> None:
    cfg.DATASETS.SHAPES[key] = value
    with pytest.raises(ConfigError, match=f"DATASETS.SHAPES.{key} is {value}; it must be at least"):
        ShapesSpec.from_config(cfg)
    assert ShapesSpec() == ShapesSpec.from_config(get_cfg())


@pytest.mark.usefixtures("registrations")
def test_dataset_is_made_on_first_use(cfg: Config, tmp_path: Path) -> None:
    register_all(cfg=cfg)
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.thing_classes == list(SHAPES)
    assert metadata.evaluator_type == "coco"
    assert not (tmp_path / "shapes").exists()
    entries = DatasetCatalog.get("shapes_val")
    assert len(entries) == 2
    assert Path(metadata.json_file).is_file()
    assert all(Path(entry["file_name"]).parent == Path(metadata.image_root) for entry in entries)
    assert len(DatasetCatalog.get("shapes_train")) == 4


@pytest.mark.usefixtures("registrations")
def test_another_seed_or_root_is_another_dataset(cfg: Config, tmp_path: Path) -> None:
    register_all(cfg=cfg)
    first = MetadataCatalog.get("shapes_train").json_file
    cfg.DATASETS.SHAPES.SEED = 1
    register_all(cfg=cfg)
    second = MetadataCatalog.get("shapes_train").json_file
    register_all(tmp_path / "elsewhere")
    third = Path(MetadataCatalog.get("shapes_train").json_file)
    assert len({first, second, str(third)}) == 3
    assert third.is_relative_to(tmp_path / "elsewhere" / "shapes")
    assert MetadataCatalog.get("coco_2017_val").json_file == str(
        tmp_path / "elsewhere/coco/annotations/instances_val2017.json"
    )


@pytest.mark.usefixtures("registrations")
def test_shared_folder_is_used_only_if_it_holds_the_dataset(cfg, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg.merge_from_list(["DATASETS.SHAPES.ROOT", "", "OUTPUT_DIR", str(tmp_path / "run")])
    register_all(cfg=cfg)
    assert Path(MetadataCatalog.get("coco_2017_train").json_file).is_relative_to(tmp_path)
    assert Path(MetadataCatalog.get("shapes_train").json_file).is_relative_to(tmp_path / "run" / "shapes")
    make_shapes(tmp_path / "shapes", ShapesSpec.from_config(cfg))
    register_all(cfg=cfg)
    assert Path(MetadataCatalog.get("shapes_train").json_file).is_relative_to(tmp_path / "shapes")


@pytest.mark.usefixtures("registrations")
def test_mapped_targets_are_the_annotated_masks(cfg: Config) -> None:
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 6, "INPUT.MIN_SIZE_TEST", 64])
    register_all(cfg=cfg)
    entries = DatasetCatalog.get("shapes_train")
    labels = COCO(MetadataCatalog.get("shapes_train").json_file).imgToAnns
    mapper = build_mapper(cfg, is_train=False, with_instances=True)
    for entry in entries:
        instances, expected = mapper(entry)["instances"], labels[entry["image_id"]]
        assert instances.gt_classes.tolist() == [a["category_id"] - 1 for a in expected]
        assert instances.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [a["area"] for a in expected]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in expected)]
        assert instances.gt_boxes.tensor.tolist() == corners
    assert sum(len(labels[entry["image_id"]]) for entry in entries) > 0


@pytest.fixture(scope="module")
def stuff_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ShapesSpec(num_train=6, num_val=12, image_size=64, seed=3)
    return make_shapes_with_stuff(tmp_path_factory.mktemp("stuff"), spec)


def test_stuff_leaves_the_pictures_of_shapes_as_they_are(tmp_path: Path) -> None:
    # Recorded before there was stuff; other versions of the libraries may round otherwise.
    spec = ShapesSpec(num_train=3, num_val=1, image_size=64)
    folder = make_shapes(tmp_path, spec)
    sums = [int(np.array(Image.open(folder / "train" / f"{n:06d}.png")).sum()) for n in (1, 2, 3)]
    assert sums == pytest.approx([1108007, 1642192, 2073736], rel=1e-4)
    assert folder.name == "64px-3-1-seed0-v3"  # other pictures are another version
    before = contents(folder)
    assert make_shapes_with_stuff(tmp_path, spec) != folder
    assert contents(folder) == before


@pytest.mark.usefixtures("forked_workers")
def test_pictures_with_stuff_depend_only_on_the_seed(stuff_folder: Path, tmp_path: Path) -> None:
    spec = ShapesSpec(num_train=6, num_val=12, image_size=64, seed=3)
    again = make_shapes_with_stuff(tmp_path, spec, num_workers=2)
    files = sorted(path.relative_to(again) for path in again.rglob("*.*"))
    assert len(files) == 3 * 18 + 2
    assert all((again / file).read_bytes() == (stuff_folder / file).read_bytes() for file in files)


def test_panoptic_and_semantic_truth_agree(stuff_folder: Path) -> None:
    content = json.loads((stuff_folder / "annotations" / "panoptic_val.json").read_text())
    classes: set[int] = set()
    void = 0
    for annotation in content["annotations"]:
        ids = read_segment_ids(str(stuff_folder / "panoptic_val" / annotation["file_name"]))
        labels = read_label_map(str(stuff_folder / "semantic_val" / annotation["file_name"]))
        segments = annotation["segments_info"]
        assert {segment["id"] for segment in segments} == set(np.unique(ids[ids > 0]).tolist())
        assert np.array_equal(labels, relabel(ids, {each["id"]: each["category_id"] - 1 for each in segments}, 255))
        assert all(segment["area"] == (ids == segment["id"]).sum() for segment in segments)
        # What a class of stuff covers is one segment; shapes of a class are one each.
        stuff = [each["category_id"] for each in segments if each["category_id"] > 6]
        assert len(stuff) == len(set(stuff))
        classes.update(each["category_id"] for each in segments)
        void += (labels == 255).sum()
    assert classes == set(range(1, 11))
    assert 0 < void < 0.4 * 12 * 64 * 64


def test_datasets_with_stuff_are_made_on_first_use(cfg: Config, tmp_path: Path) -> None:
    options = ["DATASETS.SHAPES.NUM_TRAIN", 2, "DATASETS.SHAPES.NUM_VAL", 2, "DATASETS.SHAPES.IMAGE_SIZE", 64]
    cfg.merge_from_list([*options, "DATASETS.SHAPES.ROOT", str(tmp_path), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 10])
    for kind, mapper in (("panoptic", "coco_panoptic_lsj"), ("semantic", "mask_former_semantic")):
        keys = ["DATASETS.TRAIN", (f"shapes_{kind}_train",), "DATASETS.TEST", (f"shapes_{kind}_val",)]
        cfg.merge_from_list([*keys, "INPUT.DATASET_MAPPER_NAME", mapper])
        check_datasets(cfg)
        (first, _) = load_dataset(f"shapes_{kind}_val")
        instances = build_mapper(cfg, is_train=False, with_instances=True)(first)["instances"]
        assert len(instances) > 1
        assert not (instances.gt_masks.tensor.sum(0) > 1).any()
