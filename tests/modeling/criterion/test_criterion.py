import math
from dataclasses import replace

import pytest
import torch

from dimaskdino.modeling.criterion import Criterion
from dimaskdino.structures import (
    DecoderOutput,
    DenoisingQueries,
    MaskLogits,
    Stage,
    StagePrediction,
    Tokens,
    decoder_stages,
    mask_logits,
)
from tests.modeling.criterion.stages import LAYER, GridSampler, logits_of, make_stage, make_targets, stack
from tests.tiny_model import NUM_CLASSES, tiny_cfg

LN2 = math.log(2)
LEFT, RIGHT, LOWER = [0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.5, 0.75, 1.0, 0.5]
TERMS = ["loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice"]
WEIGHTS = {"loss_ce": 4.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
KEYS = ["CLASS_WEIGHT", "BOX_WEIGHT", "GIOU_WEIGHT", "MASK_WEIGHT", "DICE_WEIGHT"]


def criterion(**node) -> Criterion:
    return Criterion(tiny_cfg(**node), sampler=GridSampler())


def plain(boxes: list, stage: Stage = LAYER, masks: bool = True):
    """Undecided logits and masks at these boxes."""
    return make_stage(
        [[0.0] * NUM_CLASSES for _ in boxes], boxes, torch.zeros(len(boxes), 8, 8) if masks else None, stage
    )


def full_output(num_images: int = 1) -> DecoderOutput:
    """Every kind of stage, and two groups of two denoising queries."""
    refined = decoder_stages(2, initial=True)
    stages = [
        stack(*[plain([LEFT, RIGHT, LOWER], stage, masks=stage.kind != "di")] * num_images)
        for stage in [Stage("interm"), Stage("di", 0), Stage("di", 1), *refined]
    ]
    denoising_stages = [
        stack(*[plain([LEFT, RIGHT, LEFT, RIGHT], stage.of_denoising())] * num_images) for stage in refined
    ]
    queries = Tokens(torch.zeros(num_images, 4, 1), torch.zeros(num_images, 4, 4))
    matches = [(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 1]))] * num_images
    return DecoderOutput(stages, denoising_stages, DenoisingQueries(queries, matches, num_groups=2, group_size=2))


def without_denoising(output: DecoderOutput) -> DecoderOutput:
    return DecoderOutput(output.stages, [], None)


TWO_OBJECTS = [make_targets([0, 1], [LEFT, RIGHT])]


def names(terms: list[str], *endings: str) -> set[str]:
    return {f"{term}{ending}" for term in terms for ending in endings}


def test_terms_are_named_by_stage():
    losses = criterion()(full_output(), TWO_OBJECTS)
    expected = names(TERMS, "", "_0", "_1", "_interm", "_dn", "_dn_0", "_dn_1") | names(TERMS[:3], "_di_0", "_di_1")
    assert set(losses) == expected


def test_every_term_of_one_object_by_hand():
    # One query predicts class 0 undecidedly, the box to the right of the object, and an undecided mask.
    output = DecoderOutput([plain([RIGHT])], [], None)
    losses = criterion(DN="no")(output, [make_targets([0], [LEFT])])
    expected = {
        "loss_ce": 4 * (0.25 + 0.75 * (NUM_CLASSES - 1)) * 0.25 * LN2,
        "loss_bbox": 5 * 0.5,
        "loss_giou": 2 * 1.0,
        "loss_mask": 5 * LN2,
        "loss_dice": 5 * (1 - (2 * 8 + 1) / (32 + 16 + 1)),
    }
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_a_perfect_prediction_costs_nothing_but_certainty():
    target = make_targets([0, 1], [LEFT, RIGHT])
    logits = torch.full((2, NUM_CLASSES), -20.0)
    logits[0, 1] = logits[1, 0] = 20.0
    masks = torch.stack((logits_of(target.masks[1]), logits_of(target.masks[0])))
    output = DecoderOutput([make_stage(logits.tolist(), [RIGHT, LEFT], masks)], [], None)
    losses = criterion(DN="no")(output, [target])
    assert all(abs(value.item()) < 1e-4 for value in losses.values())


