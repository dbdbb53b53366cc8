import math

import pytest
import torch

from dimaskdino.modeling.postprocessing import Frame, class_probabilities, panoptic_of_image, semantic_of_image
from dimaskdino.structures import MaskLogits, Stage, StagePrediction

LOW, HIGH = -20.0, 20.0
IS_THING = torch.tensor([True, True, False])


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def prediction(scores: list[tuple[int, float]], rows: list[list[float]]) -> StagePrediction:
    """Queries with a class and its score each, and masks one pixel high with a probability per pixel."""
    logits = torch.full((len(scores), 3), LOW)
    for query, (label, score) in enumerate(scores):
        logits[query, label] = logit(score)
    masks = torch.tensor([[[logit(p) for p in row]] for row in rows])
    boxes = torch.full((1, len(scores), 4), 0.5)
    return StagePrediction(Stage("layer"), logits[None], boxes, MaskLogits(torch.eye(len(scores))[None], masks[None]))


KEYS = ("id", "category_id", "isthing")


def panoptic(scores, rows, *, objects=0.25, overlap=0.8, temperature=None, is_thing=IS_THING, keys=KEYS):
    size = (1, len(rows[0]))
    pixels, segments = panoptic_of_image(
        prediction(scores, rows),
        0,
        Frame(size, size, size),
        is_thing=is_thing,
        object_threshold=objects,
        overlap_threshold=overlap,
        temperature=temperature,
    )
    return pixels[0].tolist(), [tuple(each[key] for key in keys) for each in segments]


def test_pixels_go_to_the_largest_score_times_probability():
    # The second query is less sure of its mask, but surer of its class: 0.5 * 0.9 against 0.9 * 0.6.
    pixels, segments = panoptic([(0, 0.5), (1, 0.9)], [[0.9, 0.9, 0.9], [0.1, 0.1, 0.6]], overlap=0.5)
    assert pixels == [1, 1, 2]
    assert segments == [(1, 0, True), (2, 1, True)]


def test_a_pixel_of_probability_one_half_is_in_the_mask():
    assert panoptic([(0, 0.9)], [[0.9, 0.5, 0.49]], overlap=0.0)[0] == [1, 1, 0]


def test_segments_are_numbered_by_query_not_by_score():
    pixels, segments = panoptic([(1, 0.5), (0, 0.9)], [[0.9, 0.1], [0.1, 0.9]])
    assert (pixels, segments) == ([1, 2], [(1, 1, True), (2, 0, True)])


def test_queries_of_a_stuff_class_merge_and_things_do_not():
    rows = [[0.9, 0.1, 0.1, 0.1], [0.1, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.1], [0.1, 0.1, 0.1, 0.9]]
    pixels, segments = panoptic([(2, 0.9), (0, 0.9), (2, 0.9), (0, 0.9)], rows)
    assert pixels == [1, 2, 1, 3]
    assert segments == [(1, 2, False), (2, 0, True), (3, 0, True)]
    _, segments = panoptic([(2, 0.6), (0, 0.7), (2, 0.9), (2, 0.8)], rows, temperature=0.5, keys=("score",))
    assert segments == [(pytest.approx(0.9),), (pytest.approx(0.7),)]


@pytest.mark.parametrize(("overlap", "kept"), [(0.5, True), (0.51, False)])
def test_query_that_wins_little_of_its_mask_is_dropped(overlap, kept):
    # The first query wins two of its four pixels.
    pixels, segments = panoptic([(0, 0.5), (1, 0.9)], [[0.9] * 4, [0.1, 0.1, 0.9, 0.9]], overlap=overlap)
    assert pixels == ([1, 1, 2, 2] if kept else [0, 0, 1, 1])
    assert len(segments) == 1 + kept


def test_pixels_won_outside_the_mask_count_but_stay_empty():
    # The query wins all three pixels, one of them in its mask: 3 / 1 passes any threshold, and the others stay 0.
    assert panoptic([(0, 0.9)], [[0.9, 0.4, 0.4]], overlap=1.0) == ([1, 0, 0], [(1, 0, True)])


def test_a_query_without_pixels_of_its_own_is_left_out():
    assert panoptic([(0, 0.9)], [[0.4, 0.4]], overlap=0.0) == ([0, 0], [])


def test_the_object_threshold_is_exclusive_and_of_the_sigmoid():
    score = torch.tensor(logit(0.5)).sigmoid().item()
    assert panoptic([(0, 0.5)], [[0.9]], objects=score) == ([0], [])
    # The softmax over the scores gives 0.4 at most: it is not what is compared.
    assert panoptic([(0, 0.5)], [[0.9]], objects=0.45, temperature=1.0)[0] == [1]


