"""Two classes, objects and queries on paper; what is not given fits the first object and is sure of class 0."""

import numpy as np
import pytest

from dimaskdino.analysis.missed import Limits, Outcome, StageView, Verdict, judge

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
