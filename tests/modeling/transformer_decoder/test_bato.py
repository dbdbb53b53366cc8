import pytest
import torch
import torch.nn.functional as F

from dimaskdino.modeling.bato import BalanceAwareTokensOptimization
from dimaskdino.modeling.transformer_decoder import PredictionHeads
from dimaskdino.structures import highest_scores, take
from tests.tiny_model import DIM, scramble, tiny_cfg

NUM_GUIDING = 3


def module(generate: bool = True, num_guiding: int = NUM_GUIDING) -> BalanceAwareTokensOptimization:
    torch.manual_seed(0)
    bato = BalanceAwareTokensOptimization(
        dim=DIM, hidden_dim=48, num_heads=4, num_guiding_tokens=num_guiding, generate_guiding_tokens=generate
    )
    return scramble(bato)


@pytest.fixture
def heads() -> PredictionHeads:
    return scramble(PredictionHeads(dim=DIM, num_logits=5, mask_dim=DIM))


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    """T_i, its positions, Q_bal and its positions."""
    return torch.randn(2, 20, DIM), torch.randn(20, DIM), torch.randn(2, 8, DIM), torch.randn(2, 8, DIM)


def test_tokens_keep_their_shape_and_all_change(heads, inputs):
    t_bal = module()(*inputs, heads)
    assert t_bal.shape == inputs[0].shape
    assert ((t_bal - inputs[0]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("generate", [True, False])
def test_one_of_the_best_g_queries_changes_all_tokens_and_another_none(heads, inputs, generate):
    _, _, q_bal, position = inputs
    bato, images = module(generate), torch.arange(2)
    before = bato(*inputs, heads)
    scores = heads.class_embed(q_bal).max(-1).values
    q_bal[images, scores.argmin(1)] += 1e-3 * torch.randn(2, DIM)
    position[images, scores.argmin(1)] += torch.randn(2, DIM)
    assert torch.equal(bato(*inputs, heads), before)
    q_bal[images, scores.argmax(1)] += 1e-2 * torch.randn(2, DIM)
    assert ((bato(*inputs, heads) - before).abs().amax(-1) > 0).all()


def test_keys_are_mask_plus_box_tokens_values_mask_tokens(heads, inputs):
    t_i, token_position, q_bal, position = inputs
    bato = module()
    index = highest_scores(heads.class_embed(q_bal), NUM_GUIDING)
    t_g_mask, t_g_box = heads.mask_embed(take(q_bal, index)), take(position, index)
    expected = bato.attention(t_i, t_i + token_position, t_g_mask + t_g_box, t_g_mask)
    torch.testing.assert_close(bato(*inputs, heads), expected)


def test_without_gtg_the_queries_themselves_are_keys_and_values(heads, inputs):
    t_i, token_position, q_bal, position = inputs
    bato = module(generate=False)
    t_g = take(q_bal, highest_scores(heads.class_embed(q_bal), NUM_GUIDING))
    torch.testing.assert_close(bato(*inputs, heads), bato.attention(t_i, t_i + token_position, t_g, t_g))
    other = bato(t_i, token_position, q_bal, position + 1, heads)
    assert torch.equal(other, bato(*inputs, heads))


def test_token_positions_enter_the_queries_of_the_attention_alone(heads, inputs):
    t_i, token_position, q_bal, position = inputs
    bato = module(num_guiding=1)
    # With one guiding token the attention weights are 1 whatever the query is, so positions cannot matter.
    expected = bato(*inputs, heads)
    torch.testing.assert_close(bato(t_i, token_position + 1, q_bal, position, heads), expected)
    several = module()
    moved = several(t_i, token_position + torch.randn(20, DIM), q_bal, position, heads)
    assert not torch.allclose(several(*inputs, heads), moved)


def test_fewer_queries_than_guiding_tokens_all_guide(heads, inputs):
    assert module(num_guiding=50)(*inputs, heads).shape == (2, 20, DIM)


def test_images_of_a_batch_do_not_mix(heads, inputs):
    t_i, token_position, q_bal, position = inputs
    bato = module()
    alone = bato(t_i[1:], token_position, q_bal[1:], position[1:], heads)
    torch.testing.assert_close(bato(*inputs, heads)[1:], alone)


def test_runs_in_float32_under_autocast(heads, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        assert module()(*inputs, heads).dtype == torch.float32


def test_mask_features_are_renewed_from_the_upsampled_finest_level():
    bato = module()
    mask_features, finest = torch.randn(2, DIM, 8, 12), torch.randn(2, DIM, 4, 6)
    upsampled = F.interpolate(finest, scale_factor=2, mode="bilinear", align_corners=False)
    conv = F.conv2d(mask_features + upsampled, bato.mask_conv.weight, padding=1)
    expected = F.group_norm(conv, 32, bato.mask_conv.norm.weight, bato.mask_conv.norm.bias).relu()
    torch.testing.assert_close(bato.renew_mask_features(mask_features, finest), expected)


def test_the_configuration_gives_the_number_of_guiding_tokens_and_gtg():
    bato = BalanceAwareTokensOptimization(tiny_cfg(NUM_GUIDING_TOKENS=7, BATO__GTG=False))
    assert bato.num_guiding_tokens == 7
    assert not bato.generate_guiding_tokens


def test_papers_form_has_the_mlp_sum_as_key_and_value():
    """Eqs. 5 to 8 by hand: weights that make the two MLPs twice and three times a positive query."""
    bato = BalanceAwareTokensOptimization(tiny_cfg(NUM_GUIDING_TOKENS=2, BATO__PAPER_FORM=True))
    for mlp, factor in ((bato.mask_guide, 2.0), (bato.box_guide, 3.0)):
        for layer in mlp.layers:
            layer.weight.data = torch.eye(DIM)
            layer.bias.data.zero_()
        mlp.layers[-1].weight.data *= factor
    given = {}
    bato.attention.forward = lambda content, query, key, value: given.update(key=key, value=value) or content
    heads = PredictionHeads(dim=DIM, num_logits=1, mask_dim=DIM)
    heads.class_embed.weight.data.fill_(1)
    q_bal = torch.tensor([0.1, 0.3, 0.2]).view(1, 3, 1).expand(1, 3, DIM)  # the second and third score highest
    t_i = torch.zeros(1, 4, DIM)
    assert torch.equal(bato(t_i, t_i[0], q_bal, torch.full_like(q_bal, 9.0), heads), t_i)
    assert given["value"] is given["key"]
    assert given["key"].shape == (1, 2, DIM)
    torch.testing.assert_close(given["key"][0, :, 0].sort().values, torch.tensor([1.0, 1.5]))


def test_papers_form_leaves_the_mask_head_alone(heads, inputs):
    bato = BalanceAwareTokensOptimization(tiny_cfg(BATO__PAPER_FORM=True))
    bato(*inputs, heads).square().sum().backward()
    assert all(
        parameter.grad.abs().sum() > 0 for parameter in (*bato.mask_guide.parameters(), *bato.box_guide.parameters())
    )
    assert all(parameter.grad is None for parameter in heads.mask_embed.parameters())


def test_the_released_form_has_no_weights_of_the_papers():
    assert not [name for name in BalanceAwareTokensOptimization(tiny_cfg()).state_dict() if "guide" in name]
