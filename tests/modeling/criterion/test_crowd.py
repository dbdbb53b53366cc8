"""Crowd regions, and classes that were not labeled."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.criterion import Criterion
from dimaskdino.modeling.criterion.losses import focal_loss, mask_losses
from dimaskdino.modeling.criterion.matcher import HungarianMatcher, MaskCost
from dimaskdino.modeling.criterion.points import judged_points
from dimaskdino.modeling.criterion.terms import (
    BoxLoss,
    ClassOptions,
    FocalClassLoss,
    MaskLoss,
    SupervisedStages,
    Supervision,
)
from dimaskdino.structures import DecoderOutput, Stage, StagePrediction, Targets
from dimaskdino.structures.targets import CrowdRegions
from tests.modeling.criterion.stages import SIDE, GridSampler, box_mask, logits_of, make_stage, make_targets
from tests.tiny_model import NUM_CLASSES, TINY_DINO, instances, tiny_cfg, tiny_model, train_batch

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


@pytest.mark.parametrize(("share", "loss"), [(0.0, 50.0), (0.1, 0.0)])
def test_the_criterion_ignores_crowds_by_key(share: float, loss: float) -> None:
    whole = logits_of(torch.ones(1, SIDE, SIDE, dtype=torch.bool))
    output = DecoderOutput([make_stage([[0.0] * NUM_CLASSES], [WHOLE], whole)], [], None)
    criterion = Criterion(tiny_cfg({"MODEL.IGNORE_CROWD_SHARE": share}, DN="no"), sampler=GridSampler())
    losses = criterion(output, [with_crowd(make_targets([1], [LEFT]), (RIGHT, 1))])
    assert losses["loss_mask"].item() == pytest.approx(loss, rel=1e-4, abs=1e-4)


def test_a_point_on_the_edge_of_a_region_is_in_it() -> None:
    edge = torch.tensor([[[0.5, 0.5]]])  # between a pixel of the region and one beside it
    for label, judged in ((0.0, 0.0), (0.5, 1.0)):
        region, index = torch.tensor([[[True, False]]]), torch.tensor([0])
        assert judged_points(region, index, edge, torch.tensor([[label]])).item() == judged


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


BOX = [[8, 8, 24, 24]]


def target(boxes: list[list[int]] = BOX, **options: Any) -> Targets:
    return Targets.from_instances(instances(64, 64, boxes), 64, 64, NUM_CLASSES, **options)


def region(
    left: int, top: int, right: int, bottom: int, *, label: int = 2, any_class: bool = False, height: int = 64
) -> Any:
    made = instances(height, 64, [[left, top, right, bottom]], [label])
    made.gt_any_class = torch.tensor([any_class])
    return made


def stages(of_image: Targets) -> SupervisedStages:
    """One stage of three queries; the first one is matched to the object."""
    boxes = torch.tensor([[0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0]])[None]
    logits = torch.randn(1, 3, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    prediction = StagePrediction(Stage.from_name("layer.0"), logits, boxes)
    matches = [(torch.tensor([0]), torch.tensor([0]))]
    return SupervisedStages([Supervision(prediction, matches, torch.tensor(1.0), False)], [of_image])


def class_loss(of_image: Targets, **options: Any) -> float:
    term = FocalClassLoss(weight=1.0, num_classes=NUM_CLASSES, alpha=0.25, gamma=2.0, options=ClassOptions(**options))
    return float(term(stages(of_image))["loss_ce"])


def parts() -> torch.Tensor:
    """(3, K): the focal loss of each logit, by hand."""
    logits = stages(target()).logits()[0]
    positive = torch.zeros(3, NUM_CLASSES, dtype=torch.bool)
    positive[0, 0] = True  # the object's class
    p = logits.sigmoid()
    return torch.where(positive, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())


def test_unlabeled_classes_are_neither_rewarded_nor_punished() -> None:
    assert class_loss(target()) == pytest.approx(float(parts().sum()), rel=1e-5)
    expected = parts()
    expected[:, 3] = 0
    expected[1:, 0] = 0  # an object that is there still counts
    assert class_loss(target(unlabeled=[0, 3])) == pytest.approx(float(expected.sum()), rel=1e-5)
    with pytest.raises(RuntimeError, match="Class values"):
        target(unlabeled=[NUM_CLASSES])


def test_predictions_in_a_crowd_are_not_judged() -> None:
    crowd = region(30, 30, 64, 64)
    expected = parts()
    expected[1, 2] = 0  # query 1 lies inside, query 2 with a third, query 0 does not
    assert class_loss(target(crowd=crowd), crowd_share=0.5) == pytest.approx(float(expected.sum()), rel=1e-5)
    expected[2, 2] = 0
    assert class_loss(target(crowd=crowd), crowd_share=0.2) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert class_loss(target(crowd=crowd)) == pytest.approx(float(parts().sum()), rel=1e-5)
    expected = parts()
    expected[1] = 0
    of_any = target(crowd=region(30, 30, 64, 64, any_class=True))
    assert class_loss(of_any, crowd_share=0.5) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_classes_are_weighed() -> None:
    weights = [1.0, 2.0, 0.0, 0.5, 1.0]
    expected = (parts() * torch.tensor(weights)).sum()
    assert class_loss(target(), class_weights=tuple(weights)) == pytest.approx(float(expected), rel=1e-5)
    logits, labels = torch.randn(2, 5), torch.tensor([1, 5])
    plain = focal_loss(logits, labels, alpha=0.25, gamma=2.0)
    assert torch.equal(focal_loss(logits, labels, alpha=0.25, gamma=2.0, weights=torch.ones(5)), plain)
    for options, said in (
        ({"MODEL.CLASS_WEIGHTS": [1.0]}, "has 1 numbers.*NUM_CLASSES is 5"),
        ({"MODEL.CLASS_WEIGHTS": [1.0, 1.0, 1.0, 1.0, -1.0]}, "at least 0"),
        ({"MODEL.CLASS_WEIGHTS": ["a", 1.0, 1.0, 1.0, 1.0]}, "at least 0"),
        ({"MODEL.IGNORE_CROWD_SHARE": 1.5}, "IGNORE_CROWD_SHARE is 1.5"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny_model(options)


def test_box_losses_are_weighed_by_object() -> None:
    plain, heavy = instances(64, 64, BOX), instances(64, 64, BOX)
    heavy.gt_box_weight = torch.tensor([2.5])
    term = BoxLoss(l1_weight=1.0, giou_weight=1.0)
    losses = [term(stages(Targets.from_instances(each, 64, 64, NUM_CLASSES))) for each in (plain, heavy)]
    for name in ("loss_bbox", "loss_giou"):
        assert losses[1][name] == pytest.approx(2.5 * losses[0][name])


@pytest.mark.parametrize("model", [{}, TINY_DINO], ids=["DI-MaskDINO", "DINO"])
def test_models_train_with_every_key(model: dict) -> None:
    options = {"MODEL.IGNORE_CROWD_SHARE": 0.5, "MODEL.CLASS_WEIGHTS": [1.0, 2.0, 1.0, 1.0, 0.5]}
    net = tiny_model(model | options).train()
    batch = train_batch([[4, 4, 30, 40], [20, 10, 60, 44]], [])
    batch[0] |= {"unlabeled_classes": [3], "crowd_regions": region(0, 0, 60, 40, height=48)}
    losses = net(batch)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
