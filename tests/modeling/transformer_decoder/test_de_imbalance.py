import pytest
import torch

from dimaskdino.errors import ConfigError
from dimaskdino.layers.boxes import inverse_sigmoid
from dimaskdino.modeling.transformer_decoder import PredictionHeads
from dimaskdino.modeling.transformer_decoder.de_imbalance import DeImbalance
from dimaskdino.structures import Tokens, highest_scores, take
from tests.tiny_model import DIM, scramble, tiny_cfg


def module(*num_selected: int, num_layers: int = 2, single_delta_boxes: bool = False) -> DeImbalance:
    torch.manual_seed(0)
    return scramble(
        DeImbalance(
            dim=DIM,
            hidden_dim=48,
            num_heads=4,
            num_layers=num_layers,
            num_selected=num_selected or (12, 8),
            single_delta_boxes=single_delta_boxes,
        )
    )


def heads() -> PredictionHeads:
    torch.manual_seed(1)
    return scramble(PredictionHeads(dim=DIM, num_logits=5, mask_dim=DIM))


def t_s1(count: int = 12) -> Tokens:
    torch.manual_seed(2)
    return Tokens(torch.randn(2, count, DIM), torch.rand(2, count, 4) * 0.8 + 0.1)


def test_double_selection_keeps_k2_tokens_and_predicts_once_per_layer():
    t_s2, predictions = module()(t_s1(), heads())
    assert t_s2.content.shape == (2, 8, DIM)
    assert t_s2.boxes.shape == (2, 8, 4)
    assert [p.name for p in predictions] == ["di.0", "di.1"]
    assert all(p.logits.shape == (2, 12, 5) and p.boxes.shape == (2, 12, 4) and p.masks is None for p in predictions)


def test_triple_selection_interacts_again_among_fewer_tokens():
    t_s2, predictions = module(12, 10, 8)(t_s1(), heads())
    assert t_s2.content.shape == (2, 8, DIM)
    assert [p.name for p in predictions] == ["di.0", "di.1", "di.2", "di.3"]
    assert [p.logits.shape[1] for p in predictions] == [12, 12, 10, 10]
    assert len(module(12, 10, 8).layers) == 4


def test_triple_selection_is_double_selection_twice():
    triple = module(12, 10, 8)
    first, second = module(12, 10), module(10, 8)
    shared = {key: value for key, value in triple.state_dict().items() if not key.startswith("layers.")}
    for part, start in ((first, 0), (second, 2)):
        layers = {
            f"layers.{i}.{name}": value
            for i in range(2)
            for name, value in triple.layers[start + i].state_dict().items()
        }
        part.load_state_dict(shared | layers)
    tokens, _ = first(t_s1(), heads())
    expected, _ = second(tokens, heads())
    result, _ = triple(t_s1(), heads())
    torch.testing.assert_close(result.content, expected.content)
    torch.testing.assert_close(result.boxes, expected.boxes)


def predict_with(heads: PredictionHeads):
    features = torch.randn(2, DIM, 16, 16, generator=torch.Generator().manual_seed(4))
    return lambda stage, tokens: heads(stage, tokens.content, tokens.boxes, features)


def test_a_selection_is_evaluated_on_the_tokens_that_it_keeps():
    # The second of three selections is the last of two: the heads see its tokens as they see the queries.
    triple, shared = module(12, 10, 8), heads()
    double = module(12, 10)
    double.load_state_dict({key: value for key, value in triple.state_dict().items() if key in double.state_dict()})
    tokens, _ = double(t_s1(), shared)
    t_s3, predictions = triple(t_s1(), shared, predict_with(shared))
    assert [p.name for p in predictions] == ["di.0", "di.1", "selection.2", "di.2", "di.3", "selection.3"]
    second, third = predictions[2], predictions[5]
    for prediction, kept in ((second, tokens), (third, t_s3)):
        normed = shared.norm(kept.content)
        torch.testing.assert_close(prediction.logits, shared.class_embed(normed))
        torch.testing.assert_close(prediction.boxes, kept.boxes)
        torch.testing.assert_close(prediction.masks.embed, shared.mask_embed(normed))
        assert prediction.masks.dense().shape == (2, kept.content.shape[1], 16, 16)


def test_without_mask_features_the_mask_head_is_not_asked():
    triple, shared = module(12, 10, 8), heads()
    expected, plain = triple(t_s1(), shared)
    evaluated, more = triple(t_s1(), shared, predict_with(shared))
    shared.mask_embed = None
    assert [p.name for p in triple(t_s1(), shared)[1]] == [p.name for p in plain] == ["di.0", "di.1", "di.2", "di.3"]
    assert torch.equal(evaluated.content, expected.content)
    assert torch.equal(evaluated.boxes, expected.boxes)
    kept = [p for p in more if p.name.startswith("di.")]
    assert all(torch.equal(a.logits, b.logits) and a.masks is None for a, b in zip(kept, plain, strict=True))


