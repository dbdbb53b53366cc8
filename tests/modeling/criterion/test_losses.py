"""Losses, and the points at which masks are compared."""

import math

import pytest
import torch

from dimaskdino.modeling.criterion import RandomPointSampler
from dimaskdino.modeling.criterion.losses import box_losses, focal_loss, mask_losses


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
