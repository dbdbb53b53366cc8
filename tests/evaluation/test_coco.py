"""COCO evaluation of predictions made by hand from the ground truth; pycocotools is the reference."""

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from dimaskdino.config import get_cfg
from dimaskdino.data.datasets.registration import load_dataset, register_coco_format
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import ConfigError, DatasetError, UserError
from dimaskdino.evaluation import EVALUATOR_REGISTRY, CocoEvaluator, LayerwiseEvaluator, build_evaluator, check_classes
from dimaskdino.evaluation.coco import coco_curves
from dimaskdino.evaluation.coco_options import AREA_RANGES, CocoOptions
from dimaskdino.evaluation.truth import make_truth

CASES = Path(__file__).parents[1] / "data" / "cases"
SIDE = 40
CATEGORY_IDS = {3: 0, 7: 1}
# (image id, class index, x0, y0, x1, y1, is crowd): image 2 holds a crowd region only, image 3 nothing.
OBJECTS = [(1, 0, 2, 2, 20, 20, False), (1, 1, 20, 22, 38, 36, False), (2, 0, 0, 0, 40, 30, True)]
IMAGE_IDS = [1, 2, 3]
TASKS = ("bbox", "segm")


def mask_of(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    return mask


def annotation(number: int, image_id: int, label: int, box: tuple[int, ...], crowd: bool) -> dict[str, Any]:
    rle = mask_api.encode(mask_of(*box))
    x0, y0, x1, y1 = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": list(CATEGORY_IDS)[label],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": int(crowd),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def hand_made_truth() -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in IMAGE_IDS],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [annotation(n, o[0], o[1], o[2:6], o[6]) for n, o in enumerate(OBJECTS, start=1)],
    }


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    """``register(name, load, **metadata)`` registers a dataset for the test."""
    names: list[str] = []

    def register(name: str, load: Callable[[], Any], **metadata: Any) -> str:
        DatasetCatalog.register(name, load)
        names.append(name)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def dataset(tmp_path: Path, register: Callable[..., str]) -> str:
    """The hand-made truth as a registered COCO file."""
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(hand_made_truth()))
    known = {"thing_classes": ["cat", "dog"], "thing_dataset_id_to_contiguous_id": CATEGORY_IDS}
    return register("hand_made", list, json_file=str(path), **known)


def instances(found: list[tuple[int, tuple[int, ...], float]]) -> Instances:
    """Instances from (class index, box, score); masks fill the boxes."""
    result = Instances((SIDE, SIDE))
    result.pred_boxes = Boxes(torch.tensor([box for _, box, _ in found], dtype=torch.float32).reshape(-1, 4))
    result.pred_classes = torch.tensor([label for label, _, _ in found], dtype=torch.int64)
    result.scores = torch.tensor([score for _, _, score in found])
    masks = [torch.from_numpy(mask_of(*box)).bool() for _, box, _ in found]
    result.pred_masks = torch.stack(masks) if masks else torch.zeros(0, SIDE, SIDE, dtype=torch.bool)
    return result


def without_masks(found: Instances) -> Instances:
    result = Instances(found.image_size, **found.get_fields())
    result.remove("pred_masks")
    return result


def perfect() -> dict[Any, Instances]:
    by_image: dict[Any, list[Any]] = {image_id: [] for image_id in IMAGE_IDS}
    for image_id, label, *box, crowd in OBJECTS:
        if not crowd:
            by_image[image_id].append((label, tuple(box), 0.9))
    return {image_id: instances(found) for image_id, found in by_image.items()}


def scores_of(evaluator: Any, predictions: dict[Any, Instances]) -> dict[str, dict[str, float]]:
    for image_id, found in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return evaluator.evaluate()


def assert_perfect(scores: dict[str, dict[str, float]], tasks: tuple[str, ...] = TASKS) -> None:
    assert tuple(scores) == tasks
    for task in tasks:
        assert scores[task]["AP"] == pytest.approx(100.0)
        assert scores[task]["AP-dog"] == pytest.approx(100.0)


