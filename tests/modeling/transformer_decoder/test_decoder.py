import pytest
import torch
from torch import nn

from dimaskdino.layers.boxes import inverse_sigmoid
from dimaskdino.layers.position import box_sine_embedding, pixel_sine_embedding
from dimaskdino.modeling.transformer_decoder import DIMaskDINODecoder, MaskDINODecoder
from dimaskdino.structures import DecoderOutput, EncoderOutput, FeatureTokens, Tokens
from tests.tiny_model import DIM, NUM_CLASSES, encoded, scramble, targets, tiny_cfg

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40], [40, 40, 60, 62]]
NO_INITIAL_BOX = {"INITIALIZE_BOX_TYPE": "no"}
ONE_STAGE = {"TWO_STAGE": False, "DI__ENABLED": False, **NO_INITIAL_BOX}


def build(cls: type[MaskDINODecoder] = DIMaskDINODecoder, **node) -> MaskDINODecoder:
    torch.manual_seed(0)
    return scramble(cls(tiny_cfg(**node))).eval()


def tokens_of(decoder: MaskDINODecoder, levels: list[torch.Tensor]) -> FeatureTokens:
    return decoder.feature_tokens(EncoderOutput(levels, None))


def like(decoder: DIMaskDINODecoder, **node) -> DIMaskDINODecoder:
    """A decoder with other settings and, where both have them, the weights of ``decoder``."""
    other = build(**node)
    shared = {key: value for key, value in decoder.state_dict().items() if key in other.state_dict()}
    other.load_state_dict(shared, strict=False)
    return other


def same(first: DecoderOutput, second: DecoderOutput, name: str) -> bool:
    """Whether a stage predicts the same in both."""
    one, two = (next(stage for stage in output.stages if stage.name == name) for output in (first, second))
    pairs = [(one.logits, two.logits), (one.boxes, two.boxes)]
    if one.masks is not None:
        pairs.append((one.masks.dense(), two.masks.dense()))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_stages_come_in_the_order_in_which_they_are_made():
    output = build()(encoded(), targets(BOXES, BOXES[:1]))
    assert [s.name for s in output.stages] == ["interm", "di.0", "di.1", "initial", "layer.0", "layer.1", "layer.2"]
    assert [s.name for s in output.denoising_stages] == ["dn.initial", "dn.layer.0", "dn.layer.1", "dn.layer.2"]


def test_stages_have_the_shapes_of_their_queries():
    output = build()(encoded(), targets(BOXES, BOXES[:1]))
    for stage in output.stages + output.denoising_stages:
        queries = 12 if stage.name.startswith(("interm", "di.")) else 9 if stage.name.startswith("dn.") else 8
        assert stage.logits.shape == (2, queries, NUM_CLASSES)
        assert stage.boxes.shape == (2, queries, 4)
        assert (stage.masks is None) == stage.name.startswith("di.")
        if stage.masks is not None:
            assert stage.masks.dense().shape == (2, queries, 16, 16)


@pytest.mark.parametrize(
    ("node", "names"),
    [
        ({"DEC_LAYERS": 1, "BATO__ENABLED": False}, ["interm", "di.0", "di.1", "initial", "layer.0"]),
        ({"TI_LAYERS": 1}, ["interm", "di.0", "initial", "layer.0", "layer.1", "layer.2"]),
        ({"DI__ENABLED": False}, ["interm", "initial", "layer.0", "layer.1", "layer.2"]),
        (
            {"INITIAL_PRED": False, **NO_INITIAL_BOX},
            ["interm", "di.0", "di.1", "selection.2", "layer.0", "layer.1", "layer.2"],
        ),
        (
            {"LEARN_TGT": True, "TI_LAYERS": 1, "DEC_LAYERS": 2},
            ["interm", "di.0", "selection.2", "initial", "layer.0", "layer.1"],
        ),
        (ONE_STAGE, ["initial", "layer.0", "layer.1", "layer.2"]),
    ],
    ids=["one layer", "one interaction", "no DI", "no initial prediction", "learned content", "one stage"],
)
def test_settings_decide_which_stages_there_are(node, names):
    assert [stage.name for stage in build(**node)(encoded()).stages] == names


