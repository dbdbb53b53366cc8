"""COCO evaluation on predictions made by hand from the ground truth."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dimaskdino.config import get_cfg
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation import CocoEvaluator, LayerwiseEvaluator, build_evaluator
from dimaskdino.evaluation.coco import COCOeval_faster, run_coco_eval

SIDE = 40
CATEGORY_IDS = {3: 0, 7: 1}
# (image id, class index, x0, y0, x1, y1, is crowd): image 2 holds a crowd region only, image 3 nothing.
OBJECTS = [
    (1, 0, 2, 2, 20, 20, False),
    (1, 1, 20, 22, 38, 36, False),
    (2, 0, 0, 0, 40, 30, True),
]
IMAGE_IDS = [1, 2, 3]


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


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    name = "hand_made"
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in IMAGE_IDS],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [annotation(n, o[0], o[1], o[2:6], o[6]) for n, o in enumerate(OBJECTS, start=1)],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(coco))
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).set(
        json_file=str(path), thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id=CATEGORY_IDS
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def instances(found: list[tuple[int, tuple[int, ...], float]]) -> Instances:
    """Instances from (class index, box, score); masks fill the boxes."""
    result = Instances((SIDE, SIDE))
    result.pred_boxes = Boxes(torch.tensor([box for _, box, _ in found], dtype=torch.float32).reshape(-1, 4))
    result.pred_classes = torch.tensor([label for label, _, _ in found], dtype=torch.int64)
    result.scores = torch.tensor([score for _, _, score in found])
    masks = [torch.from_numpy(mask_of(*box)).bool() for _, box, _ in found]
    result.pred_masks = torch.stack(masks) if masks else torch.zeros(0, SIDE, SIDE, dtype=torch.bool)
    return result


def perfect() -> dict[int, Instances]:
    by_image: dict[int, list[Any]] = {image_id: [] for image_id in IMAGE_IDS}
    for image_id, label, *box, crowd in OBJECTS:
        if not crowd:
            by_image[image_id].append((label, tuple(box), 0.9))
    return {image_id: instances(found) for image_id, found in by_image.items()}


def scores_of(evaluator: Any, predictions: dict[Any, Instances]) -> dict[str, dict[str, float]]:
    for image_id, found in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return evaluator.evaluate()


def test_perfect_predictions_score_one_hundred(dataset: str, tmp_path: Path) -> None:
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect())
    for task in ("bbox", "segm"):
        assert scores[task]["AP"] == pytest.approx(100.0)
        assert scores[task]["AP-dog"] == pytest.approx(100.0)
        # No object is large, so there is nothing to measure.
        assert np.isnan(scores[task]["APl"])


def test_classes_that_are_known_once_the_file_is_read_are_read(dataset: str, tmp_path: Path) -> None:
    name = "registered_by_detectron2"
    register_coco_instances(name, {}, MetadataCatalog.get(dataset).json_file, str(tmp_path))
    try:
        scores = scores_of(CocoEvaluator(dataset_name=name, output_dir=str(tmp_path)), perfect())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert {key for key in scores["bbox"] if key.startswith("AP-")} == {"AP-cat", "AP-dog"}


def change_truth(dataset: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the annotation file of ``dataset``."""
    path = Path(MetadataCatalog.get(dataset).json_file)
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def remove_areas(coco: dict[str, Any]) -> None:
    for number, found in enumerate(coco["annotations"]):
        found.update([{"area": None}, {"area": "324"}, {"area": float("nan")}][number % 3])
    del coco["annotations"][0]["area"]


@pytest.mark.parametrize("has_mask", [True, False])
def test_an_area_that_is_missing_or_no_number_is_the_masks_or_the_boxes(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, has_mask: bool
) -> None:
    def medium(coco: dict[str, Any]) -> None:
        # 36 x 36 pixels, where COCO calls areas from 32 x 32 on medium; the dog's 18 x 14 are small.
        coco["annotations"][0] = annotation(1, 1, 0, (2, 2, 38, 38), False)
        remove_areas(coco)
        if not has_mask:
            del coco["annotations"][0]["segmentation"]

    change_truth(dataset, medium)
    with caplog.at_level("INFO"):
        evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    assert "3 of 3 annotations" in caplog.text
    assert [found["area"] for found in evaluator._truth.dataset["annotations"]] == [36 * 36, 18 * 14, 40 * 30]
    if has_mask:
        scores = scores_of(evaluator, {1: instances([(0, (2, 2, 38, 38), 0.9)])})
        for task in ("bbox", "segm"):
            assert (scores[task]["APs"], scores[task]["APm"]) == (0.0, pytest.approx(100.0))


@pytest.mark.parametrize("ids", [[0, 1, 2], [-1, -2, -3], ["a", "b", "c"], [0.5, 1.5, 2.5]])
def test_scores_do_not_depend_on_the_ids_of_annotations(dataset: str, tmp_path: Path, ids: list[Any]) -> None:
    change_truth(
        dataset, lambda coco: [found.update(id=new) for found, new in zip(coco["annotations"], ids, strict=True)]
    )
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect())
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(100.0)


