"""Losses, and how queries are matched."""

import math
from dataclasses import replace

import pytest
import torch

from dimaskdino.modeling.criterion import RandomPointSampler
from dimaskdino.modeling.criterion.losses import box_losses, focal_loss, mask_losses
from dimaskdino.modeling.criterion.matcher import BoxCost, FocalClassCost, HungarianMatcher, MaskCost
from dimaskdino.structures import Stage, StagePrediction
from tests.modeling.criterion.stages import GridSampler, box_mask, logits_of, make_stage, make_targets, stack


def focal(probability: float, target: int) -> float:
    """Focal loss of one logit as the paper writes it: alpha 0.25, gamma 2."""
    if target:
        return -0.25 * (1 - probability) ** 2 * math.log(probability)
    return -0.75 * probability**2 * math.log(1 - probability)


def class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return focal_loss(logits, labels, alpha=0.25, gamma=2.0).sum()


def test_class_loss_of_undecided_logits_by_hand():
    # p = 1/2: a target logit costs 0.25 * 0.25 * ln 2, another one 0.75 * 0.25 * ln 2.
    labels = torch.tensor([[0, 2]])
    value = class_loss(torch.zeros(1, 2, 2), labels)
    assert value.item() == pytest.approx((0.0625 + 3 * 0.1875) * math.log(2), rel=1e-6)


def test_class_loss_sums_over_images_queries_and_classes():
    logits = torch.tensor([[[2.0, -1.0], [0.5, 3.0]], [[-2.0, 0.0], [1.0, 1.0]]])
    labels = torch.tensor([[0, 1], [2, 1]])
    expected = sum(
        focal(1 / (1 + math.exp(-logits[b, q, k].item())), int(labels[b, q].item() == k))
        for b in range(2)
        for q in range(2)
        for k in range(2)
    )
    assert class_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_class_loss_is_finite_for_certain_logits():
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    value = class_loss(logits, torch.tensor([[1]]))
    value.backward()
    # A wrong certainty costs its logit: 0.25 * 200 for the missed class, 0.75 * 200 for the claimed one.
    assert value.item() == pytest.approx(200.0, rel=1e-5)
    assert logits.grad.isfinite().all()


def test_box_losses_by_hand():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]])
    target = torch.tensor([[0.7, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]])
    distance, overlap = box_losses(boxes, target)
    assert distance.tolist() == pytest.approx([0.2, 0.0], rel=1e-5)
    # x 0.3 to 0.7 against 0.5 to 0.9, height 0.4: overlap 0.08 of union 0.24, hull 0.24; the second pair costs nothing.
    assert overlap.tolist() == pytest.approx([1 - 0.08 / 0.24, 0.0], abs=1e-4)


def test_mask_losses_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3), -math.log(3), 0.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    cross_entropy, dice = mask_losses(logits, labels)
    # Means over points: ln 2; and (2 ln(4/3) + 2 ln 2) / 4.
    first, second = math.log(2), (2 * math.log(4 / 3) + 2 * math.log(2)) / 4
    assert cross_entropy.tolist() == pytest.approx([first, second], rel=1e-5)
    # Probabilities sum to 2: 1 - (2 * 1 + 1) / (2 + 2 + 1); and 3/4, 1/4, 1/2, 1/2: 1 - (2 * 3/4 + 1) / (2 + 1 + 1).
    assert dice.tolist() == pytest.approx([1 - 3 / 5, 1 - 2.5 / 4], rel=1e-5)


def test_a_perfect_mask_costs_nothing():
    labels = torch.tensor([[1.0, 0.0, 1.0]])
    cross_entropy, dice = mask_losses(labels * 80 - 40, labels)
    assert cross_entropy.item() == pytest.approx(0.0, abs=1e-6)
    assert dice.item() == pytest.approx(0.0, abs=1e-6)


def test_no_pairs_cost_nothing_and_keep_the_graph():
    boxes = torch.zeros(0, 4, requires_grad=True)
    logits = torch.zeros(0, 7, requires_grad=True)
    total = torch.cat((*box_losses(boxes, torch.zeros(0, 4)), *mask_losses(logits, torch.zeros(0, 7)))).sum()
    assert total.item() == 0.0
    total.backward()
    assert boxes.grad is not None
    assert logits.grad is not None


def test_alpha_and_gamma_weigh_classes_and_easy_examples():
    logits, labels = torch.tensor([[math.log(3), math.log(3)]]), torch.tensor([0])
    # p = 3/4 for the class (weight 0.6) and for another one (weight 0.4), to the power of 1.
    expected = 0.6 * 0.25 * math.log(4 / 3) + 0.4 * 0.75 * math.log(4)
    assert focal_loss(logits, labels, alpha=0.6, gamma=1.0).item() == pytest.approx(expected, rel=1e-6)


