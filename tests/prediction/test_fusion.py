"""Detections of several sources become one: means, votes, and suppression computed by hand."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from dimaskdino.prediction.fusion import Fusion, majority
from dimaskdino.structures import RleMasks

SIZE = (20, 30)


def rectangle(left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def found(*objects: tuple[list[int], float, int], masks: bool = False, tag: int = 0) -> Instances:
    """Detections (box xyxy px, score, class), in descending order of their scores; ``tag`` is a field of each."""
    boxes, scores, classes = zip(*objects, strict=True) if objects else ((), (), ())
    result = Instances(SIZE, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    result.scores, result.pred_classes = torch.tensor(scores), torch.tensor(classes, dtype=torch.int64)
    result.tag = torch.full_like(result.pred_classes, tag)
    if masks:
        result.pred_masks = RleMasks.of(torch.stack([rectangle(*box) for box in boxes]))
    return result


def rows(joined: Instances) -> list[tuple[list[float], float, int]]:
    boxes, scores = joined.pred_boxes.tensor.tolist(), joined.scores.double().round(decimals=6).tolist()
    return list(zip(boxes, scores, joined.pred_classes.tolist(), strict=True))


def test_boxes_of_an_object_are_averaged_by_score_and_weight() -> None:
    one = found(([0, 0, 10, 10], 0.75, 1), ([20, 0, 30, 10], 0.5, 1), tag=1)
    other = found(([2, 0, 12, 10], 0.25, 1), tag=2)
    # IoU 8 / 12. Shares 0.75 and 0.25: the left edge is 0.25 * 2 = 0.5; the score is (0.75 + 0.25) / 2.
    joined = Fusion()([one, other])
    assert rows(joined) == [([0.5, 0, 10.5, 10], 0.5, 1), ([20, 0, 30, 10], 0.25, 1)]
    assert joined.tag.tolist() == [1, 1]
    # Shares 0.75 * 1 and 0.25 * 9: the left edge is 2.25 / 3 * 2; the scores are 3 / 10 and 0.5 / 10.
    joined = Fusion(weights=[1, 9])([one, other])
    assert rows(joined) == [([1.5, 0, 11.5, 10], 0.3, 1), ([20, 0, 30, 10], 0.05, 1)]
    assert joined.tag.tolist() == [2, 1]


@pytest.mark.parametrize("masks", [False, True])
def test_one_source_alone_stays_as_it_is(masks: bool) -> None:
    # The second is a near copy of the first: the same source may see two objects there.
    alone = found(([0, 0, 9, 10], 0.7, 2), ([0, 0, 10, 10], 0.6, 2), ([3, 1, 7, 9], 0.1, 0), masks=masks)
    joined = Fusion()([alone, alone])
    assert rows(joined) == rows(alone)
    assert not masks or joined.pred_masks.rles == alone.pred_masks.rles


def test_classes_and_distant_objects_stay_apart() -> None:
    one, other = found(([0, 0, 10, 10], 0.5, 0)), found(([0, 0, 10, 10], 0.5, 1), ([4, 0, 14, 10], 0.25, 0))
    assert len(Fusion()([one, other])) == 3  # IoU 6 / 14
    assert len(Fusion(iou=0.4)([one, other])) == 2
    assert rows(Fusion(max_detections=1)([one, other])) == [([0, 0, 10, 10], 0.25, 0)]


def test_a_detection_joins_the_object_that_it_overlaps_most() -> None:
    one = found(([0, 0, 10, 10], 0.5, 0), ([3, 0, 13, 10], 0.5, 0))
    other = found(([2, 0, 12, 10], 0.5, 0))
    assert rows(Fusion()([one, other])) == [([2.5, 0, 12.5, 10], 0.5, 0), ([0, 0, 10, 10], 0.25, 0)]


def test_masks_decide_where_there_are_masks() -> None:
    # Two bars of a cross in boxes that are the same.
    one, other = (found(([0, 0, 20, 20], 0.5, 0)) for _ in range(2))
    one.pred_masks = RleMasks.of(rectangle(0, 8, 20, 12)[None])
    other.pred_masks = RleMasks.of(rectangle(8, 0, 12, 20)[None])
    assert len(Fusion()([one, other])) == 2


def test_masks_keep_what_half_of_the_shares_have() -> None:
    masks = RleMasks.of(torch.stack([rectangle(0, 0, 4, 10), rectangle(2, 0, 8, 10), rectangle(6, 5, 20, 10)])).rles
    voted = RleMasks(
        [majority(masks, np.array(shares)) for shares in ([1.0, 1.0, 0.0], [1.0, 3.0, 1.0], [1.0] * 3)], SIZE
    )
    assert torch.equal(voted.tensor[0], rectangle(0, 0, 8, 10))  # half of two is enough
    assert torch.equal(voted.tensor[1], rectangle(2, 0, 8, 10))
    assert torch.equal(voted.tensor[2], rectangle(2, 0, 4, 10) | rectangle(6, 5, 8, 10))


def test_objects_without_pixels_or_score_do_no_harm() -> None:
    empty = found(([5, 5, 5, 5], 0.0, 0), masks=True)
    joined = Fusion()([empty, empty, empty])
    assert joined.scores.sum() == 0
    assert joined.pred_masks.area().sum() == 0
    nothing = found()
    assert len(Fusion()([nothing, nothing])) == len(Fusion(method="nms")([nothing])) == 0


def test_suppression_removes_or_lowers_what_overlaps() -> None:
    one = found(([0, 0, 10, 10], 0.8, 0), ([0, 0, 10, 10], 0.4, 1))
    other = found(([1, 0, 10, 10], 0.6, 0))
    assert rows(Fusion(method="nms")([one, other])) == [([0, 0, 10, 10], 0.8, 0), ([0, 0, 10, 10], 0.4, 1)]
    # IoU 0.9 lowers 0.6 to 0.06.
    soft = rows(Fusion(method="soft-nms")([one, other]))
    assert soft == [([0, 0, 10, 10], 0.8, 0), ([0, 0, 10, 10], 0.4, 1), ([1, 0, 10, 10], 0.06, 0)]
    # With weights 1 and 2, the first source's scores are halved.
    weighed = rows(Fusion(method="nms", weights=[1, 2], max_detections=1)([one, other]))
    assert weighed == [([1, 0, 10, 10], 0.6, 0)]