def change_truth(dataset: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the annotation file of ``dataset``."""
    path = Path(MetadataCatalog.get(dataset).json_file)
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def test_perfect_predictions_score_100(dataset: str, tmp_path: Path) -> None:
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect())
    assert_perfect(scores)
    assert all(math.isnan(scores[task]["APl"]) for task in TASKS)  # no object is large
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert [result["category_id"] for result in written] == [3, 7]
    assert written[0]["bbox"] == [2.0, 2.0, 18.0, 18.0]


def test_classes_known_only_from_the_file_are_read(dataset: str, tmp_path: Path) -> None:
    name = "registered_by_detectron2"
    register_coco_instances(name, {}, MetadataCatalog.get(dataset).json_file, str(tmp_path))
    try:
        scores = scores_of(CocoEvaluator(dataset_name=name, output_dir=str(tmp_path)), perfect())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert {key for key in scores["bbox"] if key.startswith("AP-")} == {"AP-cat", "AP-dog"}


def test_a_model_without_masks_is_scored_by_boxes(dataset: str, tmp_path: Path, caplog: Any) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path))
    with caplog.at_level("INFO"):
        assert_perfect(scores_of(evaluator, {key: without_masks(found) for key, found in perfect().items()}), ("bbox",))
    assert "| box " in caplog.text
    assert "| mask " not in caplog.text


def test_a_dataset_without_masks_is_scored_by_boxes(dataset: str, tmp_path: Path) -> None:
    change_truth(dataset, lambda coco: coco["annotations"][1].pop("segmentation"))
    assert_perfect(scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path)), perfect()), ("bbox",))


def remove_areas(coco: dict[str, Any]) -> None:
    for number, found in enumerate(coco["annotations"]):
        found.update([{"area": None}, {"area": "324"}, {"area": float("nan")}][number % 3])
    del coco["annotations"][0]["area"]


def test_small_medium_and_large_are_as_coco_has_them() -> None:
    assert [bounds for _, *bounds in AREA_RANGES] == Params("bbox").areaRng


@pytest.mark.parametrize("has_mask", [True, False])
def test_a_missing_area_is_the_mask_or_box_area(dataset: str, tmp_path: Path, has_mask: bool) -> None:
    def medium(coco: dict[str, Any]) -> None:
        # 36 x 36 pixels; COCO calls areas from 32 x 32 medium. The dog's 18 x 14 are small.
        coco["annotations"][0] = annotation(1, 1, 0, (2, 2, 38, 38), False)
        remove_areas(coco)
        if not has_mask:
            del coco["annotations"][0]["segmentation"]

    change_truth(dataset, medium)
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    assert [found["area"] for found in evaluator._truth.annotations or ()] == [36 * 36, 18 * 14, 40 * 30]
    scores = scores_of(evaluator, {1: instances([(0, (2, 2, 38, 38), 0.9)])})
    for task in TASKS if has_mask else ("bbox",):
        assert (scores[task]["APs"], scores[task]["APm"]) == (0.0, pytest.approx(100.0))


@pytest.mark.parametrize("ids", [[0, 1, 2], [-1, -2, -3], ["a", "b", "c"], [0.5, 1.5, 2.5]])
def test_annotation_ids_do_not_change_scores(dataset: str, tmp_path: Path, ids: list[Any]) -> None:
    change_truth(
        dataset, lambda coco: [found.update(id=new) for found, new in zip(coco["annotations"], ids, strict=True)]
    )
    assert_perfect(scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect()))


def test_an_object_without_iscrowd_is_no_crowd(dataset: str, tmp_path: Path) -> None:
    change_truth(dataset, lambda coco: [found.pop("iscrowd") for found in coco["annotations"][:2]])
    assert_perfect(scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect()))


def entries() -> list[dict[str, Any]]:
    """``OBJECTS`` in detectron2's own format."""
    by_image: dict[int, list[Any]] = {image_id: [] for image_id in IMAGE_IDS}
    for image_id, label, x0, y0, x1, y1, crowd in OBJECTS:
        by_image[image_id].append(
            {
                "bbox": [x0, y0, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": label,
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                "iscrowd": int(crowd),
            }
        )
    return [
        {"file_name": f"{image_id}.png", "image_id": image_id, "height": SIDE, "width": SIDE, "annotations": found}
        for image_id, found in by_image.items()
    ]


@pytest.fixture
def by_function(register: Callable[..., str]) -> Callable[..., str]:
    """Registers a function that lists ``entries()``, with metadata, as "by_function"."""
    return lambda load=entries, **metadata: register("by_function", load, thing_classes=["cat", "dog"], **metadata)


def test_a_function_dataset_is_checked_and_evaluated_repeatedly(by_function, tmp_path):
    name = by_function(lambda: [{**entry, "file_name": str(tmp_path / entry["file_name"])} for entry in entries()])
    for image_id in IMAGE_IDS:
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{image_id}.png")
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TEST", (name,), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2])
    for run in ("first", "second"):
        check_datasets(cfg, train=False)
        assert_perfect(scores_of(CocoEvaluator(dataset_name=name, output_dir=str(tmp_path / run)), perfect()))


def numpy_form(found: dict[str, Any]) -> dict[str, Any]:
    polygon = np.array(found["segmentation"][0], dtype=np.float32)
    return {"bbox": np.array(found["bbox"]), "bbox_mode": int(BoxMode.XYXY_ABS), "segmentation": [polygon]}


def tuple_form(found: dict[str, Any]) -> dict[str, Any]:
    x0, y0, x1, y1 = found["bbox"]
    numbers = tuple(np.int64(x) for x in found["segmentation"][0])
    return {"bbox": (x0, y0, x1 - x0, y1 - y0), "bbox_mode": BoxMode.XYWH_ABS, "segmentation": [numbers]}


def rle_form(found: dict[str, Any]) -> dict[str, Any]:
    return {"segmentation": mask_api.encode(mask_of(*found["bbox"]))}


def run_length_form(found: dict[str, Any]) -> dict[str, Any]:
    pixels = mask_of(*found["bbox"]).astype(int).T.reshape(-1)
    changes = np.flatnonzero(np.diff(np.concatenate(([0], pixels, [1 - pixels[-1]]))))
    runs = np.diff(np.concatenate(([0], changes))).tolist()
    return {"segmentation": {"size": [SIDE, SIDE], "counts": runs}}


@pytest.mark.parametrize("form", [numpy_form, tuple_form, rle_form, run_length_form], ids=lambda form: form.__name__)
def test_annotations_mean_the_same_in_every_form(by_function, tmp_path, form):
    listed = [
        {**entry, "annotations": [{**found, **form(found)} for found in entry["annotations"]]} for entry in entries()
    ]
    before = repr(listed)
    evaluator = CocoEvaluator(dataset_name=by_function(lambda: listed), output_dir=str(tmp_path))
    # Half of the cat is found: an IoU of 0.5 counts at the first threshold alone.
    half = {**perfect(), 1: instances([(0, (2, 2, 11, 20), 0.9), (1, OBJECTS[1][2:6], 0.9)])}
    scores = scores_of(evaluator, half)
    assert scores["bbox"]["AP-cat"] == scores["segm"]["AP-cat"] == pytest.approx(10.0)
    assert scores["bbox"]["AP-dog"] == scores["segm"]["AP-dog"] == pytest.approx(100.0)
    assert repr(listed) == before


def test_classes_keep_their_names_in_any_order_of_category_ids(by_function: Callable[..., str], tmp_path: Path) -> None:
    name = by_function(thing_dataset_id_to_contiguous_id={9: 0, 4: 1})
    only_the_cat = {image_id: instances([]) for image_id in IMAGE_IDS} | {1: instances([(0, (2, 2, 20, 20), 0.9)])}
    scores = scores_of(CocoEvaluator(dataset_name=name, output_dir=str(tmp_path)), only_the_cat)
    for task in TASKS:
        assert scores[task]["AP-cat"] == pytest.approx(100.0)
        assert scores[task]["AP-dog"] == 0.0


def test_a_class_that_the_file_lacks_is_not_measured(dataset: str, tmp_path: Path) -> None:
    def without_the_dog(coco: dict[str, Any]) -> None:
        del coco["categories"][1], coco["annotations"][1]

    change_truth(dataset, without_the_dog)
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect())
    assert scores["bbox"]["AP-cat"] == pytest.approx(100.0)
    assert math.isnan(scores["bbox"]["AP-dog"])


def test_no_predictions_score_zero(dataset: str, tmp_path: Path) -> None:
    nothing = {image_id: instances([]) for image_id in IMAGE_IDS}
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), nothing)
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == 0.0
    assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text()) == []


