"""Crowd regions are neither positive nor negative: in classes, masks, the matching, and denoising."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from dimaskdino.modeling.criterion.losses import mask_losses
from dimaskdino.modeling.criterion.matcher import HungarianMatcher, MaskCost
from dimaskdino.modeling.criterion.terms import ClassOptions, FocalClassLoss, MaskLoss, SupervisedStages, Supervision
from dimaskdino.structures import Targets
from dimaskdino.structures.targets import CrowdRegions
from tests.modeling.criterion.stages import SIDE, GridSampler, box_mask, logits_of, make_stage, make_targets
from tests.tiny_model import TINY_DINO, tiny_model, train_batch

LN2 = math.log(2)
LEFT, RIGHT, WHOLE = [0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]
WEIGHTS = {"ce_weight": 1.0, "dice_weight": 1.0, "sampler": GridSampler()}


def crowd_of(*regions: tuple[list[float], int | None], side: int = SIDE) -> Instances:
    """Regions (box cxcywh, class, or None for any), as mappers give them."""
    scale = side // SIDE
    masks = [box_mask(box).repeat_interleave(scale, 0).repeat_interleave(scale, 1) for box, _ in regions]
    made = Instances((side, side), gt_boxes=Boxes(torch.zeros(len(regions), 4)), gt_masks=BitMasks(torch.stack(masks)))
    made.gt_classes = torch.tensor([label or 0 for _, label in regions])
    made.gt_any_class = torch.tensor([label is None for _, label in regions])
    return made


def with_crowd(target: Targets, *regions: tuple[list[float], int | None]) -> Targets:
    return replace(target, crowd=CrowdRegions.from_instances(crowd_of(*regions), SIDE, SIDE, torch.device("cpu")))


def of_mask_loss(target: Targets, mask: torch.Tensor, **options: Any) -> tuple[float, float]:
    """Losses of one query with a mask, which is matched to the only object."""
    stage = make_stage([[0.0, 0.0, 0.0]], [WHOLE], mask[None])
    matches = [(torch.tensor([0]), torch.tensor([0]))]
    losses = MaskLoss(**WEIGHTS, **options)(
        SupervisedStages([Supervision(stage, matches, torch.tensor(1.0), True)], [target])
    )
    return float(losses["loss_mask"]), float(losses["loss_dice"])


def test_points_that_are_not_judged_count_in_neither_mask_loss() -> None:
    logits, labels = torch.tensor([[0.0, 0.0, 9.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    cross_entropy, dice = mask_losses(logits, labels, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert cross_entropy.item() == pytest.approx(2 * LN2 / 4, rel=1e-5)
    assert dice.item() == pytest.approx(1 - (2 * 0.5 + 1) / (1.0 + 1 + 1), rel=1e-5)


def test_a_mask_may_reach_into_a_crowd_of_its_class() -> None:
    # The object is the left half, its predicted mask the whole image; the crowd is the right half.
    target, mask = make_targets([1], [LEFT]), logits_of(torch.ones(SIDE, SIDE, dtype=torch.bool))
    plain = of_mask_loss(target, mask)
    assert plain == (pytest.approx(10, rel=1e-4), pytest.approx(1 - (2 * 32 + 1) / (64 + 32 + 1), rel=1e-4))
    for label in (1, None):
        assert of_mask_loss(with_crowd(target, (RIGHT, label)), mask, ignore_crowd=True) == pytest.approx(
            (0, 0), abs=1e-4
        )
    # Not into one of another class, nor without the key.
    assert of_mask_loss(with_crowd(target, (RIGHT, 2)), mask, ignore_crowd=True) == pytest.approx(plain)
    assert of_mask_loss(with_crowd(target, (RIGHT, 1)), mask) == pytest.approx(plain)


def test_an_objects_own_pixels_in_a_crowd_are_learned() -> None:
    nothing = logits_of(torch.zeros(SIDE, SIDE, dtype=torch.bool))
    covered = with_crowd(make_targets([1], [LEFT]), (WHOLE, 1))
    assert of_mask_loss(covered, nothing, ignore_crowd=True)[0] == pytest.approx(10, rel=1e-4)  # 20 at half the points


def test_regions_belong_to_their_image_and_class() -> None:
    first = make_targets([1, 2], [LEFT, LEFT])
    second = with_crowd(make_targets([1, 2], [LEFT, LEFT]), (RIGHT, 1))
    whole = logits_of(torch.ones(SIDE, SIDE, dtype=torch.bool))
    stages = [make_stage([[0.0] * 3] * 2, [WHOLE] * 2, torch.stack((whole, whole))) for _ in range(2)]
    matches = (torch.arange(2), torch.arange(2))
    for images, expected in (([first, second], 3), ([second, first], 3), ([first, first], 4)):
        term = MaskLoss(**WEIGHTS, ignore_crowd=True)
        losses = [
            term(SupervisedStages([Supervision(stage, [matches], torch.tensor(1.0), True)], [image]))["loss_mask"]
            for stage, image in zip(stages, images, strict=True)
        ]
        assert sum(map(float, losses)) == pytest.approx(10 * expected, rel=1e-4)


def test_matching_does_not_count_pixels_of_a_crowd() -> None:
    undecided = torch.zeros(2, SIDE, SIDE)
    undecided[1] = logits_of(torch.ones(SIDE, SIDE, dtype=torch.bool))
    stage = make_stage([[0.0] * 3] * 2, [WHOLE] * 2, undecided)
    target = with_crowd(make_targets([1, 2], [LEFT, LEFT]), (RIGHT, 1))
    for ce, dice, expected in (
        (1.0, 0.0, [[LN2 / 2, LN2], [0, 10]]),
        (0.0, 1.0, [[1 - 33 / (16 + 32 + 1), 1 - 33 / 65], [0, 1 - 65 / 97]]),
    ):
        cost = MaskCost(ce_weight=ce, dice_weight=dice, sampler=GridSampler(), ignore_crowd=True)
        torch.testing.assert_close(cost([stage], 0, target), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    (((_, objects),),) = HungarianMatcher([MaskCost(**WEIGHTS, ignore_crowd=True)])([stage], [target])
    assert objects.tolist() == [1, 0]  # the full mask goes to the object beside the crowd


def test_a_mask_in_a_crowd_is_no_false_positive() -> None:
    # Two queries whose boxes are the whole image: the mask of the first lies in the crowd, that of the second does not.
    stage = make_stage(
        [[0.0] * 3] * 2, [WHOLE] * 2, torch.stack((logits_of(box_mask(RIGHT)), logits_of(box_mask(LEFT))))
    )
    stages = SupervisedStages(
        [Supervision(stage, [(torch.zeros(0, dtype=torch.int64),) * 2], torch.tensor(1.0), True)],
        [with_crowd(make_targets([], []), (RIGHT, 1))],
    )
    excused = stages.not_negative(3, 0.6)
    assert excused.tolist() == [[[False, True, False], [False] * 3]]
    term = FocalClassLoss(weight=1.0, num_classes=3, alpha=0.25, gamma=2.0, options=ClassOptions(crowd_share=0.6))
    # 0.75 * (1/2)^2 ln 2 for each of the five logits that are judged.
    assert float(term(stages)["loss_ce"]) == pytest.approx(5 * 0.75 * 0.25 * LN2, rel=1e-5)


@pytest.mark.parametrize("model", [{}, TINY_DINO], ids=["DI-MaskDINO", "DINO"])
def test_an_image_that_is_all_crowd_teaches_nothing(model: dict[str, Any]) -> None:
    net = tiny_model(model | {"MODEL.IGNORE_CROWD_SHARE": 0.9}).train()
    (given,) = train_batch([])
    given["crowd_regions"] = crowd_of((WHOLE, None), side=64)[:]
    given["image"] = given["image"].new_zeros(3, 64, 64)
    given["instances"] = given["instances"][:0]
    losses = net([given])
    assert all(value.item() == 0 for value in losses.values())
    net.criterion.terms[0].options = ClassOptions()
    assert net([given])["loss_ce"].item() > 0


@pytest.mark.parametrize("model", [{}, TINY_DINO], ids=["DI-MaskDINO", "DINO"])
def test_regions_are_never_denoised(model: dict[str, Any]) -> None:
    denoising = tiny_model(model).sem_seg_head.predictor.denoising
    target = with_crowd(make_targets([1, 2], [LEFT, RIGHT]), (WHOLE, 1), (LEFT, None))
    with_regions, without = denoising([target]), denoising([make_targets([1, 2], [LEFT, RIGHT])])
    assert with_regions.num_groups == without.num_groups
    assert with_regions.group_size == without.group_size
    assert set(with_regions.matches[0][1].tolist()) == {0, 1}
    assert denoising([with_crowd(make_targets([], []), (WHOLE, 1))]) is None