def test_terms_are_divided_by_the_objects_of_the_batch():
    one = DecoderOutput([plain([RIGHT])], [], None)
    two = DecoderOutput([stack(plain([RIGHT]), plain([RIGHT]))], [], None)
    target = make_targets([0], [LEFT])
    single, double = criterion(DN="no")(one, [target]), criterion(DN="no")(two, [target, target])
    for name in TERMS:
        torch.testing.assert_close(single[name], double[name])


def test_denoising_terms_are_divided_by_objects_and_groups():
    # Both groups stand for the same two objects as the first two matching queries would: the same loss each.
    losses = criterion()(full_output(), TWO_OBJECTS)
    expected = criterion(DN="no")(DecoderOutput([plain([LEFT, RIGHT])], [], None), TWO_OBJECTS)
    for name in TERMS:
        torch.testing.assert_close(losses[f"{name}_dn"], expected[name])


def test_denoising_terms_are_divided_by_denoised_objects_alone():
    # Of three objects the first two are denoised, as where DN_NUM has room for no more.
    losses = criterion()(full_output(), [make_targets([0, 1, 2], [LEFT, RIGHT, LOWER])])
    expected = criterion()(full_output(), TWO_OBJECTS)
    for name in TERMS:
        torch.testing.assert_close(losses[f"{name}_dn"], expected[f"{name}_dn"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stages_share_one_copy_of_their_mask_features_under_autocast(dtype):
    features, kept = torch.rand(2, 4, 8, 8, requires_grad=True), []
    masks = MaskLogits(torch.rand(2, 3, 4, requires_grad=True), features)
    stage = StagePrediction(LAYER, torch.zeros(2, 3, NUM_CLASSES), torch.rand(2, 3, 4), masks)
    stages = [replace(stage, stage=each) for each in decoder_stages(2, initial=True)]
    count = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with torch.autocast("cpu", dtype), count:
        criterion(DN="no")(DecoderOutput(stages, [], None), [make_targets([0], [LEFT])] * 2)
    copies = {x.untyped_storage().data_ptr() for x in kept if x.dtype == dtype and x.numel() == 4 * 8 * 8}
    assert len(copies) == 1


def test_denoising_queries_keep_their_own_objects():
    # Their boxes would be matched the other way round.
    output = full_output()
    swapped = [(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 1, 0]))]
    denoising = DenoisingQueries(output.denoising.tokens, swapped, num_groups=2, group_size=2)
    losses = criterion()(DecoderOutput(output.stages, output.denoising_stages, denoising), TWO_OBJECTS)
    assert losses["loss_bbox_dn"].item() == pytest.approx(5 * 0.5)


def test_unmatched_queries_stand_for_no_object():
    one, more = (DecoderOutput([plain(boxes)], [], None) for boxes in ([LEFT], [LEFT, LOWER, RIGHT]))
    target = [make_targets([0], [LEFT])]
    first, second = (criterion(DN="no")(output, target)["loss_ce"].item() for output in (one, more))
    assert second - first == pytest.approx(4 * 2 * NUM_CLASSES * 0.75 * 0.25 * LN2, rel=1e-5)


@pytest.mark.parametrize(("term", "key"), list(zip(TERMS, KEYS, strict=True)))
def test_weight_scales_only_its_own_term_of_every_stage(term, key):
    before = criterion()(full_output(), TWO_OBJECTS)
    after = criterion(**{key: 2 * WEIGHTS[term]})(full_output(), TWO_OBJECTS)
    for name, value in before.items():
        torch.testing.assert_close(after[name], 2 * value if name.startswith(term) else value)


def test_five_weights_are_all_that_there_are():
    # The releases build 420 names with a weight each, of which 81 can occur, and drop losses whose name is not there.
    assert [name for term in criterion().terms for name in term.names] == TERMS


@pytest.mark.parametrize("dn", ["no", "standard", "seg"])
def test_names_do_not_depend_on_whether_there_are_objects(dn):
    output = full_output() if dn != "no" else without_denoising(full_output())
    with_objects = criterion(DN=dn)(output, TWO_OBJECTS)
    without = criterion(DN=dn)(without_denoising(full_output()), [make_targets([], [])])
    assert set(with_objects) == set(without)