def test_only_detections_outside_crowds_are_false_positives(dataset: str, tmp_path: Path) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    in_crowd = {**perfect(), 2: instances([(0, (5, 5, 15, 15), 0.95)])}
    assert scores_of(evaluator, in_crowd)["bbox"]["AP-cat"] == pytest.approx(100.0)
    evaluator.reset()
    elsewhere = {**perfect(), 3: instances([(0, (5, 5, 15, 15), 0.95)])}
    # A false positive with a higher score halves the precision at every recall.
    assert scores_of(evaluator, elsewhere)["bbox"]["AP-cat"] == pytest.approx(50.0)


def test_a_class_beyond_the_dataset_is_named(dataset: str, tmp_path: Path) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    with pytest.raises(DatasetError, match="class 2.*hand_made.*NUM_CLASSES to 2"):
        scores_of(evaluator, {1: instances([(2, (0, 0, 9, 9), 0.5)])})


def test_scores_that_are_not_finite_are_an_error(dataset: str, tmp_path: Path) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="image 1.*MODEL.WEIGHTS"):
        scores_of(evaluator, {1: instances([(0, (0, 0, 9, 9), math.nan)])})


def test_evaluation_can_be_limited_to_the_predicted_images(dataset: str, tmp_path: Path) -> None:
    only_empty = {3: instances([])}
    whole = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "whole"))
    assert scores_of(whole, only_empty)["bbox"]["AP"] == 0.0
    seen = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "seen"), seen_only=True)
    assert math.isnan(scores_of(seen, only_empty)["bbox"]["AP"])


