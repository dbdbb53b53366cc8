import math

import pytest
import torch

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
