import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from dimaskdino.errors import ConfigError
from dimaskdino.prediction.refinement import Refinement, clean_mask
from dimaskdino.structures import RleMasks

NAMES = ["car", "bus", "van"]
SQUARES = [(0, 0, 6, 6), (1, 1, 7, 7), (20, 20, 26, 26), (0, 0, 6, 6)]


def found(masks: bool = True) -> Instances:
    """Squares of 6 px: two cars that overlap (IoU 25/47), a bus, and a van on the first car."""
    result = Instances((32, 32), scores=torch.tensor([0.9, 0.8, 0.5, 0.4]), pred_classes=torch.tensor([0, 0, 1, 2]))
    result.pred_boxes = Boxes(torch.tensor(SQUARES, dtype=torch.float32) + 0.25)
    if masks:
        result.pred_masks = torch.zeros(4, 32, 32, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(result.pred_masks, SQUARES, strict=True):
            mask[y0:y1, x0:x1] = True
    return result


def classes(refinement: Refinement, given: Instances | None = None) -> list[int]:
    return refinement(given or found(), NAMES).pred_classes.tolist()


def test_scores_below_the_threshold_go() -> None:
    assert classes(Refinement()) == [0, 0, 1, 2]
    assert classes(Refinement(score=0.45)) == [0, 0, 1]
    assert classes(Refinement(score=0.8)) == [0, 0]


def test_a_class_may_have_its_own_threshold() -> None:
    refinement = Refinement(score=0.85, class_scores={"van": 0.3})
    assert classes(refinement) == [0, 2]
    assert refinement.least_score == 0.3


def test_only_named_classes_stay() -> None:
    assert classes(Refinement(classes=["bus", "van"])) == [1, 2]
    assert classes(Refinement(max_detections=1)) == [0]


@pytest.mark.parametrize("options", [{"classes": ["taxi"]}, {"class_scores": {"taxi": 0.5}}])
def test_unknown_classes_are_named_with_the_known_ones(options) -> None:
    with pytest.raises(ConfigError, match="taxi.*car, bus, van"):
        Refinement(**options).check(NAMES)


@pytest.mark.parametrize("masks", [True, False])
def test_suppression_removes_the_worse_of_one_class(masks) -> None:
    assert classes(Refinement(mask_nms=0.5), found(masks)) == [0, 1, 2]
    assert classes(Refinement(mask_nms=0.6), found(masks)) == [0, 0, 1, 2]


def test_a_suppressed_detection_suppresses_nothing() -> None:
    chain = found()[:3]
    chain.pred_classes[:] = 0
    chain.pred_masks[2] = False
    chain.pred_masks[2, 3:9, 3:9] = True  # IoU with the second 16/56, with the first 9/63
    assert len(Refinement(mask_nms=0.25)(chain, NAMES)) == 2


@pytest.mark.parametrize("form", [lambda masks: masks, RleMasks.of])
def test_cleaning_keeps_parts_and_drops_empty_objects(form) -> None:
    given = found()
    given.pred_masks[0, 30, 30] = True
    given.pred_masks[2] = False
    given.pred_masks[2, 30, 30] = True
    given.pred_masks = form(given.pred_masks)
    result = Refinement(min_area=2, boxes_from_masks=True)(given, NAMES)
    assert result.pred_classes.tolist() == [0, 0, 2]
    assert type(result.pred_masks) is type(given.pred_masks)
    assert result.pred_boxes.tensor.tolist() == [list(SQUARES[index]) for index in (0, 1, 3)]


def test_the_largest_part_stays_with_its_holes() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[:5, :5] = True
    mask[2, 2] = False
    mask[7:, 7:] = True
    cleaned = clean_mask(mask, keep_largest=True, min_area=0)
    assert cleaned[:5, :5].sum() == 24
    assert cleaned.sum() == 24
    assert clean_mask(mask, keep_largest=False, min_area=4).sum() == 28
    assert not clean_mask(mask, keep_largest=True, min_area=25).any()