@pytest.mark.parametrize(("kind", "value"), [("image_id", "1"), ("category_id", "3")])
def test_annotations_that_name_nothing_listed_are_an_error(dataset: str, tmp_path: Path, kind: str, value: str) -> None:
    change_truth(dataset, lambda coco: [found.update({kind: value}) for found in coco["annotations"]])
    with pytest.raises(DatasetError, match=f"truth.json.*{value!r}"):
        CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))


def test_annotations_of_unlisted_images_are_left_out(dataset: str, tmp_path: Path, caplog: Any) -> None:
    change_truth(dataset, lambda coco: coco["annotations"].append(annotation(9, 99, 0, (1, 1, 9, 9), False)))
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    assert_perfect(scores_of(evaluator, perfect()))
    assert "1 annotations of unlisted images" in caplog.text


def test_an_image_of_another_id_is_an_error(dataset: str, tmp_path: Path) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"), seen_only=True)
    with pytest.raises(DatasetError, match="image '1'.*hand_made"):
        scores_of(evaluator, {str(key): found for key, found in perfect().items()})


def dense_case(register: Callable[..., str], found: int) -> tuple[str, Instances]:
    """One image with 176 objects of a class, and a prediction of the first ones."""
    truth = json.loads((CASES / "02-dense-over-100" / "val.json").read_text())
    name = register(
        "dense", list, json_file=str(CASES / "02-dense-over-100" / "val.json"), thing_classes=["cell"],
        thing_dataset_id_to_contiguous_id={1: 0},
    )  # fmt: skip
    boxes = torch.tensor([a["bbox"] for a in truth["annotations"][:found]], dtype=torch.float32)
    result = Instances((180, 260))
    result.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
    result.pred_classes = torch.zeros(found, dtype=torch.int64)
    result.scores = torch.linspace(0.99, 0.5, found)
    return name, result


