"""Why objects are missed, and the report on it."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import explain
import numpy as np
import pytest
import torch

from dimaskdino.analysis.explanation import Explained, by_class, by_size, by_stage, explain_image, outcome_table
from dimaskdino.analysis.figures import score_results
from dimaskdino.analysis.missed import Limits, Outcome, StageView, Verdict, judge
from dimaskdino.analysis.report import _SIDE_PX, Examples, _cut, _region
from dimaskdino.analysis.stages import TrueObjects, compare_stages, selections_of, watched
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.truth import make_truth
from dimaskdino.structures import RleMasks
from tests.tiny_model import image, tiny_dino, tiny_model

LIMITS = Limits(score=0.5, fit=0.5, near=0.3, max_detections=10)


def view(*queries, masks=True) -> StageView:
    """One query for each dict: box and mask IoU with each object, scores of both classes, mask quality."""
    given = [{"box": [0.9], "mask": [0.9], "scores": [0.8, 0.1], "quality": 1.0} | query for query in queries]
    columns = {name: np.array([query[name] for query in given]) for name in ("box", "mask", "scores", "quality")}
    return StageView(
        scores=columns["scores"],
        quality=columns["quality"],
        box_iou=columns["box"],
        mask_iou=columns["mask"] if masks else None,
    )


FAR = {"box": [0.1], "mask": [0.0]}


@pytest.mark.parametrize(
    ("queries", "outcome", "query"),
    [
        ([FAR, {}], Outcome.FOUND, 1),
        ([{"scores": [0.4, 0.1]}], Outcome.LOW_SCORE, 0),
        # The mask's quality lowers the score of class 0 from 0.8 to 0.48.
        ([{"quality": 0.6}], Outcome.LOW_SCORE, 0),
        ([{"scores": [0.4, 0.6]}], Outcome.WRONG_CLASS, 0),
        # Both classes are reported; the query's second choice is the object's.
        ([{"scores": [0.55, 0.6]}], Outcome.FOUND, 0),
        ([{"mask": [0.49]}], Outcome.MASK_OFF, 0),
        ([{"box": [0.49]}], Outcome.BOX_OFF, 0),
        ([{"box": [0.49], "mask": [0.4]}], Outcome.BOX_OFF, 0),
        # Near by its mask alone.
        ([{"box": [0.1], "mask": [0.31]}], Outcome.BOX_OFF, 0),
        ([FAR, {"box": [0.29], "mask": [0.29]}], Outcome.BOX_OFF, None),
        # The first is right but for its class; the second meets class and score alone.
        ([{"scores": [0.1, 0.7]}, {"box": [0.4], "mask": [0.4]}], Outcome.WRONG_CLASS, 0),
        # Both lack one condition; the second has the larger IoU.
        ([{"scores": [0.4, 0.1], "box": [0.6]}, {"scores": [0.4, 0.1]}], Outcome.LOW_SCORE, 1),
    ],
)
def test_cause_is_the_first_condition_that_fails(queries, outcome, query) -> None:
    assert judge(view(*queries), [0], LIMITS) == [Verdict(outcome, query)]


def test_without_masks_boxes_decide() -> None:
    assert judge(view({"mask": [0.0]}, masks=False), [0], LIMITS)[0].outcome is Outcome.FOUND
    assert judge(view({"box": [0.4]}, masks=False), [0], LIMITS)[0].outcome is Outcome.BOX_OFF


def test_detection_of_another_object_does_not_find_two() -> None:
    both = view({"box": [0.6, 0.9], "mask": [0.6, 0.8]})
    assert judge(both, [0, 0], LIMITS) == [Verdict(Outcome.OTHER_QUERY, 0), Verdict(Outcome.FOUND, 0)]
    # Of a second query, which scores less, the object that is left.
    two = view({"box": [0.6, 0.9], "mask": [0.6, 0.8]}, {"box": [0.6, 0.9], "mask": [0.6, 0.8], "scores": [0.7, 0]})
    assert [verdict.query for verdict in judge(two, [0, 0], LIMITS)] == [1, 0]
    # An object of another class is no rival.
    assert judge(both, [0, 1], LIMITS)[0].outcome is Outcome.FOUND


def test_places_go_to_the_best_before_mask_quality() -> None:
    better = [{**FAR, "scores": [0.9, 0.85]}]
    limits = Limits(score=0.5, fit=0.5, near=0.3, max_detections=2)
    assert judge(view(*better, {}), [0], limits) == [Verdict(Outcome.OTHER_QUERY, 1)]
    assert judge(view({**better[0], "quality": 0.0}, {}), [0], limits)[0].outcome is Outcome.OTHER_QUERY
    assert judge(view(*better, {}), [0], LIMITS)[0].outcome is Outcome.FOUND


@pytest.mark.parametrize(
    ("first", "last", "outcome"),
    [
        (FAR, FAR, Outcome.NO_TOKEN),
        ({}, FAR, Outcome.DROPPED),
        (FAR, {}, Outcome.NO_TOKEN),
        ({"box": [0.3], "mask": [0.0]}, {"box": [0.0], "mask": [0.3]}, Outcome.LOW_SCORE),
    ],
)
def test_selections_are_causes_before_all_others(first, last, outcome) -> None:
    selections = [view(first), view(last)]
    low = view({"scores": [0.4, 0.1]})
    assert judge(low, [0], LIMITS, selections=selections)[0].outcome is outcome
    # What is found is found, wherever its query came from.
    assert judge(view({}), [0], LIMITS, selections=selections)[0].outcome is Outcome.FOUND


def test_a_model_with_one_selection_drops_nothing() -> None:
    assert judge(view(FAR), [0], LIMITS, selections=[view({})])[0].outcome is Outcome.BOX_OFF


def test_an_image_without_objects_has_no_verdicts() -> None:
    empty = StageView(scores=np.ones((2, 2)), quality=np.ones(2), box_iou=np.zeros((2, 0)), mask_iou=np.zeros((2, 0)))
    assert judge(empty, [], LIMITS) == []


REPOSITORY = Path(__file__).parents[2]
DEMO = [str(REPOSITORY / "configs/demo/dimaskdino_shapes.yaml"), "--weights", str(REPOSITORY / "tools/demo_model.pth")]


def stages_of(model, truth, size=(64, 96)):
    with watched(model) as seen, torch.no_grad():
        found = model([{"image": image(*size), "height": 2 * size[0], "width": 2 * size[1]}])[0]["instances"]
        return compare_stages(*seen, truth, model), found


def rectangles(*boxes, size=(128, 192), masks=True) -> TrueObjects:
    """Objects that fill their boxes xywh."""
    bitmaps = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for bitmap, (x, y, width, height) in zip(bitmaps, boxes, strict=True):
        bitmap[y : y + height, x : x + width] = True
    rles = RleMasks.of(bitmaps).rles if masks else None
    return TrueObjects(classes=[0] * len(boxes), boxes=np.array(boxes, dtype=float).reshape(-1, 4), rles=rles)


def test_pictures_of_objects_keep_their_proportions() -> None:
    picture = _cut(np.zeros((60, 80, 3), np.uint8), (30, 10, 50, 20), 0, "", None, None, None)
    assert picture.shape == (_SIDE_PX // 2, _SIDE_PX, 3)


def test_stages_are_compared_in_the_frame_of_the_result() -> None:
    # Objects that are exactly what the model found, mask by mask.
    _, found = stages_of(tiny_model(), rectangles((0, 0, 50, 50)))
    kept = [index for index in range(len(found)) if found.pred_masks[index].any()][:2]
    assert kept
    boxes = found.pred_boxes.tensor[kept].double().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    truth = TrueObjects(
        classes=found.pred_classes[kept].tolist(), boxes=boxes, rles=RleMasks.of(found.pred_masks[kept]).rles
    )
    stages, _ = stages_of(tiny_model(), truth)
    last = stages[-1]
    assert [each.stage.name for each in stages] == ["interm", "initial", "layer.0", "layer.1", "layer.2"]
    for index, place in enumerate(kept):
        query = int(last.view.box_iou[:, index].argmax())
        assert last.view.box_iou[query, index] == pytest.approx(1, abs=1e-4)
        assert last.view.mask_iou[query, index] == 1
        score = last.view.scores[query, truth.classes[index]] * last.view.quality[query]
        assert score == pytest.approx(float(found.scores[place]), rel=1e-4)
    without_masks = stages_of(tiny_model(), replace(truth, rles=None))[0][-1].view
    assert without_masks.mask_iou is None
    assert without_masks.quality.tolist() == last.view.quality.tolist()
    limits = Limits(score=0.0, fit=0.9, near=0.3, max_detections=len(found))
    for each, place in zip(explain_image(stages, truth, limits), kept, strict=True):
        assert each.area == found.pred_masks[place].sum()
        assert each.nearest == pytest.approx((float(found.scores[place]), 1, 1), rel=1e-4)


def test_selections_of_a_model_leave_out_tokens() -> None:
    truth = rectangles((0, 0, 50, 50))
    assert [each.stage.name for each in selections_of(stages_of(tiny_model(), truth)[0])] == ["interm", "initial"]
    maskdino = tiny_model(TRANSFORMER_DECODER_NAME="MaskDINODecoder")
    assert [each.stage.name for each in selections_of(stages_of(maskdino, truth)[0])] == ["interm"]


def test_a_model_of_boxes_is_compared_and_drawn_by_boxes() -> None:
    truth = rectangles((5, 5, 30, 30), masks=False)
    stages, _ = stages_of(tiny_dino(), truth)
    assert all(each.view.mask_iou is None and not each.rles for each in stages)
    sure = Limits(score=1.0, fit=0.5, near=0.3, max_detections=10)  # finds nothing
    examples = Examples(names=[f"class {index}" for index in range(stages[-1].view.scores.shape[1])])
    examples.add(np.zeros((60, 80, 3), np.uint8), truth, stages[-1], explain_image(stages, truth, sure))
    ((true, _),) = [pair for pairs in examples.pictures.values() for pair in pairs]
    left, top, right, bottom = _region((5, 5, 35, 35), (60, 80))
    inside = true[(20 - top) * len(true) // (bottom - top), (20 - left) * len(true) // (right - left)]
    assert true.any()
    assert not inside.any()


def explained(*outcomes: Outcome, label: int = 0, area: float = 100.0) -> Explained:
    verdicts = {f"layer.{index}": Verdict(outcome, None) for index, outcome in enumerate(outcomes)}
    return Explained(image_id=0, index=0, label=label, area=area, verdicts=verdicts, nearest=None)


def test_sums_by_stage_class_and_size() -> None:
    low, found = Outcome.LOW_SCORE, Outcome.FOUND
    each = [explained(low, found), explained(low, low, label=1, area=96.0**2 - 1), explained(found, found, area=1024.0)]
    assert by_stage(each) == {"decoder layer 0": {low: 2, found: 1}, "decoder layer 1": {found: 2, low: 1}}
    assert by_class(each, ["a", "b", "c"]) == {"a": {found: 2}, "b": {low: 1}}
    sizes = by_size(each)
    assert (sizes["small"], sizes["medium"], sizes["large"]) == ({found: 1}, {found: 1, low: 1}, {})
    assert by_size([explained(found, area=96.0**2)])["large"] == {found: 1}
    assert outcome_table(sizes, "size")[0][1] == ["medium", 2, 1, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("box", "expected"),
    [((40, 40, 60, 60), (28, 28, 72, 72)), ((0, 40, 20, 60), (0, 28, 44, 72)), ((0, 0, 100, 100), (0, 0, 120, 110))],
)
def test_an_example_is_a_square_inside_the_image(box, expected) -> None:
    assert _region(box, (110, 120)) == expected


def test_scores_of_detections_on_paper() -> None:
    """Two objects of class a: one found, one missed; a detection of class b lies on nothing."""
    truth = make_truth(
        {
            "images": [{"id": 1, "height": 100, "width": 100}],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
            "annotations": [
                {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0, "area": 400.0}
                for number, box in ((1, [0, 0, 20, 20]), (2, [50, 50, 20, 20]))
            ],
        },
        "paper",
    )
    found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "score": 0.9}]
    found += [{"image_id": 1, "category_id": 2, "bbox": [80, 0, 20, 20], "score": 0.6}]
    scores = score_results(truth.coco, found, "box", 0.5)
    assert scores.metrics["AP50"] == pytest.approx(100 * 51 / 101)  # all recalls up to a half, of 101
    assert {name: count for name, (_, count) in scores.tide.items()} == {
        "Cls": 0,
        "Loc": 0,
        "Both": 0,
        "Dupe": 0,
        "Bkg": 1,
        "Miss": 1,
    }
    assert scores.confusion.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert score_results(truth.coco, found, "box", 0.7).confusion.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    # Of two detections, one at 0.9 that is right and one at 0.6 that is not.
    assert scores.calibration_error == pytest.approx((0.1 + 0.6) / 2)


def run_tool(monkeypatch, tmp_path, *arguments) -> None:
    shapes = ["DATASETS.SHAPES.ROOT", str(tmp_path / "shapes"), "DATASETS.SHAPES.NUM_TRAIN", "1"]
    options = ["--device", "cpu", "--output", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", ["explain.py", *DEMO, *options, "--opts", *shapes, "DATASETS.SHAPES.NUM_VAL", "4"])
    explain.main()


@pytest.mark.parametrize("masks", [True, False])
def test_the_tool_explains_every_object_of_the_demo_model(tmp_path, monkeypatch, capsys, masks) -> None:
    monkeypatch.setattr(explain.Truth, "has_masks", masks)
    fewer = [] if masks else ["--max-images", "2"]
    run_tool(monkeypatch, tmp_path, "--dataset", "shapes_val", "--examples", "1", *fewer)
    with (tmp_path / "out/objects.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    stages = json.loads((tmp_path / "out/missed.json").read_text())["stages"]
    assert list(stages)[0] == "first selection"
    assert list(stages)[-1] == "decoder layer 3"
    assert all(sum(counts.values()) == len(rows) > 5 for counts in stages.values())
    found = [row for row in rows if row["outcome"] == "found"]
    assert len(found) == stages["decoder layer 3"]["found"] > len(rows) / 3
    limits = Limits()
    shape = "mask_iou" if masks else "box_iou"
    assert all(float(row["score"]) >= limits.score and float(row[shape]) >= limits.fit for row in found)
    report = (tmp_path / "out/report.html").read_text()
    assert all(text in report for text in ("below the threshold", "TIDE", "Calibration", "data:image/png"))
    assert "http" not in report
    said = capsys.readouterr().out
    assert "decoder layer 3" in said
    assert ("of box and mask" in report, "Boxes alone" in report, "Boxes alone" in said) == (
        masks,
        not masks,
        not masks,
    )


def test_a_dataset_without_objects_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(DatasetError, match=r"shapes_semantic_val.*--dataset"):
        run_tool(monkeypatch, tmp_path, "--dataset", "shapes_semantic_val")
    with pytest.raises(DatasetError, match=r"shapes_vall .*shapes_val\?"):
        run_tool(monkeypatch, tmp_path, "--dataset", "shapes_vall")
    crowds = [{"file_name": "a.png", "image_id": 1, "annotations": [{"iscrowd": 1}]}]
    monkeypatch.setattr("dimaskdino.analysis.stages.load_dataset", lambda _: crowds)
    with pytest.raises(DatasetError, match="shapes_val has no objects"):
        run_tool(monkeypatch, tmp_path, "--dataset", "shapes_val")