def test_last_selection_is_what_the_initial_queries_predict():
    stages = {s.name: s for s in build(DI__NUM_SELECTED=[12, 10, 8])(encoded()).stages}
    assert list(stages)[:7] == ["interm", "di.0", "di.1", "selection.2", "di.2", "di.3", "selection.3"]
    last, initial = stages["selection.3"], stages["initial"]
    torch.testing.assert_close(last.logits, initial.logits)
    torch.testing.assert_close(last.boxes, initial.boxes)
    torch.testing.assert_close(last.masks.dense(), initial.masks.dense())


def test_selections_are_not_predicted_in_training():
    decoder = build(DI__NUM_SELECTED=[12, 10, 8])
    names = [stage.name for stage in decoder(encoded(), targets(BOXES, BOXES[:1])).stages]
    assert names == ["interm", "di.0", "di.1", "di.2", "di.3", "initial", "layer.0", "layer.1", "layer.2"]


def test_levels_are_flattened_in_the_opposite_order_with_plain_positions():
    decoder, levels = build(), encoded().levels
    t_i = tokens_of(decoder, levels)
    assert t_i.spatial_shapes == [(1, 1), (2, 2), (4, 4), (8, 8)]
    torch.testing.assert_close(t_i.tokens[:, 0], levels[3][:, :, 0, 0])
    torch.testing.assert_close(t_i.tokens[:, -1], levels[0][:, :, -1, -1])
    torch.testing.assert_close(t_i.position[-64:], pixel_sine_embedding(8, 8, DIM, torch.device("cpu")))


@pytest.mark.parametrize("reverse", [False, True], ids=["low2high", "high2low"])
def test_the_finest_level_is_found_in_either_order(reverse):
    levels = encoded().levels
    t_i = tokens_of(build(), levels[::-1] if reverse else levels)
    assert torch.equal(t_i.finest_level, levels[0])


def test_queries_start_from_t_s2_and_their_initial_prediction():
    decoder, given = build(), encoded()
    stages = {stage.name: stage for stage in decoder(given).stages}
    t_i = tokens_of(decoder, given.levels)
    t_s1, _ = decoder.selection(t_i, given.mask_features, decoder.heads, 12)
    t_s2, _ = decoder.de_imbalance(t_s1, decoder.heads)
    torch.testing.assert_close(stages["initial"].boxes, t_s2.boxes)
    # The prediction before layer 0 norms once; that of a layer norms twice.
    torch.testing.assert_close(stages["initial"].logits, decoder.heads.class_embed(decoder.heads.norm(t_s2.content)))