@pytest.mark.cases
def test_more_than_100_objects_are_scored_under_their_own_name(register, tmp_path, caplog):
    name, found = dense_case(register, 176)
    evaluator = CocoEvaluator(dataset_name=name, output_dir=str(tmp_path), max_detections=400)
    scores = scores_of(evaluator, {1: found})["bbox"]
    # 100 of 176 objects reach recall 0.568: 57 of the 101 recalls that AP averages.
    assert scores["AP"] == pytest.approx(100 * 57 / 101)
    assert scores["AP@400"] == pytest.approx(100.0)
    for part in ("AP@400", "176 objects", "76 of its 176"):
        assert part in caplog.text


def test_too_few_detections_for_the_objects_are_reported(register, tmp_path, caplog):
    name, found = dense_case(register, 100)
    scores = scores_of(CocoEvaluator(dataset_name=name, output_dir=str(tmp_path), max_detections=100), {1: found})
    assert scores["bbox"]["AP@176"] == scores["bbox"]["AP"] == pytest.approx(100 * 57 / 101)
    assert "TEST.DETECTIONS_PER_IMAGE is 100" in caplog.text


def test_cocos_limit_stands_alone_where_it_is_enough(dataset: str, tmp_path: Path, caplog: Any) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path), max_detections=100)
    with caplog.at_level("INFO"):
        assert not [key for key in scores_of(evaluator, perfect())["bbox"] if "@" in key]
        assert "@" not in caplog.text
        CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path), max_detections=300)
    assert "AP@300 counts 300" in caplog.text
    assert "cannot count" not in caplog.text


class CountsImages(DatasetEvaluator):
    """An evaluator of a user's own."""

    def __init__(self, cfg: Any, dataset_name: str, output_folder: str) -> None:
        self.built_from = (cfg, dataset_name, output_folder)


def test_a_registered_evaluator_scores_datasets_of_its_type(register: Callable[..., str], monkeypatch: Any) -> None:
    monkeypatch.setitem(EVALUATOR_REGISTRY._obj_map, "count_images", CountsImages)
    cfg, name = get_cfg(), register("mine", list, thing_classes=["cat"], evaluator_type="count_images")
    evaluator = build_evaluator(cfg, name, "out")
    assert isinstance(evaluator, CountsImages)
    assert evaluator.built_from == (cfg, name, "out")


def test_a_dataset_of_an_unknown_type_is_scored_by_ap(dataset: str, tmp_path: Path) -> None:
    MetadataCatalog.get(dataset).evaluator_type = "lvis"
    assert isinstance(build_evaluator(get_cfg(), dataset, str(tmp_path)), CocoEvaluator)


def order_case(register: Callable[..., str], **files: str) -> Any:
    """Datasets "train" and "val" whose classes come from the files of the case, and their configuration."""
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    for split, name in files.items():
        setattr(cfg.DATASETS, split, (register(name, list, json_file=str(CASES / "06-class-order" / f"{name}.json")),))
    return cfg


def test_another_order_of_classes_is_an_error_that_shows_both(register: Callable[..., str]) -> None:
    cfg = order_case(register, TRAIN="train", TEST="val")
    with pytest.raises(DatasetError, match="DATASETS.TRAIN") as error:
        check_classes(cfg)
    for part in ("train: 3 classes, with 1 'nut', 2 'washer'", "val: 3 classes, with 1 'washer', 2 'nut'"):
        assert part in str(error.value)


def test_other_classes_are_an_error_that_shows_both(register: Callable[..., str]) -> None:
    cfg = order_case(register, TRAIN="train")
    cfg.DATASETS.TEST = (register("other", list, thing_classes=["bolt", "nut"]),)
    with pytest.raises(DatasetError, match=r"train: 3 classes, with 2 'washer'\. other: 2 classes"):
        check_classes(cfg)


