"""PQ, mIoU and the AP of things: by hand, and as the official tools give them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.structures import BitMasks, Instances
from PIL import Image

from dimaskdino.config import Config
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.label_maps import read_segment_ids, read_semantic, relabel
from dimaskdino.data.validation import files, segmentation
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation import build_evaluator
from dimaskdino.evaluation.segmentation import PanopticEvaluator, SemanticEvaluator
from tests.data_pipeline.conftest import registrations  # noqa: F401  (a fixture)
from tests.data_pipeline.label_maps import NAMES, SEGMENTS, SIZE, label_map, write_panoptic, write_semantic
from tests.data_pipeline.test_segmentation import configured

pytestmark = pytest.mark.usefixtures("registrations")

DATA = Path(__file__).parents[1] / "data" / "pq"


@pytest.fixture
def panoptic(tmp_path: Path) -> Config:
    return configured("panoptic", write_panoptic(tmp_path / "set"))


@pytest.fixture
def semantic(tmp_path: Path) -> Config:
    return configured("semantic", write_semantic(tmp_path / "set"))


def perfect(entry: dict) -> dict:
    """What a perfect panoptic model gives for an image, with ids of three bytes; a crowd is no object."""
    kept = [each for each in entry["segments_info"] if not each["iscrowd"]]
    ids = read_segment_ids(entry["pan_seg_file_name"])
    pixels = relabel(ids, {each["id"]: number for number, each in enumerate(kept, start=70_001)}, 0)
    segments = [
        {"id": number, "category_id": each["category_id"], "isthing": each["isthing"]}
        for number, each in enumerate(kept, start=70_001)
    ]
    masks = torch.stack([torch.from_numpy(ids == each["id"]) for each in kept])
    found = Instances(
        SIZE,
        pred_boxes=BitMasks(masks).get_bounding_boxes(),
        scores=torch.ones(len(kept)),
        pred_classes=torch.tensor([each["category_id"] for each in kept]),  # as without PANOPTIC_ON, stuff as well
        pred_masks=masks,
    )
    labels = read_semantic(entry, num_classes=3, ignore=255)
    sem_seg = torch.nn.functional.one_hot(torch.from_numpy(labels).long().clamp(max=2), 3).permute(2, 0, 1).float()
    return {"panoptic_seg": (torch.from_numpy(pixels), segments), "instances": found, "sem_seg": sem_seg}


def swapped(result: dict) -> dict:
    """Every class exchanged for the next one."""
    pixels, segments = result["panoptic_seg"]
    wrong = [{**each, "category_id": (each["category_id"] + 1) % 3} for each in segments]
    return {**result, "panoptic_seg": (pixels, wrong), "sem_seg": result["sem_seg"].roll(1, 0)}


def test_perfect_panoptic_results_score_100(panoptic, tmp_path):
    panoptic.TEST.EVAL_LAYERS = ["all"]
    evaluator = build_evaluator(panoptic, "panoptic_val", str(tmp_path / "out"))
    for entry in load_dataset("panoptic_val"):
        result = perfect(entry)
        evaluator.process([entry], [{**result, "layers": {"layer.0": swapped(result), "layer.1": result}}])
    results = evaluator.evaluate()
    assert results["panoptic_seg"] == pytest.approx(dict.fromkeys(results["panoptic_seg"], 100.0))
    assert set(results["sem_seg"].values()) == {100.0}
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100.0)
    assert list(results["segm"])[-2:] == ["AP-cell", "AP-bug"]
    by_stage = {"box_AP": 100.0, "mask_AP": 100.0, "gap": 0.0}
    assert results["layers"] == pytest.approx(
        {
            **{f"layer.0/{key}": value for key, value in {**by_stage, "PQ": 0.0, "mIoU": 0.0}.items()},
            **{f"layer.1/{key}": value for key, value in {**by_stage, "PQ": 100.0, "mIoU": 100.0}.items()},
        }
    )
    assert (tmp_path / "out" / "layers.csv").read_text().startswith("stage,box_AP,mask_AP,gap,PQ,mIoU")
    assert read_segment_ids(str(tmp_path / "out" / "panoptic" / "1.png")).max() == 70_003


def test_images_with_text_ids_have_files_of_their_own(panoptic, tmp_path):
    evaluator = PanopticEvaluator(dataset_name="panoptic_val", output_dir=str(tmp_path / "out"))
    before = {*tmp_path.rglob("*.png")}
    labels = SemanticEvaluator(dataset_name="panoptic_val", output_dir=str(tmp_path / "out"), ignore=255)
    for entry, key in zip(load_dataset("panoptic_val"), ("../a\\1", "..%2Fa%5C1"), strict=True):
        for each in (evaluator, labels):
            each.process([{**entry, "image_id": key}], [perfect(entry)])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100.0)
    written = [path.relative_to(tmp_path).as_posix() for path in {*tmp_path.rglob("*.png")} - before]
    assert all(name.startswith(("out/sem_seg/", "out/panoptic/")) and "\\" not in name for name in written)
    assert len(written) == 4


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_label_map_that_breaks_later_says_how_to_find_all(kind, request, tmp_path, monkeypatch):
    cfg, named = request.getfixturevalue(kind), rf"2\.png has .*tools/check_dataset\.py {kind}_"
    mode, label = {"panoptic": ("RGB", (5, 0, 0)), "semantic": ("L", 5)}[kind]
    Image.new(mode, SIZE[::-1], label).save(next((tmp_path / "set" / "labels").rglob("2.png")))
    monkeypatch.setattr(segmentation, "LEAST_LABEL_MAPS", 1)
    monkeypatch.setattr(files, "MOST_SECONDS", 0.0)
    check_datasets(cfg)
    cfg.MODEL.MaskDINO.TEST.INSTANCE_ON = cfg.MODEL.MaskDINO.TEST.SEMANTIC_ON = kind == "semantic"
    evaluator = build_evaluator(cfg, f"{kind}_val", str(tmp_path / "out"))
    output = {"panoptic_seg": (torch.zeros(SIZE), []), "sem_seg": torch.zeros(3, *SIZE)}
    first, second = load_dataset(f"{kind}_val")
    evaluator.process([first], [output])
    with pytest.raises(DatasetError, match=named):
        evaluator.process([second], [output])
    monkeypatch.setattr(files, "MOST_SECONDS", 3600.0)
    with pytest.raises(DatasetError, match=named):
        check_datasets(cfg)


def test_pq_by_hand(panoptic, tmp_path):
    # Of the first image, one cell of 80 px is found as 60 of them, IoU 3 / 4, and the other cell is missed; the grass
    # of 192 px as 96, IoU 1 / 2, which is no match.
    evaluator = PanopticEvaluator(dataset_name="panoptic_val", output_dir=str(tmp_path / "out"))
    entry = load_dataset("panoptic_val")[0]
    pixels = torch.zeros(SIZE, dtype=torch.int32)
    pixels[:6, :10], pixels[8:12] = 1, 2
    segments = [{"id": 1, "category_id": 0, "isthing": True}, {"id": 2, "category_id": 2, "isthing": False}]
    evaluator.process([entry], [{"panoptic_seg": (pixels, segments)}])
    scores = evaluator.evaluate()["panoptic_seg"]
    # Cells: TP 1, FP 0, FN 1.
    assert scores["PQ-cell"] == scores["PQ_th"] == pytest.approx(50.0)
    assert scores["SQ-cell"] == pytest.approx(75.0)
    assert scores["RQ-cell"] == pytest.approx(100 * 2 / 3)
    assert scores["PQ-grass"] == scores["PQ_st"] == 0.0
    assert scores["PQ"] == pytest.approx(25.0)
    assert math.isnan(scores["PQ-bug"])


def test_pq_is_the_official_one(tmp_path):
    # Two photos' panoptic truth and a perturbed prediction, and what panopticapi gives for them.
    expected = json.loads((DATA / "expected.json").read_text())
    truth, predicted = (json.loads((DATA / f"{name}.json").read_text()) for name in ("truth", "pred"))
    ids = sorted(category["id"] for category in truth["categories"])
    categories = {category["id"]: category for category in truth["categories"]}
    DatasetCatalog.register("official", list)
    MetadataCatalog.get("official").set(
        stuff_classes=[str(key) for key in ids],
        thing_dataset_id_to_contiguous_id={key: ids.index(key) for key in ids if categories[key]["isthing"]},
    )
    evaluator = PanopticEvaluator(dataset_name="official", output_dir=str(tmp_path))

    def segments(annotation: dict) -> list[dict]:
        return [{**each, "category_id": ids.index(each["category_id"])} for each in annotation["segments_info"]]

    of_image = {annotation["image_id"]: annotation for annotation in predicted["annotations"]}
    for annotation in truth["annotations"]:
        prediction = of_image[annotation["image_id"]]
        pixels = torch.from_numpy(read_segment_ids(str(DATA / "pred" / prediction["file_name"])))
        entry = {
            "image_id": annotation["image_id"],
            "pan_seg_file_name": str(DATA / "truth" / annotation["file_name"]),
            "segments_info": segments(annotation),
        }
        evaluator.process([entry], [{"panoptic_seg": (pixels, segments(prediction))}])
    scores = evaluator.evaluate()["panoptic_seg"]
    for group, ending in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for metric in ("pq", "sq", "rq"):
            assert scores[f"{metric.upper()}{ending}"] == 100 * expected[group][metric]
    for key, of_class in expected["per_class"].items():
        assert scores[f"PQ-{key}"] == 100 * of_class["pq"]


def test_miou_by_hand(semantic, tmp_path):
    evaluator = build_evaluator(semantic, "semantic_val", str(tmp_path / "out"))
    for entry in load_dataset("semantic_val"):
        scores = torch.zeros(3, *SIZE)
        scores[0, :8], scores[2, 8:] = 1, 1
        evaluator.process([entry], [{"sem_seg": scores}])
    results = evaluator.evaluate()["sem_seg"]
    # Truth: cell 140 px, bug 84 px, grass 192 + 48 px. The upper halves are called cell: right on 140, wrong on 48 of
    # grass and on 72 of bug; the lower halves grass: right on 192, wrong on 12 of bug.
    cell, grass = 140 / (140 + 48 + 72), 192 / (192 + 48 + 12)
    assert results["IoU-cell"] == pytest.approx(100 * cell)
    assert results["IoU-grass"] == pytest.approx(100 * grass)
    assert results["IoU-bug"] == 0.0
    assert results["mIoU"] == pytest.approx(100 * (cell + grass) / 3)
    assert results["fwIoU"] == pytest.approx(100 * (140 * cell + 240 * grass) / 464)
    assert results["pACC"] == pytest.approx(100 * (140 + 192) / 464)
    assert results["mACC"] == pytest.approx(100 * (1 + 192 / 240) / 3)
    assert np.array(Image.open(tmp_path / "out" / "sem_seg" / "below" / "1.png")).tolist() == (
        [[0] * 24] * 8 + [[2] * 24] * 8
    )


def test_miou_is_that_of_detectron2(semantic, tmp_path):
    ours = SemanticEvaluator(dataset_name="semantic_val", output_dir=None, ignore=255)
    theirs = SemSegEvaluator("semantic_val", distributed=False)
    theirs.reset()
    torch.manual_seed(0)
    for entry in load_dataset("semantic_val"):
        output = [{"sem_seg": torch.rand(3, *SIZE)}]
        for evaluator in (ours, theirs):
            evaluator.process([entry], output)
    expected = theirs.evaluate()["sem_seg"]
    scores = ours.evaluate()["sem_seg"]
    assert scores.keys() == expected.keys()
    assert scores == pytest.approx(expected, nan_ok=True)


def test_classes_that_nothing_shows_are_not_averaged(tmp_path):
    label = label_map(SEGMENTS[0], [0, 2, 0], 255)
    Image.fromarray(label.astype(np.uint8)).save(tmp_path / "label.png")
    MetadataCatalog.get("one").set(stuff_classes=NAMES)
    evaluator = SemanticEvaluator(dataset_name="one", output_dir=None, ignore=255)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(label).long().clamp(max=2), 3).permute(2, 0, 1)
    entry = {"file_name": "1.png", "sem_seg_file_name": str(tmp_path / "label.png")}
    evaluator.process([entry], [{"sem_seg": one_hot}])
    results = evaluator.evaluate()["sem_seg"]
    MetadataCatalog.remove("one")
    assert results["mIoU"] == 100.0
    assert math.isnan(results["IoU-bug"])


@pytest.mark.parametrize(
    ("on", "tasks"),
    [
        (["INSTANCE_ON"], ["bbox", "segm"]),
        (["PANOPTIC_ON"], ["panoptic_seg"]),
        (["SEMANTIC_ON"], ["sem_seg"]),
        (["PANOPTIC_ON", "SEMANTIC_ON"], ["panoptic_seg", "sem_seg"]),
    ],
)
def test_only_results_that_the_model_gives_are_scored(panoptic, tmp_path, on, tasks):
    for key in ("INSTANCE_ON", "PANOPTIC_ON", "SEMANTIC_ON"):
        panoptic.MODEL.MaskDINO.TEST[key] = key in on
    evaluator = build_evaluator(panoptic, "panoptic_val", str(tmp_path / "out"))
    for entry in load_dataset("panoptic_val"):
        result = perfect(entry)
        names = {"INSTANCE_ON": "instances", "PANOPTIC_ON": "panoptic_seg", "SEMANTIC_ON": "sem_seg"}
        evaluator.process([entry], [{names[key]: result[names[key]] for key in on}])
    assert list(evaluator.evaluate()) == tasks