def sampler(num_points: int = 100, oversample_ratio: float = 3.0, importance_ratio: float = 0.75) -> RandomPointSampler:
    return RandomPointSampler(
        num_points=num_points, oversample_ratio=oversample_ratio, importance_ratio=importance_ratio
    )


def inside(points: torch.Tensor) -> torch.Tensor:
    """Which points are not so near to the upper or lower edge that the zeros beyond make them uncertain."""
    return (points[:, 1] - 0.5).abs() < 0.49


def test_shared_points_are_uniform_in_the_unit_square():
    points = sampler(4000).shared(torch.device("cpu"))
    assert points.shape == (4000, 2)
    assert ((points >= 0) & (points < 1)).all()
    assert points.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)


def test_each_mask_gets_its_own_points_within_the_unit_square():
    points = sampler().per_mask(torch.randn(3, 8, 8))
    assert points.shape == (3, 100, 2)
    assert ((points >= 0) & (points < 1)).all()
    assert not torch.equal(points[0], points[1])


def test_the_most_uncertain_candidates_are_chosen():
    # |logit| grows from left to right, so the 75 best of 300 uniform candidates lie in about the left quarter.
    logits = torch.arange(1.0, 65.0).expand(1, 64, 64)
    points = sampler().per_mask(logits)[0]
    uncertain, others = points[:75], points[75:]
    assert uncertain[inside(uncertain), 0].max() < 0.4
    assert uncertain[:, 0].mean() < 0.2
    assert others[:, 0].max() > 0.6


def test_negative_logits_are_as_certain_as_positive_ones():
    logits = torch.arange(1.0, 65.0).expand(2, 64, 64) * torch.tensor([1.0, -1.0])[:, None, None]
    points = sampler().per_mask(logits)
    assert all(of_mask[inside(of_mask), 0].max() < 0.4 for of_mask in points[:, :75])


def test_without_importance_all_points_are_uniform():
    logits = torch.arange(1.0, 65.0).expand(1, 64, 64)
    points = sampler(1000, 1.0, 0.0).per_mask(logits)[0]
    assert points.shape == (1000, 2)
    assert points[:, 0].mean().item() == pytest.approx(0.5, abs=0.05)


def test_no_masks_get_no_points():
    assert sampler().per_mask(torch.zeros(0, 8, 8)).shape == (0, 100, 2)


def test_points_follow_the_seed():
    torch.manual_seed(3)
    first = sampler().per_mask(torch.zeros(2, 8, 8))
    torch.manual_seed(3)
    assert torch.equal(first, sampler().per_mask(torch.zeros(2, 8, 8)))


@pytest.mark.parametrize(
    "options", [{"num_points": 0}, {"oversample_ratio": 0.5}, {"importance_ratio": -0.1}, {"importance_ratio": 1.1}]
)
def test_settings_that_cannot_work_are_an_error(options):
    with pytest.raises(ValueError, match="TRAIN_NUM_POINTS and OVERSAMPLE_RATIO .* IMPORTANCE_SAMPLE_RATIO"):
        sampler(**options)


LN2 = math.log(2)
LEFT, RIGHT, LOWER = [0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.5, 0.75, 1.0, 0.5]


def matcher(*, sampler: GridSampler | None = None, **weights: float) -> HungarianMatcher:
    """A matcher whose costs weigh nothing unless they are named."""
    weight = dict.fromkeys(("classes", "box", "giou", "mask", "dice"), 0.0) | weights
    return HungarianMatcher(
        [
            FocalClassCost(weight=weight["classes"], alpha=0.25, gamma=2.0),
            BoxCost(l1_weight=weight["box"], giou_weight=weight["giou"]),
            MaskCost(ce_weight=weight["mask"], dice_weight=weight["dice"], sampler=sampler or GridSampler()),
        ]
    )


RELEASE = {"classes": 4.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}


@pytest.fixture
def costs(monkeypatch) -> list[torch.Tensor]:
    """The cost matrices that are solved."""
    from dimaskdino.modeling.criterion import matcher as module

    solved, solve = [], module.linear_sum_assignment
    monkeypatch.setattr(module, "linear_sum_assignment", lambda cost: solved.append(torch.tensor(cost)) or solve(cost))
    return solved


def test_class_cost_by_hand(costs):
    # p = 1/2: positive 0.25 * 0.25 ln 2 minus negative 0.75 * 0.25 ln 2; p = 3/4 against class 1 likewise.
    stage = make_stage([[0.0, math.log(3)]], [LEFT])
    matcher(classes=4.0)([stage], [make_targets([0, 1], [LEFT, LEFT])])
    expected = [-0.125 * LN2, 0.25 / 16 * math.log(4 / 3) - 0.75 * 9 / 16 * math.log(4)]
    torch.testing.assert_close(costs[0], 4 * torch.tensor([expected]))