@pytest.mark.parametrize(("differing", "more"), [(5, False), (7, True)])
def test_only_the_first_differing_classes_are_listed(register: Callable[..., str], differing: int, more: bool) -> None:
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = differing + 1
    for split in ("TRAIN", "TEST"):
        names = ["same", *(f"{split} {index}" for index in range(differing))]
        setattr(cfg.DATASETS, split, (register(f"set_{split}", list, thing_classes=names),))
    with pytest.raises(DatasetError) as error:
        check_classes(cfg)
    assert (" more" in str(error.value)) is more


def test_another_models_training_set_is_not_compared(register: Callable[..., str]) -> None:
    cfg = order_case(register, TRAIN="train", TEST="val")
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    check_classes(cfg)


def test_equal_or_unknown_classes_pass(register: Callable[..., str]) -> None:
    cfg = order_case(register, TRAIN="train")
    cfg.DATASETS.TEST = (register("same", list, thing_classes=["bolt", "nut", "washer"]),)
    check_classes(cfg)
    cfg.DATASETS.TRAIN = ("not_registered", register("absent", list, json_file="absent.json"))
    check_classes(cfg)


def pycocotools_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], task: str, limits: list[int]
) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), task)
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"]


@pytest.mark.parametrize("limits", [[100], [2, 300]], ids=str)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_precision_is_that_of_pycocotools_bit_for_bit(seed: int, task: str, limits: list[int]) -> None:
    truth, results = random_truth_and_results(seed)
    results = [{key: value for key, value in found.items() if key != OTHER_SHAPE[task]} for found in results]
    expected = pycocotools_precision(truth, results, task, limits)
    assert 0.05 < expected[expected > -1].mean() < 0.95
    np.testing.assert_array_equal(precision_of(truth, results, task, limits), expected)


OTHER_SHAPE = {"bbox": "segmentation", "segm": "bbox"}


def precision_of(truth: dict[str, Any], results: list[dict[str, Any]], task: str, limits: list[int]) -> np.ndarray:
    made = make_truth(truth, "random")
    numbered = [
        {
            **found,
            "image_id": made.image_numbers[found["image_id"]],
            "category_id": made.category_numbers[found["category_id"]],
        }
        for found in results
    ]
    return coco_curves(made.coco, numbered, task, limits=limits).precision


@pytest.mark.parametrize(
    "new_id",
    [lambda value: f"{value:02}", float, lambda value: value - 9, lambda value: value + 2**60],
    ids=["text", "float", "negative", "large"],
)
@pytest.mark.parametrize("kind", ["image", "category"])
@pytest.mark.parametrize("task", TASKS)
def test_ids_of_every_kind_give_the_same_numbers(new_id: Callable[[int], Any], kind: str, task: str) -> None:
    truth, results = random_truth_and_results(seed=3)
    results = [{key: value for key, value in found.items() if key != OTHER_SHAPE[task]} for found in results]
    expected = pycocotools_precision(truth, results, task, [100])
    for entry in truth["images" if kind == "image" else "categories"]:
        entry["id"] = new_id(entry["id"])
    for entry in [*truth["annotations"], *results]:
        entry[f"{kind}_id"] = new_id(entry[f"{kind}_id"])
    np.testing.assert_array_equal(precision_of(truth, results, task, [100]), expected)


def test_images_may_have_names_in_place_of_numbers(by_function: Callable[..., str], tmp_path: Path) -> None:
    name = by_function(lambda: [{**entry, "image_id": f"image {entry['image_id']}"} for entry in entries()])
    evaluator = CocoEvaluator(dataset_name=name, output_dir=str(tmp_path), seen_only=True)
    assert_perfect(scores_of(evaluator, {f"image {image_id}": found for image_id, found in perfect().items()}))