@pytest.mark.parametrize("implementation", [COCOeval, COCOeval_faster or COCOeval], ids=lambda kind: kind.__name__)
def test_objects_without_iscrowd_are_no_crowd(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, implementation: type[COCOeval]
) -> None:
    change_truth(dataset, lambda coco: [found.pop("iscrowd") for found in coco["annotations"][:2]])
    monkeypatch.setattr("dimaskdino.evaluation.coco.implementation_for", lambda truth: implementation)
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect())
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(100.0)


def entries() -> list[dict[str, Any]]:
    """``OBJECTS`` in detectron2's own format."""
    by_image: dict[int, list[Any]] = {image_id: [] for image_id in IMAGE_IDS}
    for image_id, label, x0, y0, x1, y1, crowd in OBJECTS:
        polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        by_image[image_id].append(
            {
                "bbox": [x0, y0, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": label,
                "segmentation": [polygon],
                "iscrowd": int(crowd),
            }
        )
    return [
        {"file_name": f"{image_id}.png", "image_id": image_id, "height": SIDE, "width": SIDE, "annotations": found}
        for image_id, found in by_image.items()
    ]


@pytest.fixture
def registered() -> Iterator[Callable[..., str]]:
    """Registers a function that lists ``entries()``, with metadata, as "by_function"."""

    def register(load: Callable[[], Any] = entries, **metadata: Any) -> str:
        DatasetCatalog.register("by_function", load)
        MetadataCatalog.get("by_function").set(thing_classes=["cat", "dog"], **metadata)
        return "by_function"

    yield register
    DatasetCatalog.remove("by_function")
    MetadataCatalog.remove("by_function")


def test_a_dataset_that_a_function_lists_can_be_checked_and_evaluated_again(
    registered: Callable[..., str], tmp_path: Path
) -> None:
    name = registered(lambda: [{**entry, "file_name": str(tmp_path / entry["file_name"])} for entry in entries()])
    for image_id in IMAGE_IDS:
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{image_id}.png")
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TEST", (name,), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2])
    for run in ("first", "second"):
        check_datasets(cfg, train=False)
        scores = scores_of(CocoEvaluator(dataset_name=name, output_dir=str(tmp_path / run)), perfect())
        assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(100.0)


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
def test_annotations_of_a_function_mean_the_same_in_every_form(
    registered: Callable[..., str], tmp_path: Path, form: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    listed = [
        {**entry, "annotations": [{**found, **form(found)} for found in entry["annotations"]]} for entry in entries()
    ]
    before = repr(listed)
    evaluator = CocoEvaluator(dataset_name=registered(lambda: listed), output_dir=str(tmp_path))
    # Half of the cat is found: an IoU of 0.5 at the first threshold alone.
    half = {**perfect(), 1: instances([(0, (2, 2, 11, 20), 0.9), (1, OBJECTS[1][2:6], 0.9)])}
    scores = scores_of(evaluator, half)
    assert scores["bbox"]["AP-cat"] == scores["segm"]["AP-cat"] == pytest.approx(10.0)
    assert scores["bbox"]["AP-dog"] == scores["segm"]["AP-dog"] == pytest.approx(100.0)
    assert repr(listed) == before


def test_a_class_keeps_its_name_where_category_ids_are_in_another_order_than_indices(
    registered: Callable[..., str], tmp_path: Path
) -> None:
    name = registered(thing_dataset_id_to_contiguous_id={9: 0, 4: 1})
    only_the_cat = {image_id: instances([]) for image_id in IMAGE_IDS} | {1: instances([(0, (2, 2, 20, 20), 0.9)])}
    scores = scores_of(CocoEvaluator(dataset_name=name, output_dir=str(tmp_path)), only_the_cat)
    for task in ("bbox", "segm"):
        assert scores[task]["AP-cat"] == pytest.approx(100.0)
        assert scores[task]["AP-dog"] == 0.0


def test_a_class_that_the_file_does_not_list_is_not_measured(dataset: str, tmp_path: Path) -> None:
    def without_the_dog(coco: dict[str, Any]) -> None:
        del coco["categories"][1], coco["annotations"][1]

    change_truth(dataset, without_the_dog)
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect())
    assert scores["bbox"]["AP-cat"] == pytest.approx(100.0)
    assert np.isnan(scores["bbox"]["AP-dog"])


def test_no_predictions_score_zero(dataset: str, tmp_path: Path) -> None:
    nothing = {image_id: instances([]) for image_id in IMAGE_IDS}
    scores = scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), nothing)
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == 0.0
    assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text()) == []


def test_detections_inside_a_crowd_region_are_ignored_and_others_are_false_positives(
    dataset: str, tmp_path: Path
) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    in_crowd = {**perfect(), 2: instances([(0, (5, 5, 15, 15), 0.95)])}
    assert scores_of(evaluator, in_crowd)["bbox"]["AP-cat"] == pytest.approx(100.0)
    evaluator.reset()
    elsewhere = {**perfect(), 3: instances([(0, (5, 5, 15, 15), 0.95)])}
    # A better-scored false positive halves the precision at every recall.
    assert scores_of(evaluator, elsewhere)["bbox"]["AP-cat"] == pytest.approx(50.0)