def test_box_costs_by_hand(costs):
    stage, target = make_stage([[0.0], [0.0]], [LEFT, RIGHT]), make_targets([0, 0], [LEFT, LOWER])
    matcher(box=5.0)([stage], [target])
    torch.testing.assert_close(costs[0], 5 * torch.tensor([[0.0, 1.25], [0.5, 1.25]]))
    matcher(giou=2.0)([stage], [target])
    # Each side box touches the lower one: hull 1, union 3/4. Left and right touch: the hull is the union.
    expected = -2 * torch.tensor([[1.0, -0.25], [0.0, -0.25]])
    torch.testing.assert_close(costs[1], expected, rtol=0, atol=1e-4)


def test_mask_costs_by_hand(costs):
    # One undecided mask, and one that says the left upper quarter with p = 3/4 inside and 1/4 outside.
    masks = torch.stack((torch.zeros(8, 8), logits_of(box_mask(LEFT), math.log(3))))
    stage, target = make_stage([[0.0], [0.0]], [LEFT, LEFT], masks), make_targets([0, 0], [LEFT, LOWER])
    matcher(mask=5.0)([stage], [target])
    right, wrong = math.log(4 / 3), math.log(4)
    # The lower half has twice the pixels of the quarter: there a half of the points and the quarter are wrong.
    expected = [[LN2, LN2], [right, 0.75 * wrong + 0.25 * right]]
    torch.testing.assert_close(costs[0], 5 * torch.tensor(expected), rtol=1e-4, atol=1e-4)
    matcher(dice=5.0)([stage], [target])

    def dice(inside: float, total: float, size: float) -> float:
        return 1 - (2 * inside + 1) / (total + size + 1)

    quarter, half, total = 16, 32, 16 * 0.75 + 48 * 0.25
    expected = [[dice(8, 32, quarter), dice(16, 32, half)], [dice(12, total, quarter), dice(8, total, half)]]
    torch.testing.assert_close(costs[1], 5 * torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_costs_add_up(costs):
    masks = torch.randn(3, 8, 8)
    stage = make_stage([[0.3], [-1.0], [2.0]], [LEFT, RIGHT, LOWER], masks)
    target = [make_targets([0, 0], [LEFT, LOWER])]
    for name, weight in RELEASE.items():
        matcher(**{name: weight})([stage], target)
    matcher(**RELEASE)([stage], target)
    torch.testing.assert_close(costs[-1], sum(costs[:-1]))


@pytest.mark.parametrize("name", ["classes", "box", "giou", "mask", "dice"])
def test_each_cost_alone_finds_the_known_permutation(name):
    permutation = [2, 0, 1]  # query of each object
    boxes = [LEFT, RIGHT, LOWER]
    target = make_targets([0, 1, 2], boxes)
    logits = torch.full((3, 3), -5.0)
    masks, places = torch.zeros(3, 8, 8), [LEFT] * 3
    for obj, query in enumerate(permutation):
        logits[query, obj] = 5.0
        masks[query] = logits_of(target.masks[obj])
        places[query] = boxes[obj]
    stage = make_stage(logits.tolist(), places, masks)
    ((query, obj),) = matcher(**{name: 1.0})([stage], [target])[0]
    assert dict(zip(obj.tolist(), query.tolist(), strict=True)) == dict(enumerate(permutation))


def test_the_least_total_cost_wins_over_the_greedy_choice():
    # Query 0 fits both objects best; giving it to the second saves more in total.
    stage = make_stage([[0.0], [0.0]], [[0.5, 0.5, 0.5, 0.5], [0.3, 0.5, 0.5, 0.5]])
    target = make_targets([0, 0], [[0.45, 0.5, 0.5, 0.5], [0.75, 0.5, 0.5, 0.5]])
    ((query, obj),) = matcher(box=1.0)([stage], [target])[0]
    assert sorted(zip(query.tolist(), obj.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_stages_and_images_are_matched_each_on_its_own():
    one = stack(make_stage([[0.0], [0.0]], [LEFT, RIGHT]), make_stage([[0.0], [0.0]], [RIGHT, LEFT]))
    two = stack(make_stage([[0.0], [0.0]], [RIGHT, LEFT]), make_stage([[0.0], [0.0]], [RIGHT, LOWER]))
    matches = matcher(box=1.0)([one, two], [make_targets([0], [LEFT]), make_targets([0], [LOWER])])
    assert [[query.tolist() for query, _ in stage] for stage in matches] == [[[0], [0]], [[1], [1]]]


def test_images_without_objects_match_nothing():
    stage = stack(make_stage([[0.0]], [LEFT], torch.zeros(1, 8, 8)), make_stage([[0.0]], [LEFT], torch.zeros(1, 8, 8)))
    (matches,) = matcher(**RELEASE)([stage], [make_targets([], []), make_targets([0], [LEFT])])
    assert [(query.tolist(), obj.tolist()) for query, obj in matches] == [([], []), ([0], [0])]
    assert all(index.dtype == torch.int64 for pair in matches for index in pair)


def test_more_objects_than_queries_leave_some_objects_out():
    stage = make_stage([[0.0]], [RIGHT])
    ((query, obj),) = matcher(box=1.0)([stage], [make_targets([0, 0], [LEFT, RIGHT])])[0]
    assert (query.tolist(), obj.tolist()) == ([0], [1])


def test_stages_without_masks_are_matched_on_class_and_box_alone(costs):
    stage, target = make_stage([[0.0], [1.0]], [LEFT, RIGHT]), [make_targets([0], [LEFT])]
    matcher(**RELEASE)([stage], target)
    matcher(**(RELEASE | {"mask": 0.0, "dice": 0.0}))([stage], target)
    torch.testing.assert_close(costs[0], costs[1])


def test_all_stages_of_an_image_share_their_points():
    # The releases draw new points for every stage.
    sampler = GridSampler()
    match = matcher(sampler=sampler, **RELEASE)
    stage = make_stage([[0.0]], [LEFT], torch.zeros(1, 8, 8))
    match([stage] * 4, [make_targets([0], [LEFT])])
    assert sampler.num_shared == 1


def half(stage: StagePrediction) -> StagePrediction:
    return StagePrediction(stage.stage, stage.logits.half(), stage.boxes.half())


def test_costs_of_certain_half_precision_logits_are_finite_and_differ(costs):
    # The releases add 1e-8 inside logarithms, which is 0 in half precision: log(0) for p = 0 and p = 1.
    stage = half(make_stage([[30.0], [20.0], [-20.0], [-30.0]], [LEFT] * 4))
    assert (stage.logits.sigmoid()[0, [0, 3], 0] == torch.tensor([1.0, 0.0])).all()
    matcher(classes=1.0)([stage], [make_targets([0], [LEFT])])
    # Far from 0 the costs are the logit's size: -0.75 x, and 0.25 |x|.
    expected = torch.tensor([[-22.5], [-15.0], [5.0], [7.5]])
    torch.testing.assert_close(costs[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_costs_are_in_float32_under_autocast(costs, dtype):
    # 112^2 points as in the paper, nearly all of them in an object that the mask denies: their sum is 150,528 times
    # the weight, and float16 ends at 65,504.
    sampler = GridSampler(112)
    match = matcher(sampler=sampler, **RELEASE)
    masks = torch.stack((torch.full((8, 8), -12.0), torch.full((8, 8), 0.3)))
    stage, target = make_stage([[0.3], [0.1]], [LEFT, RIGHT], masks), make_targets([0], [[0.5, 0.5, 1.0, 1.0]])
    match([stage], [target])
    with torch.autocast("cpu", dtype):
        match([stage], [target])
    assert torch.equal(costs[0], costs[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_predictions_name_stage_and_image(value):
    good, bad = (
        make_stage([[0.0]], [LEFT], stage=Stage("layer", 1)),
        make_stage([[value]], [LEFT], stage=Stage("layer", 1)),
    )
    first = stack(make_stage([[0.0]], [LEFT]), make_stage([[0.0]], [LEFT]))
    target = [make_targets([0], [LEFT])] * 2
    with pytest.raises(FloatingPointError, match=r"stage layer\.1 for image 1 .*SOLVER\.BASE_LR"):
        matcher(**RELEASE)([first, stack(good, bad)], target)


def test_matching_keeps_no_graph():
    stage = StagePrediction(Stage("layer"), torch.zeros(1, 1, 1, requires_grad=True), torch.tensor([[LEFT]]))
    ((query, _),) = matcher(**RELEASE)([stage], [make_targets([0], [LEFT])])[0]
    assert not query.requires_grad


def test_objects_without_a_mask_match_by_class_and_box(costs):
    stage = make_stage([[0.0], [1.0]], [LEFT, RIGHT], torch.randn(2, 8, 8))
    target = make_targets([0, 0], [LEFT, RIGHT])
    matcher(**RELEASE)([stage], [replace(target, mask_supervised=torch.tensor([True, False]))])
    matcher(**RELEASE)([stage], [target])
    matcher(**(RELEASE | {"mask": 0.0, "dice": 0.0}))([stage], [target])
    torch.testing.assert_close(costs[0][:, 0], costs[1][:, 0])
    torch.testing.assert_close(costs[0][:, 1], costs[2][:, 1])
