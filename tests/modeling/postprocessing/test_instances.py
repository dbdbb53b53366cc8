import math

import pytest
import torch

from dimaskdino.modeling.postprocessing import Frame, instances_of_image
from dimaskdino.modeling.postprocessing import masks as rendering
from dimaskdino.structures import MaskLogits, StagePrediction

LOW = -20.0


def prediction(logits: list[list[float]], masks: torch.Tensor, boxes: list[list[float]] | None = None):
    """One image; ``masks`` (Q, h, w) are logits."""
    count = len(logits)
    features = MaskLogits(torch.eye(count)[None], masks[None])
    boxes = boxes or [[0.5, 0.5, 0.2, 0.2]] * count
    return StagePrediction("layer.0", torch.tensor([logits]), torch.tensor([boxes]), features)


def infer(stage: StagePrediction, size: tuple[int, int] = (8, 8), frame: Frame | None = None, **options):
    settings = {"max_detections": 10, "score_by_mask": False}
    return instances_of_image(stage, 0, frame or Frame(size, size, size), **(settings | options))


def flat_masks(count: int, value: float = 20.0, side: int = 4) -> torch.Tensor:
    return torch.full((count, side, side), value)


def test_results_are_the_best_query_class_pairs_by_score():
    result = infer(prediction([[0.0, 3.0], [1.0, -1.0], [2.0, LOW]], flat_masks(3)), max_detections=4)
    assert result.pred_classes.tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(result.scores, torch.tensor([3.0, 2.0, 1.0, 0.0]).sigmoid())


def test_fewer_pairs_than_detections_asked_for_are_all_given():
    # The releases ask topk for more than there are, and stop with an error.
    result = infer(prediction([[0.0, 3.0], [1.0, -1.0]], flat_masks(2)), max_detections=100)
    assert len(result) == 4


def test_classes_beyond_80_are_reported_like_any_other():
    # The releases know thing classes by "< 80".
    logits = [[LOW] * 95 + [4.0], [LOW] * 90 + [3.0] + [LOW] * 5]
    assert infer(prediction(logits, flat_masks(2)), max_detections=2).pred_classes.tolist() == [95, 90]


def test_stuff_is_left_out_after_the_best_are_chosen():
    logits = [[1.0, 3.0], [2.0, LOW]]
    is_thing = torch.tensor([True, False])
    result = infer(prediction(logits, flat_masks(2)), max_detections=2, is_thing=is_thing)
    assert result.pred_classes.tolist() == [0]
    torch.testing.assert_close(result.scores, torch.tensor([2.0]).sigmoid())
    nothing = infer(prediction(logits, flat_masks(2)), max_detections=1, is_thing=is_thing, score_by_mask=True)
    assert nothing.pred_masks.shape == (0, 8, 8)