def test_the_temperature_decides_between_queries():
    # Sigmoid scores: 0.6 against 0.5, but a softmax over (0.6, 0.6, 0) is less sure than one over (0, 0.5, 0).
    stage = prediction([(0, 0.6), (1, 0.5)], [[0.9], [0.9]])
    stage.logits[0, 0, 1] = logit(0.6)
    options = {"is_thing": IS_THING, "object_threshold": 0.25, "overlap_threshold": 0.0}
    sizes = Frame((1, 1), (1, 1), (1, 1))
    for temperature, winner in ((None, 0), (0.06, 1)):
        _, segments = panoptic_of_image(stage, 0, sizes, temperature=temperature, **options)
        assert [each["category_id"] for each in segments] == [winner]


@pytest.mark.parametrize("is_thing", [torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)])
def test_only_things_or_only_stuff_is_possible(is_thing):
    pixels, segments = panoptic([(0, 0.9), (0, 0.9)], [[0.9, 0.1], [0.1, 0.9]], is_thing=is_thing)
    assert pixels == ([1, 2] if is_thing.all() else [1, 1])
    assert len(segments) == max(pixels)


def test_many_queries_give_the_same_as_all_at_once():
    torch.manual_seed(0)
    masks, logits = 3 * torch.randn(1, 60, 12, 14), torch.randn(1, 60, 3)
    stage = StagePrediction(Stage("layer"), logits, torch.rand(1, 60, 4), MaskLogits(torch.eye(60)[None], masks))
    size = (12, 14)
    pixels, segments = panoptic_of_image(
        stage,
        0,
        Frame(size, size, size),
        is_thing=torch.ones(3, dtype=torch.bool),
        object_threshold=0.0,
        overlap_threshold=0.0,
        temperature=None,
    )
    winner = (logits[0].sigmoid().amax(1)[:, None, None] * masks[0].sigmoid()).argmax(0)
    inside = masks[0].gather(0, winner[None])[0] >= 0
    order = winner[inside].unique()
    assert len(segments) == len(order)
    assert order.max() >= 50
    assert torch.equal(pixels, (torch.searchsorted(order, winner) + 1) * inside)


def test_semantic_scores_by_hand():
    stage = prediction([(0, 0.8), (2, 0.5)], [[0.9, 0.1], [0.2, 0.6]])
    probabilities = class_probabilities(stage.logits[0], temperature=None, no_object_class=False)
    size = (1, 2)
    scores = semantic_of_image(stage, 0, Frame(size, size, size), probabilities, crop_first=True)
    expected = torch.tensor([[[0.8 * 0.9, 0.8 * 0.1]], [[0.0, 0.0]], [[0.5 * 0.2, 0.5 * 0.6]]])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_class_probabilities_by_hand():
    logits = torch.tensor([[0.0, LOW, logit(0.8)]])
    two = math.exp(0.5 / 0.1), math.exp(0.8 / 0.1)
    total = two[0] + 1 + two[1]
    tempered = class_probabilities(logits, temperature=0.1, no_object_class=False)
    torch.testing.assert_close(tempered, torch.tensor([[two[0] / total, 1 / total, two[1] / total]]))
    # Odds of 1 to 0 to 4, the last of them for no object.
    softmax = class_probabilities(logits, temperature=0.1, no_object_class=True)
    torch.testing.assert_close(softmax, torch.tensor([[0.2, 0.0]]), rtol=0, atol=1e-6)


def test_masks_or_their_sum_get_the_results_size():
    # A steep edge of logits stays one when masks are enlarged first; the enlarged sum is smooth.
    stage = prediction([(0, 0.999)], [[1 - 1e-6, 1e-6]])
    probabilities = torch.tensor([[1.0, 0.0, 0.0]])
    sizes = Frame(padded=(1, 2), image=(1, 2), output=(1, 6))
    first, last = (semantic_of_image(stage, 0, sizes, probabilities, crop_first=crop)[0, 0] for crop in (True, False))
    torch.testing.assert_close(last, torch.tensor([1, 1, 2 / 3, 1 / 3, 0, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(first, torch.tensor([1, 1, 0.99, 0.01, 0, 0]), rtol=0, atol=1e-2)


def test_padding_does_not_reach_the_result():
    stage = prediction([(0, 0.999)], [[0.9, 0.1]])
    probabilities = torch.tensor([[1.0, 0.0, 0.0]])
    sizes = Frame(padded=(1, 2), image=(1, 1), output=(2, 3))
    for crop in (True, False):
        scores = semantic_of_image(stage, 0, sizes, probabilities, crop_first=crop)
        torch.testing.assert_close(scores[0], torch.full((2, 3), 0.9))
