"""What each ablation flag changes in the graph, and that it changes nothing else."""

import pytest
import torch

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.transformer_decoder import DIMaskDINODecoder, MaskDINODecoder
from dimaskdino.structures import DecoderOutput
from tests.modeling.transformer_decoder.test_decoder import BOXES, NO_INITIAL_BOX, build, like, same
from tests.tiny_model import encoded, sample, targets, tiny_cfg, tiny_model

LEARNED = {"TWO_STAGE": False, "DI__ENABLED": False, **NO_INITIAL_BOX}


def names(output: DecoderOutput) -> list[str]:
    return [stage.name for stage in output.stages]


def changed(first: DecoderOutput, second: DecoderOutput) -> list[str]:
    """Stages that both have and that differ."""
    return [name for name in names(first) if name in names(second) and not same(first, second, name)]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"BATO__GUIDANCE": "t_s2", "DI__ENABLED": False}, "there is one selection alone"),
        ({"BATO__GUIDANCE": "t_s1", **LEARNED}, "learned queries are not selected"),
        ({"DI__RANDOM_POSITION": True, **LEARNED}, "would never be trained"),
        ({"TI_LAYERS": 0}, "DI.ENABLED needs TI_LAYERS of at least 1"),
    ],
    ids=str,
)
def test_combinations_that_mean_nothing_are_refused_with_the_reason(node, reason):
    with pytest.raises(ConfigError, match=reason):
        DIMaskDINODecoder(tiny_cfg(**node))


@pytest.mark.parametrize("guidance", ["t_i", "q_bal", "t_s1"])
def test_without_de_imbalance_the_tokens_that_exist_may_guide(guidance):
    assert build(BATO__GUIDANCE=guidance, DI__ENABLED=False)(encoded()).stages[-1].name == "layer.2"


def test_guidance_does_not_matter_to_maskdino_without_bato():
    build(MaskDINODecoder, BATO__GUIDANCE="t_s2")


def test_without_de_imbalance_the_first_selection_alone_gives_the_queries():
    # Its 8 tokens are the best of the 12 that De-Imbalance begins with.
    double = build()
    single = like(double, DI__ENABLED=False)(encoded())
    first = double(encoded()).stages[0]
    assert names(single) == ["interm", "initial", "layer.0", "layer.1", "layer.2"]
    interm, initial = single.stages[:2]
    torch.testing.assert_close(interm.logits, first.logits[:, :8])
    torch.testing.assert_close(interm.boxes, first.boxes[:, :8])
    torch.testing.assert_close(initial.logits, interm.logits)


def test_a_third_selection_leaves_everything_before_it_as_it_was():
    double = build(DI__NUM_SELECTED=[12, 8])
    triple = like(double, DI__NUM_SELECTED=[12, 10, 8])
    one, two = double(encoded()), triple(encoded())
    assert set(names(two)) - set(names(one)) == {"di.2", "di.3", "selection.2", "selection.3"}
    assert [stage.logits.shape[1] for stage in two.stages] == [12, 12, 12, 10, 10, 10, 8, 8, 8, 8, 8]
    assert changed(one, two) == ["initial", "layer.0", "layer.1", "layer.2"]


@pytest.mark.parametrize(("node", "queries"), [([12, 8], 8), ([12, 12], 12), ([8, 8], 8)], ids=str)
def test_the_selections_decide_how_many_tokens_there_are(node, queries):
    stages = build(DI__NUM_SELECTED=node, NUM_OBJECT_QUERIES=queries)(encoded()).stages
    assert [stage.logits.shape[1] for stage in stages] == [node[0]] * 3 + [node[1]] * 4


def test_two_numbers_equal_the_two_keys_of_the_release():
    by_keys = build()
    assert changed(by_keys(encoded()), like(by_keys, DI__NUM_SELECTED=[12, 8])(encoded())) == []


def test_fewer_decoder_layers_are_the_first_of_more():
    deep = build(DEC_LAYERS=5)
    one, two = deep(encoded()), like(deep, DEC_LAYERS=2)(encoded())
    assert set(names(one)) - set(names(two)) == {"layer.2", "layer.3", "layer.4"}
    assert changed(one, two) == []


def trained_by_t_bal(**node) -> set[str]:
    """Which parts of the decoder T_bal passes a gradient to."""
    decoder, seen = build(**node), []
    decoder.bato.attention.register_forward_hook(lambda _m, _i, output: seen.append(output))
    decoder(encoded())
    seen[0].sum().backward()
    parts = {name: p.grad is not None and p.grad.any() for name, p in decoder.named_parameters()}
    return {".".join(name.split(".")[:2]) for name, moved in parts.items() if moved and not name.startswith("bato.")}


@pytest.mark.parametrize(
    ("node", "through_layer_0", "through_interaction"),
    [
        ({}, True, True),
        ({"BATO__GUIDANCE": "t_s2"}, False, True),
        ({"BATO__GUIDANCE": "t_s1"}, False, False),
        ({"BATO__GUIDANCE": "t_i", "DI__ENABLED": False}, True, False),
    ],
    ids=str,
)
def test_guidance_decides_what_t_bal_is_made_of(node, through_layer_0, through_interaction):
    parts = trained_by_t_bal(**node)
    assert ("layers.0" in parts) is through_layer_0
    assert ("de_imbalance.layers" in parts) is through_interaction
    assert not {"layers.1", "layers.2"} & parts


def test_guiding_tokens_are_generated_or_are_the_queries():
    generated, plain = trained_by_t_bal(), trained_by_t_bal(BATO__GTG=False)
    assert generated - plain == {"heads.mask_embed"}
    assert plain <= generated


@pytest.mark.parametrize("cls", [DIMaskDINODecoder, MaskDINODecoder])
def test_random_positions_replace_the_boxes_of_the_matching_queries_alone(cls, monkeypatch):
    free = build(cls)
    bound = build(cls, DI__RANDOM_POSITION=True)
    bound.load_state_dict(free.state_dict())
    monkeypatch.setattr(torch, "rand_like", lambda boxes: torch.full_like(boxes, 0.25))
    outputs = []
    for decoder in (free, bound):
        torch.manual_seed(3)
        outputs.append(decoder(encoded(), targets(BOXES, BOXES[:1])))
    one, two = ({stage.name: stage for stage in output.stages + output.denoising_stages} for output in outputs)
    assert changed(*outputs) == ["initial", "layer.0", "layer.1", "layer.2"]
    torch.testing.assert_close(one["initial"].logits, two["initial"].logits)
    assert (two["initial"].boxes == 0.25).all()
    torch.testing.assert_close(one["dn.initial"].boxes, two["dn.initial"].boxes)


def test_the_loss_weight_constraint_scales_box_losses_and_nothing_else():
    model, batch = tiny_model().train(), [sample(64, 64, BOXES)]
    bound = tiny_model(BOX_WEIGHT=0.5, GIOU_WEIGHT=0.2).train()
    losses = []
    for each in (model, bound):
        torch.manual_seed(3)
        losses.append(each(batch))
    assert list(losses[0]) == list(losses[1])
    for name, value in losses[0].items():
        factor = 0.1 if name.startswith(("loss_bbox", "loss_giou")) else 1.0
        torch.testing.assert_close(losses[1][name], factor * value, msg=name)