def random_truth_and_results(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Twenty images of random boxes, every fifth object a crowd, and detections that shift and miss some."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results = []
    for image_id in range(1, 21):
        for _ in range(int(rng.integers(0, 7))):
            x0, y0 = rng.integers(0, SIDE // 2, 2)
            box = (int(x0), int(y0), int(x0 + rng.integers(4, 20)), int(y0 + rng.integers(4, 20)))
            number = len(annotations) + 1
            annotations.append(annotation(number, image_id, int(rng.integers(2)), box, number % 5 == 0))
            shifted = tuple(int(np.clip(side + rng.integers(-2, 3), 0, SIDE)) for side in box)
            found = annotation(0, image_id, int(rng.random() < 0.2), shifted, False)
            if rng.random() < 0.8:
                results.append({**found, "category_id": annotations[-1]["category_id"], "score": float(rng.random())})
            results.append({**found, "score": float(rng.random() * 0.5)})
    truth = {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, 21)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": annotations,
    }
    keep = ("image_id", "category_id", "bbox", "segmentation", "score")
    return truth, [{key: result[key] for key in keep} for result in results]


def layerwise(dataset: str, folder: Path, form: Callable[[Instances], Instances] = lambda found: found) -> Any:
    """Results of an evaluation by stage: layer 0 has wrong boxes, layer 1 is perfect."""
    cfg = get_cfg()
    cfg.TEST.EVAL_LAYERS = ["all"]
    evaluator = build_evaluator(cfg, dataset, str(folder))
    assert isinstance(evaluator, LayerwiseEvaluator)
    for image_id, perfect_instances in perfect().items():
        found = form(perfect_instances)
        wrong_boxes = Instances(found.image_size, **found.get_fields())
        wrong_boxes.pred_boxes = Boxes(torch.zeros(len(found), 4))
        layers = {"layer.0": {"instances": wrong_boxes}, "layer.1": {"instances": found}}
        evaluator.process([{"image_id": image_id}], [{"instances": found, "layers": layers}])
    return evaluator.evaluate()


def test_every_stage_is_scored_and_written(dataset: str, tmp_path: Path) -> None:
    results = layerwise(dataset, tmp_path / "out")
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    assert results["layers"] == pytest.approx(
        {
            **{"layer.0/box_AP": 0.0, "layer.0/mask_AP": 100.0, "layer.0/gap": -100.0},
            **{"layer.1/box_AP": 100.0, "layer.1/mask_AP": 100.0, "layer.1/gap": 0.0},
        }
    )
    rows = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert [row["stage"] for row in rows] == ["layer.0", "layer.1"]
    assert rows[0]["bbox"]["APl"] is None
    head, first, _ = (tmp_path / "out" / "layers.csv").read_text().splitlines()
    assert head == "stage,box_AP,mask_AP,gap"
    assert first.split(",")[0] == "layer.0"
    assert [float(value) for value in first.split(",")[1:]] == pytest.approx([0.0, 100.0, -100.0])


def test_stages_without_masks_have_no_mask_columns(dataset: str, tmp_path: Path) -> None:
    results = layerwise(dataset, tmp_path / "out", without_masks)
    assert results["layers"] == pytest.approx({"layer.0/box_AP": 0.0, "layer.1/box_AP": 100.0})
    assert (tmp_path / "out" / "layers.csv").read_text().splitlines() == [
        *("stage,box_AP", "layer.0,0.0", f"layer.1,{results['layers']['layer.1/box_AP']}")
    ]


def test_further_limits_and_areas_are_reported(register: Callable[..., str], tmp_path: Path) -> None:
    name, found = dense_case(register, 176)
    truth = json.loads((CASES / "02-dense-over-100" / "val.json").read_text())
    areas = sorted(a["bbox"][2] * a["bbox"][3] for a in truth["annotations"])
    cut = (areas[0] + areas[-1]) / 2
    cfg = get_cfg()
    cfg.TEST.COCO.LIMITS, cfg.TEST.COCO.AREA_RANGES = [10, 88, 300], [["low", 0, cut], ["none", 1e8, 1e9]]
    options = CocoOptions.from_config(cfg)
    evaluator = CocoEvaluator(dataset_name=name, output_dir=str(tmp_path), max_detections=400, options=options)
    scores = scores_of(evaluator, {1: found})["bbox"]
    # All detections are right, so recall is what the limit leaves of 176 objects.
    assert [scores[f"AR@{limit}"] for limit in (10, 88, 300)] == pytest.approx([1000 / 176, 50.0, 100.0])
    assert scores["AP@300"] == pytest.approx(100.0)
    assert scores["AP"] == pytest.approx(100 * 57 / 101)
    assert 0 < scores["AR_low"] < 100
    assert math.isnan(scores["AP_none"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("LIMITS", [0]),
        ("LIMITS", [1.5]),
        ("AREA_RANGES", [["tiny", 5]]),
        ("AREA_RANGES", [["tiny", 9, 5]]),
        ("AREA_RANGES", [["tiny", 0, 5], ["tiny", 5, 9]]),
        ("AREA_RANGES", [[0, 5, "tiny"]]),
    ],
)
def test_limits_and_areas_that_are_none_are_refused(key: str, value: Any) -> None:
    cfg = get_cfg()
    cfg.merge_from_list([f"TEST.COCO.{key}", value])
    with pytest.raises(ConfigError, match=rf"TEST\.COCO\.{key}"):
        CocoOptions.from_config(cfg)


def test_lvis_counts_what_was_labeled(
    register: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [(2, 2, 20, 20), (20, 22, 38, 36)]
    content = {
        "images": [
            {"id": 5, "height": SIDE, "width": SIDE, "coco_url": "http://x/val2017/5.jpg"}
            | {"neg_category_ids": [30], "not_exhaustive_category_ids": [20]}
        ],
        "annotations": [annotation(number, 5, 0, box, False) for number, box in enumerate(boxes, start=1)],
        "categories": [{"id": 10 * n, "name": f"c{n}", "frequency": "rcff"[n - 1]} for n in (1, 2, 3, 4)],
    }
    for each, category in zip(content["annotations"], (10, 20), strict=True):
        each["category_id"] = category
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    register_coco_format("lvis_like", path, tmp_path, None, evaluator_type="lvis")
    try:
        (entry,) = load_dataset("lvis_like")
        assert entry["file_name"] == str(tmp_path / "val2017/5.jpg")
        assert (entry["neg_category_ids"], entry["not_exhaustive_category_ids"]) == ([2], [1])
        evaluator = build_evaluator(get_cfg(), "lvis_like", str(tmp_path))
        found = Instances((SIDE, SIDE))
        # Both objects; a class that was not looked for; a second object of a class whose labels are not exhaustive.
        found.pred_boxes = Boxes(torch.tensor([*boxes, (0, 0, 9, 9), (0, 0, 9, 9)], dtype=torch.float32))
        found.pred_classes, found.scores = torch.tensor([0, 1, 3, 1]), torch.tensor([0.5, 0.5, 0.9, 0.9])
        scores = scores_of(evaluator, {5: found})["bbox"]
        assert [scores[name] for name in ("AP", "APr", "APc")] == pytest.approx([100.0] * 3)
        assert math.isnan(scores["APf"])
        evaluator.reset()
        found.pred_classes = torch.tensor([0, 1, 2, 0])  # a false positive of the rare class, before its object
        assert scores_of(evaluator, {5: found})["bbox"]["APr"] == pytest.approx(50.0)
        for category in content["categories"]:
            category["frequency"] = 5
        path.write_text(json.dumps(content))
        assert "APr" not in caplog.text
        evaluator = build_evaluator(get_cfg(), "lvis_like", str(tmp_path))
        assert math.isnan(scores_of(evaluator, {5: found})["bbox"]["APr"])
        assert "APr, APc, and APf are not measured" in caplog.text
        content["images"][0]["neg_category_ids"] = [[1]]
        path.write_text(json.dumps(content))
        with pytest.raises(DatasetError, match=r"neg_category_ids of .*5\.jpg has \[1\]"):
            load_dataset("lvis_like")
    finally:
        DatasetCatalog.remove("lvis_like")
        MetadataCatalog.remove("lvis_like")
