"""DINO's ablations, its denoising, and what it does with padding."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers.boxes import cxcywh_to_xyxy
from dimaskdino.layers.padding import PaddedBatch
from dimaskdino.modeling.transformer_decoder import ContrastiveDenoising
from dimaskdino.structures import DecoderOutput, Targets, Tokens
from tests.tiny_model import (
    DIM,
    NUM_CLASSES,
    TINY_DINO,
    encoded,
    image,
    predict,
    sample,
    targets,
    tiny_cfg,
    tiny_dino,
    train_batch,
)

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40], [40, 40, 60, 62]]
VARIANTS = [
    {},
    {"QUERY_SELECTION": "none"},
    {"QUERY_SELECTION": "pure"},
    {"LOOK_FORWARD_TWICE": False},
    {"SHARED_HEADS": False},
    {"DN": "plain"},
    {"DN": "no"},
    {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "NUM_LEVELS": 5},
    {"NUM_LEVELS": 5},
    {"DEC_LAYERS": 1, "ENC_LAYERS": 0},
]


def decode(model: nn.Module, boxes: list[list[int]] | None = None) -> DecoderOutput:
    """What the decoder makes of random tokens; with objects in both images in training."""
    decoder = model.sem_seg_head.predictor
    return decoder(encoded(), None if boxes is None else targets(boxes, boxes[:1]))


@pytest.mark.parametrize("node", VARIANTS, ids=str)
@pytest.mark.parametrize("batch", [(BOXES, BOXES[:1]), ([], [])], ids=["objects", "none"])
def test_every_variant_trains_every_parameter(node, batch):
    model = tiny_dino(**node).train()
    losses = model(train_batch(*batch))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [key for key, each in model.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_loss_names_depend_on_the_configuration_alone(node):
    model = tiny_dino(**node).train()
    names = {frozenset(model(train_batch(*batch))) for batch in ((BOXES, []), ([], []))}
    (found,) = names
    layers = ["_0", "_1", ""] if node.get("DEC_LAYERS", 3) == 3 else [""]
    endings = layers + ([] if node.get("DN") == "no" else [f"_dn{each}" for each in layers])
    endings += [] if node.get("QUERY_SELECTION") == "none" else ["_interm"]
    assert found == {f"{term}{ending}" for term in ("loss_ce", "loss_bbox", "loss_giou") for ending in endings}


def test_results_are_boxes_without_masks():
    (found,) = predict(tiny_dino(), image(48, 80), height=24, width=40)
    assert found.image_size == (24, 40)
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    assert len(found) == 6
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_boxes_are_parts_of_the_image_not_the_canvas():
    model = tiny_dino()
    for heads in (*model.sem_seg_head.predictor.heads, model.sem_seg_head.predictor.selection_heads):
        heads.box_embed.zero_last_layer()
        with torch.no_grad():
            heads.box_embed.layers[-1].bias[:2] = 50.0  # far beyond: the corner of the image
    small, large = predict(model, image(32, 40), image(64, 80))
    assert small.pred_boxes.get_centers().amax(0).tolist() == pytest.approx([40, 32], abs=0.1)
    assert large.pred_boxes.get_centers().amax(0).tolist() == pytest.approx([80, 64], abs=0.1)


def test_targets_are_parts_of_the_image():
    model, seen = tiny_dino().train(), []
    model.criterion.register_forward_pre_hook(lambda _, given: seen.extend(given[1]))
    model([sample(32, 40, [[0, 0, 20, 16]]), sample(64, 80, [[0, 0, 20, 16]])])
    assert seen[0].boxes.tolist() == [pytest.approx([0.25, 0.25, 0.5, 0.5])]
    assert seen[1].boxes.tolist() == [pytest.approx([0.125, 0.125, 0.25, 0.25])]
    assert seen[0].masks is None


def test_padding_is_never_looked_at():
    decoder = tiny_dino().sem_seg_head.predictor
    given = encoded()
    shapes = [tuple(level.shape[-2:]) for level in given.levels]
    valid = PaddedBatch([(40, 24), (64, 64)], (64, 64)).valid_cells(shapes, torch.device("cpu"))
    before = decoder(given._replace(valid=valid))
    levels = [level.clone() for level in given.levels]
    start = 0
    for level, (height, width) in zip(levels, shapes, strict=True):
        padding = valid.is_padding[0, start : start + height * width].view(height, width)
        level[0, :, padding] += 5.0
        start += height * width
    after = decoder(given._replace(levels=levels, valid=valid))
    for one, two in zip(before.stages, after.stages, strict=True):
        torch.testing.assert_close(one.logits, two.logits)
        torch.testing.assert_close(one.boxes, two.boxes)


def test_query_selection_says_where_content_and_boxes_come_from():
    mixed, pure, none = (tiny_dino(QUERY_SELECTION=which).sem_seg_head.predictor for which in ("mixed", "pure", "none"))
    selected = Tokens(torch.randn(2, 8, DIM), torch.rand(2, 8, 4))
    queries = mixed.matching_queries(selected)
    assert torch.equal(queries.content, mixed.query_feat.weight.expand(2, -1, -1))
    assert queries.boxes is selected.boxes
    assert pure.matching_queries(selected) is selected
    learned = none.select(none.feature_tokens(encoded()), None, training=False).last
    torch.testing.assert_close(learned.boxes, none.query_embed.weight.sigmoid().expand(2, -1, -1))
    assert [stage.name for stage in none.stages] == ["layer.0", "layer.1", "layer.2"]
    assert mixed.stages[0].name == "interm"


@pytest.mark.parametrize("twice", [True, False])
def test_look_forward_twice_reaches_the_boxes_of_the_layer_before(twice):
    model = tiny_dino(LOOK_FORWARD_TWICE=twice, SHARED_HEADS=False)
    first, second, third = (heads.box_embed.layers[-1].bias for heads in model.sem_seg_head.predictor.heads)
    loss = decode(model).stages[-1].boxes.sum()
    gradients = torch.autograd.grad(loss, (first, second, third), allow_unused=True)
    assert [each is not None for each in gradients] == [False, twice, True]


def test_heads_start_equal_and_at_the_prior():
    model = build_model(tiny_cfg(TINY_DINO | {"MODEL.DINO.SHARED_HEADS": False}))
    decoder = model.sem_seg_head.predictor
    for heads in (*decoder.heads, decoder.selection_heads):
        assert torch.equal(heads.class_embed.weight, decoder.heads[0].class_embed.weight)
        assert heads.class_embed.bias.sigmoid().tolist() == pytest.approx([0.01] * NUM_CLASSES)
        assert not heads.box_embed.layers[-1].weight.any()
    assert len({heads.class_embed.weight.data_ptr() for heads in decoder.heads}) == 3


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ({"QUERY_SELECTION": "both"}, "MODEL.DINO.QUERY_SELECTION"),
        ({"DN": "yes"}, "MODEL.DINO.DN"),
        ({"DN_NUM": 0}, "MODEL.DINO.DN_NUM"),
        ({"NHEADS": 3}, "MODEL.DINO.NHEADS"),
        ({"DN_NAME": "Absent"}, "MODEL.DINO.DN_NAME"),
        ({"DECODER_NAME": "Absent"}, "MODEL.DINO.DECODER_NAME"),
        ({"IN_FEATURES": ["res6"]}, "MODEL.DINO.IN_FEATURES.*res5"),
        ({"NUM_LEVELS": 2}, "MODEL.DINO.NUM_LEVELS"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_name_the_key(node, key):
    with pytest.raises(ConfigError, match=key):
        tiny_dino(**node)


def denoising(num_queries: int = 10, *, label: float = 0.0, box: float = 0.0, negatives: bool = True) -> nn.Module:
    return ContrastiveDenoising(
        dim=DIM, num_classes=NUM_CLASSES, num_queries=num_queries, label_noise=label, box_noise=box, negatives=negatives
    )


def one_object(box: list[float]) -> list[Targets]:
    return [Targets(torch.tensor([2]), torch.tensor([box]), None, torch.ones(1, dtype=torch.bool))]


def test_a_group_holds_positives_then_negatives():
    queries = denoising(10)(targets(BOXES, BOXES[:1]))
    # 10 // 3 groups, each with twice the places of the largest image.
    assert (queries.num_groups, queries.group_size, queries.num_queries) == (3, 6, 18)
    (query, obj), (other_query, other_obj) = queries.matches
    assert query.tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert obj.tolist() == [0, 1, 2] * 3
    assert (other_query.tolist(), other_obj.tolist()) == ([0, 6, 12], [0, 0, 0])
    used = queries.tokens.content[1].any(-1).nonzero().flatten().tolist()
    assert used == [0, 3, 6, 9, 12, 15]


def test_plain_denoising_has_no_negatives():
    queries = denoising(10, negatives=False)(targets(BOXES))
    assert (queries.num_groups, queries.group_size) == (3, 3)
    assert queries.matches[0][0].tolist() == list(range(9))


def test_crowded_images_denoise_every_object_once():
    many = Targets(torch.zeros(25, dtype=torch.int64), torch.rand(25, 4) / 2 + 0.2, None, torch.ones(25).bool())
    queries = denoising(10)([many])
    assert (queries.num_groups, queries.group_size) == (1, 50)
    assert queries.matches[0][1].tolist() == list(range(25))


def test_negatives_move_by_more_than_positives_do():
    queries = denoising(500, box=0.4)(one_object([0.5, 0.4, 0.2, 0.1]))
    corners = cxcywh_to_xyxy(queries.tokens.boxes[0])
    halves = torch.tensor([0.1, 0.05, 0.1, 0.05])
    moved = (corners - cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.1]))) / halves
    positives, negatives = moved.view(500, 2, 4).unbind(1)
    assert positives.abs().max() <= 0.4 + 1e-3
    assert positives.abs().amax(0).min() > 0.38
    assert negatives.abs().min() >= 0.4 - 1e-3
    assert negatives.abs().max() <= 0.8 + 1e-3
    # Each corner moves either way.
    assert ((negatives > 0).float().mean(0) - 0.5).abs().max() < 0.1


def test_boxes_stay_in_the_image_and_keep_a_size():
    boxes = denoising(500, box=1.0)(one_object([0.95, 0.5, 0.3, 0.2])).tokens.boxes
    assert ((boxes > 0.9e-3) & (boxes < 1)).all()


def test_labels_of_both_halves_are_redrawn_alike():
    module = denoising(4000, label=0.8)
    content = module(one_object([0.5, 0.5, 0.2, 0.2])).tokens.content[0].view(4000, 2, DIM)
    kept = (content == module.label_embed.weight[2]).all(-1).float().mean(0)
    # 0.4 are redrawn from five classes, the true one among them.
    assert kept.tolist() == pytest.approx([0.68, 0.68], abs=0.03)


def test_nothing_is_denoised_without_objects_or_denoising():
    assert denoising()(targets([], [])) is None
    assert denoising(0)(targets(BOXES)) is None


def test_unmatched_denoising_queries_are_background():
    model = tiny_dino().train()
    output = decode(model, BOXES)
    losses = model.criterion(output, targets(BOXES, BOXES[:1]))
    gradient = torch.autograd.grad(losses["loss_bbox_dn"], output.denoising_stages[-1].boxes)[0]
    matched: list[Tensor] = [query for query, _ in output.denoising.matches]
    for found, query in zip(gradient, matched, strict=True):
        assert set(found.any(-1).nonzero().flatten().tolist()) <= set(query.tolist())
    class_gradient = torch.autograd.grad(losses["loss_ce_dn"], output.denoising_stages[-1].logits)[0]
    negatives = torch.ones(len(class_gradient[1]), dtype=torch.bool)
    negatives[matched[1]] = False
    # Gradient descent lowers every logit of a background query.
    assert (class_gradient[1, negatives] >= 0).all()
    assert re.match("dn.layer", output.denoising_stages[-1].name)


def test_half_precision_in_evaluation_and_autocast_in_training():
    batch = [{"image": image(32, 40)}, {"image": image(64, 80)}]
    with torch.no_grad():
        for result in tiny_dino().bfloat16()(batch):
            assert result["instances"].pred_boxes.tensor.isfinite().all()
    model = tiny_dino().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(train_batch(BOXES, BOXES[:1]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(each.grad.isfinite().all() for each in model.parameters())