def test_scores_are_class_times_mean_mask_probability_inside_the_mask():
    masks = torch.full((1, 4, 4), -1.0)
    masks[0, :, :2] = 2.0
    masks[0, 0, 0] = 1.0
    stage = prediction([[0.0]], masks)
    # Seven pixels of logit 2 and one of 1 are inside; those of -1 are outside and do not count.
    quality = (7 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 8
    by_mask = infer(stage, size=(4, 4), score_by_mask=True)
    assert by_mask.scores.item() == pytest.approx(0.5 * quality, rel=1e-5)
    assert infer(stage, size=(4, 4)).scores.item() == pytest.approx(0.5)


def test_mask_quality_may_change_the_order():
    masks = torch.stack((torch.full((4, 4), 0.1), torch.full((4, 4), 9.0)))
    stage = prediction([[2.0], [1.5]], masks, [[0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])
    result = infer(stage, size=(4, 4), score_by_mask=True)
    assert (result.scores[0] > result.scores[1]).item()
    torch.testing.assert_close(result.pred_boxes.tensor[0], torch.tensor([3.4, 3.4, 3.8, 3.8]))


def test_an_empty_mask_scores_zero():
    result = infer(prediction([[9.0]], flat_masks(1, -3.0)), score_by_mask=True)
    assert result.scores.tolist() == [0.0]
    assert not result.pred_masks.any()


def test_boxes_are_scaled_from_canvas_to_asked_size():
    # A canvas of 64 x 96 holds an image of 48 x 80 that is asked for at 96 x 240: twice as high, three times as wide.
    stage = prediction([[0.0]], flat_masks(1), [[0.5, 0.25, 0.25, 0.5]])
    result = infer(stage, frame=Frame((64, 96), (48, 80), (96, 240)))
    # On the canvas: x 36 to 60, y 0 to 32.
    torch.testing.assert_close(result.pred_boxes.tensor, torch.tensor([[36 * 3.0, 0.0, 60 * 3.0, 32 * 2.0]]))
    assert result.image_size == (96, 240)


def test_boxes_are_not_clipped_to_the_image():
    result = infer(prediction([[0.0]], flat_masks(1), [[0.0, 0.5, 0.5, 0.5]]), size=(8, 8))
    torch.testing.assert_close(result.pred_boxes.tensor, torch.tensor([[-2.0, 2.0, 2.0, 6.0]]))


def test_masks_are_cut_to_the_image_before_they_are_resized():
    # A canvas of 16 x 16 with an image of 16 x 8: the object fills the image, the padding is background.
    masks = torch.full((1, 4, 4), LOW)
    masks[0, :, :2] = -LOW
    result = infer(prediction([[0.0]], masks), frame=Frame((16, 16), (16, 8), (32, 16)))
    assert result.pred_masks.shape == (1, 32, 16)
    assert result.pred_masks.dtype == torch.bool
    assert result.pred_masks.all()


def test_masks_land_where_they_were_predicted():
    masks = torch.full((1, 4, 4), LOW)
    masks[0, 1, 2] = -LOW
    result = infer(prediction([[0.0]], masks), size=(16, 16))
    ys, xs = result.pred_masks[0].nonzero(as_tuple=True)
    # The pixel covers y 4 to 8 and x 8 to 12; bilinear edges of equal and opposite logits stay there.
    assert (int(ys.min()), int(ys.max()), int(xs.min()), int(xs.max())) == (4, 7, 8, 11)


def test_each_result_has_mask_and_box_of_its_query():
    masks = torch.full((3, 4, 4), LOW)
    for query in range(3):
        masks[query, query] = -LOW
    boxes = [[0.5, (query + 0.5) / 4, 1.0, 0.25] for query in range(3)]
    result = infer(prediction([[0.0, 2.0], [3.0, LOW], [1.0, 4.0]], masks, boxes), size=(4, 4))
    queries = [2, 1, 0, 2, 0, 1]
    assert result.pred_classes.tolist() == [1, 0, 1, 0, 0, 1]
    assert result.pred_masks.float().mean(2).argmax(1).tolist() == queries
    torch.testing.assert_close(result.pred_boxes.tensor[:, 1], torch.tensor(queries, dtype=torch.float32))


def test_only_masks_that_are_reported_are_enlarged_and_each_once(monkeypatch):
    # The releases enlarge the masks of all queries before they choose.
    rows, enlarge = [], rendering.MaskRendering._fill

    def count(rendering, masks, *others):
        rows.append(len(masks))
        return enlarge(rendering, masks, *others)

    monkeypatch.setattr(rendering.MaskRendering, "_fill", count)
    logits = torch.full((60, 3), LOW)
    logits[:2] = 5.0
    infer(prediction(logits.tolist(), flat_masks(60)), max_detections=6)
    assert sum(rows) == 2


def test_many_masks_are_the_same_as_one_at_a_time():
    torch.manual_seed(0)
    masks, logits = torch.randn(60, 4, 4), torch.randn(60, 1)
    result = infer(prediction(logits.tolist(), masks), size=(9, 7), max_detections=60, score_by_mask=True)
    assert len(result) == 60
    ones = [
        infer(prediction([logit.tolist()], mask[None]), size=(9, 7), score_by_mask=True)
        for logit, mask in zip(logits, masks, strict=True)
    ]
    scores = torch.cat([one.scores for one in ones])
    torch.testing.assert_close(result.scores, scores.sort(descending=True).values)
    order = scores.argsort(descending=True)
    assert torch.equal(result.pred_masks, torch.cat([one.pred_masks for one in ones])[order])