def test_results_are_written_with_the_dataset_category_ids(dataset: str, tmp_path: Path) -> None:
    scores_of(CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out")), perfect())
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert [result["category_id"] for result in written] == [3, 7]
    assert written[0]["bbox"] == [2.0, 2.0, 18.0, 18.0]


def test_a_class_beyond_the_dataset_is_named(dataset: str, tmp_path: Path) -> None:
    evaluator = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "out"))
    with pytest.raises(DatasetError, match="class 2, but hand_made has 2 classes.*NUM_CLASSES to 2"):
        scores_of(evaluator, {1: instances([(2, (0, 0, 9, 9), 0.5)])})


def test_evaluation_can_be_limited_to_the_images_seen(dataset: str, tmp_path: Path) -> None:
    only_empty = {3: instances([])}
    whole = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "whole"))
    assert scores_of(whole, only_empty)["bbox"]["AP"] == 0.0
    seen = CocoEvaluator(dataset_name=dataset, output_dir=str(tmp_path / "seen"), seen_only=True)
    assert np.isnan(scores_of(seen, only_empty)["bbox"]["AP"])


@pytest.mark.skipif(COCOeval_faster is None, reason="faster-coco-eval is not installed")
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_faster_coco_eval_gives_pycocotools_numbers(task: str) -> None:
    truth, results = random_truth_and_results(seed=3)
    ours = run_coco_eval(truth, results, task, implementation=COCOeval_faster)
    reference = run_coco_eval(truth, results, task, implementation=COCOeval)
    assert 0.05 < reference.stats[0] < 0.95
    np.testing.assert_allclose(ours.stats[:12], reference.stats, atol=1e-12)
    np.testing.assert_allclose(ours.eval["precision"], reference.eval["precision"], atol=1e-12)


@pytest.mark.parametrize(
    "new_id",
    [str, float, lambda value: value - 9, lambda value: value + 2**60],
    ids=["text", "float", "negative", "large"],
)
@pytest.mark.parametrize("kind", ["image", "category"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_ids_of_every_kind_give_the_same_numbers(
    caplog: pytest.LogCaptureFixture, new_id: Callable[[int], Any], kind: str, task: str
) -> None:
    truth, results = random_truth_and_results(seed=3)
    expected = run_coco_eval(truth, results, task, implementation=COCOeval)
    for entry in truth.dataset["images" if kind == "image" else "categories"]:
        entry["id"] = new_id(entry["id"])
    for entry in [*truth.dataset["annotations"], *results]:
        entry[f"{kind}_id"] = new_id(entry[f"{kind}_id"])
    truth.createIndex()
    with caplog.at_level("INFO"):
        found = run_coco_eval(truth, results, task)
    np.testing.assert_array_equal(found.stats[:12], expected.stats)
    assert ("so pycocotools evaluates" in caplog.text) == (COCOeval_faster is not None)


def test_images_may_have_names_in_place_of_numbers(registered: Callable[..., str], tmp_path: Path) -> None:
    name = registered(lambda: [{**entry, "image_id": f"image {entry['image_id']}"} for entry in entries()])
    evaluator = CocoEvaluator(dataset_name=name, output_dir=str(tmp_path), seen_only=True)
    scores = scores_of(evaluator, {f"image {image_id}": found for image_id, found in perfect().items()})
    for task in ("bbox", "segm"):
        assert scores[task]["AP"] == pytest.approx(100.0)
        assert scores[task]["AP-dog"] == pytest.approx(100.0)


def random_truth_and_results(seed: int) -> tuple[COCO, list[dict[str, Any]]]:
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
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, 21)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": annotations,
    }
    truth.createIndex()
    keep = ("image_id", "category_id", "bbox", "segmentation", "score")
    return truth, [{key: result[key] for key in keep} for result in results]


def test_layerwise_evaluation_scores_every_stage_and_writes_the_table(dataset: str, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.TEST.EVAL_LAYERS = ["all"]
    evaluator = build_evaluator(cfg, dataset, str(tmp_path / "out"))
    assert isinstance(evaluator, LayerwiseEvaluator)
    for image_id, found in perfect().items():
        wrong_boxes = Instances(found.image_size, **found.get_fields())
        wrong_boxes.pred_boxes = Boxes(torch.zeros(len(found), 4))
        layers = {"layer.0": wrong_boxes, "layer.1": found}
        evaluator.process([{"image_id": image_id}], [{"instances": found, "layers": layers}])
    results = evaluator.evaluate()
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
    assert (tmp_path / "out" / "layers.csv").read_text().splitlines()[:2] == [
        "stage,box_AP,mask_AP,gap",
        "layer.0,0.0,100.0,-100.0",
    ]