def test_without_objects_only_class_terms_cost_anything():
    losses = criterion()(without_denoising(full_output()), [make_targets([], [])])
    for name, value in losses.items():
        assert value.isfinite()
        assert (value > 0) == (name.startswith("loss_ce") and "_dn" not in name), name


def test_without_objects_class_terms_are_divided_by_one():
    output = DecoderOutput([plain([LEFT])], [], None)
    loss = criterion(DN="no")(output, [make_targets([], [])])["loss_ce"]
    assert loss.item() == pytest.approx(4 * NUM_CLASSES * 0.75 * 0.25 * LN2, rel=1e-5)


def test_standard_denoising_supervises_class_and_box_alone():
    losses = criterion(DN="standard")(full_output(), TWO_OBJECTS)
    assert {name for name in losses if "_dn" in name} == names(TERMS[:3], "_dn", "_dn_0", "_dn_1")


@pytest.mark.parametrize("boxes", [[LEFT, RIGHT], []], ids=["objects", "no objects"])
def test_learned_queries_do_not_denoise_their_first_stage(boxes):
    output = full_output()
    one_stage = DecoderOutput(output.stages[3:], output.denoising_stages, output.denoising)
    target = make_targets(list(range(len(boxes))), boxes)
    losses = criterion()(one_stage if boxes else without_denoising(one_stage), [target])
    assert {name for name in losses if "_dn" in name} == names(TERMS, "_dn", "_dn_1")
    assert {name for name in losses if "_dn" not in name} == names(TERMS, "", "_0", "_1")


def test_without_deep_supervision_the_last_layer_and_the_selections_remain():
    losses = criterion(DEEP_SUPERVISION=False)(full_output(), TWO_OBJECTS)
    assert set(losses) == names(TERMS, "", "_interm", "_dn") | names(TERMS[:3], "_di_0", "_di_1")
    deep = criterion()(full_output(), TWO_OBJECTS)
    for name, value in losses.items():
        torch.testing.assert_close(value, deep[name])


def test_without_box_loss_no_stage_has_box_terms():
    losses = criterion(BOX_LOSS=False)(full_output(), TWO_OBJECTS)
    masked = names(["loss_mask", "loss_dice"], "", "_0", "_1", "_interm", "_dn", "_dn_0", "_dn_1")
    assert {name for name in losses if not name.startswith("loss_ce")} == masked


def test_only_masks_of_matched_queries_are_computed(monkeypatch):
    # The releases compute the masks of all queries of every layer.
    rows = []

    def count(embed, features):
        rows.append(len(embed))
        return mask_logits(embed, features)

    monkeypatch.setattr("dimaskdino.modeling.criterion.terms.mask_logits", count)
    monkeypatch.setattr(MaskLogits, "dense", lambda self: pytest.fail("all masks were computed"))
    criterion(DN="no")(without_denoising(full_output()), TWO_OBJECTS)
    assert rows == [2] * 4  # interm, initial and two layers; token interaction predicts no masks


def test_points_come_from_the_sampler_that_is_passed_in():
    class Corner(GridSampler):
        def per_mask(self, logits):
            return torch.full((len(logits), 5, 2), 1 / 16)  # the first pixel, inside the left object alone

    output = DecoderOutput([make_stage([[0.0] * NUM_CLASSES], [LEFT], torch.full((1, 8, 8), 3.0))], [], None)
    for box, expected in ((LEFT, math.log(1 + math.exp(-3))), (RIGHT, math.log(1 + math.exp(3)))):
        loss = Criterion(tiny_cfg(DN="no"), sampler=Corner())(output, [make_targets([0], [box])])
        assert loss["loss_mask"].item() == pytest.approx(5 * expected, rel=1e-4)


def test_losses_are_computed_in_float32():
    stage = plain([RIGHT])
    masks = MaskLogits(stage.masks.embed.half(), stage.masks.features.half())
    half = StagePrediction(stage.stage, stage.logits.half(), stage.boxes.half(), masks)
    losses = criterion(DN="no")(DecoderOutput([half], [], None), [make_targets([0], [LEFT])])
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_the_number_of_objects_is_averaged_over_processes(monkeypatch):
    from detectron2.utils import comm

    def all_reduce(count):
        count += 5  # the other process has five objects

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    output, target = DecoderOutput([plain([RIGHT])], [], None), [make_targets([0], [LEFT])]
    shared = criterion(DN="no")(output, target)["loss_bbox"]
    assert shared.item() == pytest.approx(5 * 0.5 / 3)