class Stub(nn.Module):
    """A decoder layer whose output is given; remembers the positions and boxes that it was asked about."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, content, position, boxes, tokens, spatial_shapes, attn_mask, valid):
        self.position, self.boxes, self.tokens = position, boxes, tokens
        return self.output


@pytest.fixture
def stubbed() -> tuple[DIMaskDINODecoder, list[torch.Tensor], DecoderOutput]:
    """A decoder whose three layers give three leaves, these, and what it predicts."""
    decoder = build()
    outputs = [torch.randn(2, 8, DIM, requires_grad=True) for _ in range(3)]
    decoder.layers = nn.ModuleList(Stub(output) for output in outputs)
    return decoder, outputs, decoder(encoded())


def test_a_stage_norms_twice(stubbed):
    decoder, outputs, result = stubbed
    norm = decoder.heads.norm
    torch.testing.assert_close(result.stages[-1].logits, decoder.heads.class_embed(norm(norm(outputs[2]))))


def test_look_forward_twice(stubbed):
    # The box of layer 2 starts from the refinement of layer 1, whose own start is detached.
    _, outputs, result = stubbed
    first, second, third = torch.autograd.grad(result.stages[-1].boxes.sum(), outputs, allow_unused=True)
    assert first is None
    assert second.any()
    assert third.any()


def test_boxes_are_refined_from_raw_and_supervised_from_normed_output(stubbed):
    decoder, outputs, result = stubbed
    stages = {stage.name: stage for stage in result.stages}
    delta, norm = decoder.heads.box_embed, decoder.heads.norm
    reference = stages["initial"].boxes
    for index, output in enumerate(outputs):
        supervised = (delta(norm(output)) + inverse_sigmoid(reference)).sigmoid()
        torch.testing.assert_close(stages[f"layer.{index}"].boxes, supervised)
        torch.testing.assert_close(decoder.layers[index].boxes, reference)
        reference = (delta(output) + inverse_sigmoid(reference)).sigmoid()


def test_layers_look_at_detached_boxes_and_the_embedding_of_these(stubbed):
    decoder, _, _ = stubbed
    assert decoder.layers[0].boxes.requires_grad  # as De-Imbalance gives it
    for layer in decoder.layers:
        torch.testing.assert_close(layer.position, decoder.query_pos(box_sine_embedding(layer.boxes, DIM)))
    assert not decoder.layers[1].boxes.requires_grad
    assert not decoder.layers[2].boxes.requires_grad


def test_layer_0_attends_to_t_i_others_to_t_bal(stubbed):
    decoder, outputs, _ = stubbed
    t_i = tokens_of(decoder, encoded().levels)
    torch.testing.assert_close(decoder.layers[0].tokens, t_i.tokens)
    t_bal = decoder.bato(t_i.tokens, t_i.position, outputs[0], decoder.layers[1].position, decoder.heads)
    torch.testing.assert_close(decoder.layers[1].tokens, t_bal)
    assert decoder.layers[2].tokens is decoder.layers[1].tokens


def test_mask_features_are_renewed_from_layer_1_on():
    given = encoded()
    stages = {stage.name: stage.masks for stage in build()(given).stages}
    for name in ("interm", "initial", "layer.0"):
        assert stages[name].features is given.mask_features
    assert stages["layer.1"].features is stages["layer.2"].features
    assert not torch.allclose(stages["layer.1"].features, given.mask_features)


def test_without_bato_mask_features_stay_as_they_are():
    given = encoded()
    masks = [stage.masks for stage in build(BATO__ENABLED=False)(given).stages if stage.masks is not None]
    assert len(masks) == 5
    assert all(each.features is given.mask_features for each in masks)


def test_denoising_changes_nothing_for_matching_queries():
    # Neither attention nor BATO's choice of guides may see the denoising queries that stand before the others.
    decoder = build()
    with_denoising, without = decoder(encoded(), targets(BOXES, BOXES[:1])), decoder(encoded())
    for stage in without.stages:
        assert same(with_denoising, without, stage.name), stage.name


def test_denoising_queries_never_guide():
    decoder, seen = build(), []
    decoder.bato.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[2]))
    decoder(encoded(), targets(BOXES, BOXES[:1]))
    decoder(encoded())
    assert seen[0].shape == (2, 8, DIM)
    torch.testing.assert_close(seen[0], seen[1])


def test_evaluation_makes_no_denoising_queries():
    output = build()(encoded())
    assert output.denoising is None
    assert output.denoising_stages == []


def test_a_batch_without_objects_still_touches_the_label_embedding():
    decoder = build()
    output = decoder(encoded(), targets([], []))
    assert output.denoising is None
    output.stages[-1].logits.sum().backward()
    assert not decoder.denoising.label_embed.weight.grad.any()


def test_maskdino_decoder_equals_dimaskdino_without_di_and_bato():
    ours, plain = build(DI__ENABLED=False, BATO__ENABLED=False), build(MaskDINODecoder)
    assert list(plain.state_dict()) == list(ours.state_dict())
    plain.load_state_dict(ours.state_dict())
    given, batch = encoded(), targets(BOXES, [])
    torch.manual_seed(1)
    expected = ours(given, batch)
    torch.manual_seed(1)
    result = plain(given, batch)
    for one, two in zip(
        result.stages + result.denoising_stages, expected.stages + expected.denoising_stages, strict=True
    ):
        assert one.name == two.name
        assert torch.equal(one.logits, two.logits)
        assert torch.equal(one.boxes, two.boxes)
        assert torch.equal(one.masks.dense(), two.masks.dense())


AFTER_BATO = ["layer.1", "layer.2"]


@pytest.mark.parametrize(
    ("node", "stages"),
    [
        ({"DI__SINGLE_DELTA_BOXES": True}, ["di.0", "di.1"]),
        ({"DI__RANDOM_POSITION": True}, ["initial", "layer.0", "layer.1", "layer.2"]),
        ({"BATO__ENABLED": False}, AFTER_BATO),
        ({"BATO__GTG": False}, AFTER_BATO),
        ({"BATO__GUIDANCE": "t_s2"}, AFTER_BATO),
        ({"BATO__GUIDANCE": "t_s1"}, AFTER_BATO),
        ({"NUM_GUIDING_TOKENS": 2}, AFTER_BATO),
        ({"DN": "no"}, []),
    ],
    ids=str,
)
def test_ablation_changes_only_the_stages_that_it_concerns(node, stages):
    decoder = build()
    expected, result = decoder(encoded()), like(decoder, **node)(encoded())
    assert [stage.name for stage in expected.stages if not same(expected, result, stage.name)] == stages


def test_t_i_guides_through_layer_0_without_de_imbalance():
    t_i, q_bal = (build(DI__ENABLED=False, BATO__GUIDANCE=guidance) for guidance in ("t_i", "q_bal"))
    expected, result = q_bal(encoded()), t_i(encoded())
    assert all(same(expected, result, stage.name) for stage in expected.stages)


@pytest.mark.parametrize("node", [{}, {"LEARN_TGT": True}, {"DI__RANDOM_POSITION": True}], ids=str)
@pytest.mark.parametrize(("guidance", "queries"), [("t_s1", 12), ("t_s2", 8), ("q_bal", 8)])
def test_guidance_decides_which_tokens_guide(guidance, queries, node):
    # The selected tokens guide, also where the queries take another content or other boxes.
    decoder, seen = build(BATO__GUIDANCE=guidance, **node), []
    decoder.bato.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs))
    decoder(encoded(), targets(BOXES, BOXES[:1]))
    content, position = seen[0][2:4]
    assert content.shape == position.shape == (2, queries, DIM)
    assert not torch.allclose(content[0], content[1])  # as learned content would be
    given = encoded()
    t_i = tokens_of(decoder, given.levels)
    selection = decoder.select(t_i, given.mask_features, training=False)
    tokens = {"t_s1": selection.first, "t_s2": selection.last}.get(guidance)
    if tokens is None:
        assert not torch.allclose(content, selection.last.content)
    else:
        torch.testing.assert_close(content, tokens.content)
        torch.testing.assert_close(position, decoder.query_pos(box_sine_embedding(tokens.boxes, DIM)))


def test_random_positions_differ_by_run_and_keep_content():
    decoder, tokens = build(DI__RANDOM_POSITION=True), Tokens(torch.randn(2, 8, DIM), torch.full((2, 8, 4), 0.5))
    first, second = decoder.matching_queries(tokens), decoder.matching_queries(tokens)
    assert first.content is tokens.content
    assert not torch.equal(first.boxes, second.boxes)
    assert ((first.boxes >= 0) & (first.boxes < 1)).all()


def test_learned_queries_are_the_embeddings_in_every_image():
    decoder = build(**ONE_STAGE)
    initial = decoder(encoded()).stages[0]
    expected = decoder.query_embed.weight.sigmoid().expand(2, -1, -1)
    torch.testing.assert_close(initial.boxes, expected)
    expected = decoder.heads.class_embed(decoder.heads.norm(decoder.query_feat.weight)).expand(2, -1, -1)
    torch.testing.assert_close(initial.logits, expected)


def test_learned_content_stands_on_selected_boxes():
    decoder = build(LEARN_TGT=True)
    stages = {stage.name: stage for stage in decoder(encoded()).stages}
    expected = decoder.heads.class_embed(decoder.heads.norm(decoder.query_feat.weight)).expand(2, -1, -1)
    torch.testing.assert_close(stages["initial"].logits, expected)
    assert not torch.allclose(stages["initial"].boxes[0], stages["initial"].boxes[1])


@pytest.mark.parametrize("node", [{}, {"LEARN_TGT": True}, {"DI__ENABLED": False}], ids=str)
def test_images_with_fewer_tokens_than_queries_give_fewer_predictions(node):
    output = build(NUM_OBJECT_QUERIES=30, FIRST_SELECTED_QUERIES=40, **node)(encoded(size=32))
    assert output.stages[-1].logits.shape == (2, 22, NUM_CLASSES)


def test_a_string_made_at_run_time_switches_denoising_off():
    # The releases compare by identity ("is not"), which is true of equal strings that are made differently.
    decoder = build(DN="".join(["n", "o"]))
    assert decoder(encoded(), targets(BOXES, BOXES)).denoising is None


def test_projected_levels_have_the_width_of_the_queries():
    decoder = build(ENFORCE_INPUT_PROJ=True)
    t_i = tokens_of(decoder, encoded().levels)
    # Projection k belongs to level k of the encoder's order, which comes last here.
    torch.testing.assert_close(t_i.finest_level, decoder.input_proj[0](encoded().levels[0]))
