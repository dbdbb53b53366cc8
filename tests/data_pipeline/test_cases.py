"""Users' reports about data: each small input of tests/data/cases ends as its user expects."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.structures import Instances
from PIL import Image

from dimaskdino.config import Config
from dimaskdino.data import build_mapper, build_test_loader, build_train_loader, register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.validation.files import Inspection, inspect_dataset
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import ConfigError, DatasetError, UserError
from dimaskdino.evaluation import CocoEvaluator, build_evaluator

pytestmark = [pytest.mark.cases, pytest.mark.usefixtures("registrations")]

CASES = Path(__file__).parents[1] / "data" / "cases"
Register = Callable[..., Config]


@pytest.fixture
def case(cfg: Config) -> Register:
    """Registers a file of a case as "mine" and returns a configuration that trains and tests on it."""

    def register(folder: str, file_name: str = "train.json") -> Config:
        (path,) = CASES.glob(f"{folder}-*")
        register_coco_instances("mine", {}, str(path / file_name), str(path / "images"))
        cfg.merge_from_list(["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",), "SOLVER.IMS_PER_BATCH", 1])
        cfg.merge_from_list(["DATALOADER.ASPECT_RATIO_GROUPING", False])
        return cfg

    return register


def message(cfg: Config, error: type[UserError] = DatasetError, **which: bool) -> str:
    """The one line that the check at the start answers with."""
    with pytest.raises(error) as raised:
        check_datasets(cfg, **which)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def kinds(inspection: Inspection) -> set[str]:
    return {finding.kind for finding in inspection.findings}


def trains_and_tests(cfg: Config) -> dict[str, Any]:
    """The first training image, after a check, of a dataset whose images can all be read."""
    check_datasets(cfg)
    assert list(build_test_loader(cfg, "mine"))
    (first,) = next(iter(build_train_loader(cfg)))
    return first


def test_exif_turns_photos_and_the_key_is_named(case: Register) -> None:
    cfg = case("01")
    text = message(cfg)
    assert "EXIF" in text
    assert "part_01.jpg" in text
    assert "INPUT.APPLY_EXIF False" in text
    inspection = inspect_dataset("mine")
    assert "fit only the pixels as stored" in inspection.exif
    assert kinds(inspection) == {"image has another size than listed"}
    cfg.INPUT.APPLY_EXIF = False
    assert trains_and_tests(cfg)["height"] == 64


def test_exif_that_keeps_the_size_is_said(case: Register, caplog: pytest.LogCaptureFixture) -> None:
    check_datasets(case("01", "val.json"))
    for text in (caplog.text, inspect_dataset("mine").exif):
        assert "EXIF" in text
        assert "INPUT.APPLY_EXIF" in text


def test_windows_paths_are_named_as_the_cause(case: Register) -> None:
    assert "backslashes" in message(case("07"))
    (finding,) = inspect_dataset("mine").findings
    assert "backslashes" in finding.where


def test_text_category_id_is_shown_as_text(case: Register) -> None:
    text = message(case("08"))
    assert "'2'" in text
    assert "annotation 1 of part_01.png" in text
    assert kinds(inspect_dataset("mine")) == {"category: the id is of another type"}


def test_byte_order_mark_is_read(case: Register) -> None:
    trains_and_tests(case("12"))
    DatasetCatalog.remove("mine")
    case("12")
    register_all()  # without a check: detectron2's own reader stops at the mark
    assert len(DatasetCatalog.get("mine")) == 1
    assert MetadataCatalog.get("mine").thing_classes[1] == "écrou"
    assert inspect_dataset("mine").findings == []


@pytest.mark.filterwarnings("error::UserWarning")
def test_gray_photos_train_as_color_and_as_gray(case: Register) -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # of pixels that cannot be written to, which torch says once a process
    try:
        _train_in_both_formats(case("14"))
    finally:
        torch.set_warn_always(before)


def _train_in_both_formats(cfg: Config) -> None:
    assert trains_and_tests(cfg)["image"].shape[0] == 3
    cfg.INPUT.FORMAT = "L"
    assert trains_and_tests(cfg)["image"].shape[0] == 1
    cfg.INPUT.COLOR_AUG_SSD = True
    text = message(cfg, ConfigError)
    assert "INPUT.COLOR_AUG_SSD" in text
    assert "INPUT.FORMAT" in text


def test_own_data_named_coco_needs_its_own_name(cfg: Config) -> None:
    register_all(next(CASES.glob("18-*")))
    cfg.merge_from_list(["DATASETS.TRAIN", ("coco_2017_train",), "DATASETS.TEST", ()])
    assert "under a name of its own" in message(cfg)
    (finding,) = inspect_dataset("coco_2017_train").findings
    assert "under a name of its own" in finding.where
    assert len(finding.where) < 240


def test_deep_test_image_is_found_before_training(case: Register) -> None:
    cfg = case("23", "val.json")
    text = message(cfg, train=False)
    assert "part_06.tif" in text
    assert "8 bits" in text
    (finding,) = inspect_dataset("mine").findings
    assert "part_06.tif" in finding.where


def test_names_and_paths_may_be_in_any_script(case: Register) -> None:
    assert "相机 1" in trains_and_tests(case("26"))["file_name"]
    assert inspect_dataset("mine").findings == []
    assert "螺栓" in inspect_dataset("mine").counts.table()


def test_normalized_polygons_are_refused(case: Register) -> None:
    cfg = case("27")
    for which in ({"train": False}, {"test": False}):
        assert "normalized" in message(cfg, **which)
    assert "coordinates: 0 to 1, as if normalized" in kinds(inspect_dataset("mine"))


@pytest.fixture
def cityscapes(cfg: Config) -> Config:
    """A configuration that trains and tests on the case's Cityscapes, registered as detectron2 does."""
    folders = [str(next(CASES.glob("29-*")) / "cityscapes" / name / "val") for name in ("leftImg8bit", "gtFine")]
    load = partial(load_cityscapes_instances, *folders, from_json=False, to_polygons=False)
    DatasetCatalog.register("mine", load)
    MetadataCatalog.get("mine").set(evaluator_type="cityscapes_instance", thing_classes=["person", "car"])
    cfg.merge_from_list(["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",), "SOLVER.IMS_PER_BATCH", 1])
    cfg.merge_from_list(["INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0, "INPUT.IMAGE_SIZE", 96])  # leaves the image
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    return cfg


def test_missing_cityscapes_package_is_named(cityscapes: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)  # as if it were not installed
    for which in ({"train": False}, {"test": False}):
        assert "pip install cityscapesscripts" in message(cityscapes, **which)
    with pytest.raises(DatasetError, match="pip install cityscapesscripts"):
        inspect_dataset("mine")


class Label(NamedTuple):
    """What detectron2 reads of a label of cityscapesscripts."""

    name: str
    id: int
    hasInstances: bool = True  # noqa: N815 (their names)
    ignoreInEval: bool = False  # noqa: N815


def test_cityscapes_trains_with_its_package(cityscapes, monkeypatch, caplog, tmp_path):
    helpers = ModuleType("cityscapesscripts.helpers.labels")
    helpers.labels = [Label("road", 7, hasInstances=False), Label("person", 24), Label("car", 26)]
    helpers.id2label = {label.id: label for label in helpers.labels}
    helpers.name2label = {label.name: label for label in helpers.labels}
    for name in ("cityscapesscripts", "cityscapesscripts.helpers", "cityscapesscripts.helpers.labels"):
        monkeypatch.setitem(sys.modules, name, helpers)
    assert trains_and_tests(cityscapes)["instances"].gt_classes.tolist() == [0, 1]
    assert inspect_dataset("mine").findings == []
    build_evaluator(cityscapes, "mine", str(tmp_path))
    assert "mine is scored by COCO's AP" in caplog.text


def test_text_ids_work_throughout(case: Register, tmp_path: Path) -> None:
    cfg = case("31")
    assert trains_and_tests(cfg)["image_id"] == "1541715000001"
    assert inspect_dataset("mine").findings == []
    evaluator = CocoEvaluator(dataset_name="mine", output_dir=str(tmp_path))
    cfg.INPUT.MIN_SIZE_TEST = 64  # of the images, which leaves them as they are
    for entry in load_dataset("mine"):
        truth = build_mapper(cfg, is_train=False, with_instances=True)(entry)["instances"]
        found = Instances(truth.image_size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
        found.pred_masks, found.scores = truth.gt_masks.tensor, torch.ones(len(truth))
        evaluator.process([entry], [{"instances": found}])
    scores = evaluator.evaluate()
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(100.0)


def test_merged_files_with_the_same_image_ids_are_refused(case: Register) -> None:
    cfg = case("32")
    for which in ({"train": False}, {"test": False}):
        text = message(cfg, **which)
        assert "image id 1 of monday/part_01.png and tuesday/part_01.png" in text
        assert "tools/check_dataset.py mine" in text
    assert "image id: used more than once" in kinds(inspect_dataset("mine"))


@pytest.mark.parametrize("name", ["coco_instance_lsj", "coco_instance_detr"])
@pytest.mark.parametrize("size", [(10, 20000), (20000, 10)])
def test_very_long_image_keeps_a_pixel(cfg: Config, tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "long.png")
    width, height = size
    corners = [0, 0, width, 0, width, height, 0, height]
    entry = {"file_name": str(tmp_path / "long.png"), "annotations": [{"category_id": 0, "segmentation": [corners]}]}
    cfg.merge_from_list(["INPUT.DATASET_MAPPER_NAME", name, "INPUT.MAX_SIZE_TEST", 64, "INPUT.MAX_SIZE_TRAIN", 64])
    for is_train in (True, False):
        mapped = build_mapper(cfg, is_train=is_train, with_instances=True)(entry)
        assert min(mapped["image"].shape) >= 1
        assert len(mapped["instances"]) == 1