def test_a_stage_costs_the_same_alone_as_among_others():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 8, 8)
    stages = [
        StagePrediction(
            stage,
            torch.randn(2, 3, NUM_CLASSES),
            torch.rand(2, 3, 4) * 0.5 + 0.25,
            MaskLogits(torch.randn(2, 3, 4), shared),
        )
        for stage, shared in zip(decoder_stages(2, initial=True), (features, features, features + 1), strict=True)
    ]
    targets = [make_targets([0, 1], [LEFT, RIGHT]), make_targets([2], [LOWER])]
    together = criterion(DN="no")(DecoderOutput(stages, [], None), targets)
    for stage in stages:
        alone = criterion(DN="no")(DecoderOutput([stage], [], None), targets)
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value)


def test_masks_in_chunks_cost_the_same(monkeypatch):
    expected = criterion()(full_output(2), TWO_OBJECTS * 2)
    monkeypatch.setattr("dimaskdino.modeling.criterion.terms._MASKS_PER_CHUNK", 3)
    chunked = criterion()(full_output(2), TWO_OBJECTS * 2)
    for name, value in expected.items():
        torch.testing.assert_close(chunked[name], value)


def test_unsupervised_boxes_cost_nothing_and_still_count_as_objects():
    output = DecoderOutput([plain([RIGHT, LOWER])], [], None)
    target = make_targets([0, 1], [LEFT, LOWER])
    free = replace(target, box_supervised=torch.tensor([False, True]))
    supervised, some = (criterion(DN="no")(output, [each]) for each in (target, free))
    assert supervised["loss_bbox"].item() == pytest.approx(5 * 0.5 / 2)
    assert some["loss_bbox"].item() == pytest.approx(0.0, abs=1e-6)
    assert some["loss_giou"].item() == pytest.approx(0.0, abs=1e-5)
    assert some["loss_mask"] == supervised["loss_mask"]


def test_alpha_and_gamma_of_the_class_loss_are_keys():
    output = DecoderOutput([plain([LEFT])], [], None)
    target = [make_targets([0], [LEFT])]
    loss = criterion(DN="no", FOCAL_ALPHA=0.5, FOCAL_GAMMA=0.0)(output, target)["loss_ce"]
    assert loss.item() == pytest.approx(4 * 0.5 * NUM_CLASSES * LN2, rel=1e-5)


SEMANTIC = {"SEMANTIC_CE_LOSS": True, "TEST__SEMANTIC_ON": True, "TEST__INSTANCE_ON": False}


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_softmax_class_loss_is_the_weighted_mean_over_queries(weight):
    # Of three queries one has an object; a logit of ln 2 gives the last class a probability of 2 in K + 2.
    logits = [[0.0] * NUM_CLASSES + [math.log(2)]] * 3
    output = DecoderOutput([make_stage(logits, [LEFT, RIGHT, LOWER])], [], None)
    loss = criterion(DN="no", NO_OBJECT_WEIGHT=weight, **SEMANTIC)(output, [make_targets([0], [LEFT])])["loss_ce"]
    total = math.log(NUM_CLASSES + 2) + 2 * weight * math.log((NUM_CLASSES + 2) / 2)
    assert loss.item() == pytest.approx(4 * total / (1 + 2 * weight), rel=1e-5)


def test_objects_without_a_mask_cost_no_mask_loss():
    undecided = make_stage([[0.0] * NUM_CLASSES] * 2, [LEFT, RIGHT], torch.zeros(2, 8, 8))
    target = make_targets([0, 1], [LEFT, RIGHT])
    some = replace(target, mask_supervised=torch.tensor([True, False]))
    both, one = (criterion(DN="no")(DecoderOutput([undecided], [], None), [each]) for each in (target, some))
    for term in ("loss_mask", "loss_dice"):
        assert one[term].item() == pytest.approx(both[term].item() / 2, rel=1e-5)
    assert one["loss_bbox"] == both["loss_bbox"]