def test_number_of_layers_is_configurable():
    assert [p.name for p in module(num_layers=3)(t_s1(), heads())[1]] == ["di.0", "di.1", "di.2"]


def test_second_selection_ranks_normed_output_and_passes_raw_output():
    di, shared = module(), heads()
    outputs = []
    di.layers[1].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    t_s2, _ = di(t_s1(), shared)
    index = highest_scores(shared.class_embed(di.norm(outputs[0])), 8)
    torch.testing.assert_close(t_s2.content, take(outputs[0], index))


def test_supervision_norms_and_applies_the_box_head_twice():
    di, shared = module(num_layers=1), heads()
    outputs, tokens = [], t_s1()
    di.layers[0].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    _, (prediction,) = di(tokens, shared)
    normed = di.norm(outputs[0])
    torch.testing.assert_close(prediction.logits, shared.class_embed(shared.norm(normed)))
    refined = (di.box_embed(outputs[0]) + inverse_sigmoid(tokens.boxes)).sigmoid()
    twice = (di.box_embed(normed) + inverse_sigmoid(refined)).sigmoid()
    torch.testing.assert_close(prediction.boxes, twice)


def test_single_delta_boxes_changes_the_supervised_boxes_alone():
    di, single, shared = module(), module(single_delta_boxes=True), heads()
    expected, double_predictions = di(t_s1(), shared)
    result, single_predictions = single(t_s1(), shared)
    assert torch.equal(result.content, expected.content)
    assert torch.equal(result.boxes, expected.boxes)
    for once, twice in zip(single_predictions, double_predictions, strict=True):
        assert torch.equal(once.logits, twice.logits)
        assert not torch.allclose(once.boxes, twice.boxes)


def test_single_delta_boxes_start_from_the_box_before_the_layer():
    di, tokens = module(num_layers=1, single_delta_boxes=True), t_s1()
    outputs = []
    di.layers[0].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    _, (prediction,) = di(tokens, heads())
    expected = (di.box_embed(di.norm(outputs[0])) + inverse_sigmoid(tokens.boxes)).sigmoid()
    torch.testing.assert_close(prediction.boxes, expected)


class Stub(torch.nn.Module):
    """A layer whose output is given."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, content: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return self.output


@pytest.mark.parametrize("which", ["selected", "supervised"])
def test_boxes_have_the_gradient_of_the_last_layer_alone(which):
    di = module()
    stubs = [torch.randn(2, 12, DIM, requires_grad=True) for _ in range(2)]
    di.layers = torch.nn.ModuleList(Stub(stub) for stub in stubs)
    t_s2, predictions = di(t_s1(), heads())
    boxes = {"selected": t_s2, "supervised": predictions[1]}[which].boxes
    first, second = torch.autograd.grad(boxes.sum(), stubs, allow_unused=True)
    assert first is None
    assert second.any()


def test_later_layers_look_at_detached_boxes():
    di = module()
    _, predictions = di(t_s1(), heads())
    # Class logits could depend on the box head through the positions of the next layer alone.
    predictions[1].logits.sum().backward()
    assert all(parameter.grad is None for parameter in di.box_embed.parameters())
    assert di.query_pos.layers[0].weight.grad.any()


def test_runs_in_float32_under_autocast():
    di, shared = module(), heads()
    expected, _ = di(t_s1(), shared)
    with torch.autocast("cpu", torch.bfloat16):
        t_s2, predictions = di(Tokens(t_s1().content, t_s1().boxes), shared)
    assert t_s2.content.dtype == predictions[0].logits.dtype == torch.float32
    torch.testing.assert_close(t_s2.content, expected.content)


def test_images_of_a_batch_do_not_mix():
    di, shared, tokens = module(), heads(), t_s1()
    both, _ = di(tokens, shared)
    alone, _ = di(Tokens(tokens.content[1:], tokens.boxes[1:]), shared)
    torch.testing.assert_close(both.content[1:], alone.content)


def test_fewer_tokens_than_a_selection_keeps_are_all_kept():
    t_s2, predictions = module()(t_s1(5), heads())
    assert t_s2.content.shape == (2, 5, DIM)
    assert predictions[1].logits.shape == (2, 5, 5)


@pytest.mark.parametrize("num_selected", [(12,), (8, 12), (12, 8, 10), (12, 0)])
def test_numbers_that_cannot_be_selected_are_an_error(num_selected):
    with pytest.raises(ConfigError, match=rf"DI.NUM_SELECTED is \[{', '.join(map(str, num_selected))}\]"):
        module(*num_selected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (12, 8)), ({"DI__NUM_SELECTED": [20, 10, 8]}, (20, 10, 8)), ({"FIRST_SELECTED_QUERIES": 9}, (9, 8))],
)
def test_the_configuration_gives_the_numbers(options, expected):
    di = DeImbalance(tiny_cfg(**options))
    assert di.num_selected == expected
    assert len(di.layers) == 2 * (len(expected) - 1)
