import pytest
import torch
from torch import nn

from dimaskdino.layers import MLP, FeedForward, MultiheadAttention
from dimaskdino.layers.attention import xavier_init


@pytest.mark.parametrize(
    ("num_layers", "widths"), [(1, [(3, 5)]), (2, [(3, 7), (7, 5)]), (3, [(3, 7), (7, 7), (7, 5)])]
)
def test_mlp_has_the_widths_asked_for(num_layers, widths):
    mlp = MLP(3, 7, 5, num_layers)
    assert [(layer.in_features, layer.out_features) for layer in mlp.layers] == widths
    assert mlp(torch.randn(2, 4, 3)).shape == (2, 4, 5)


def test_mlp_has_relu_between_layers_but_not_after_the_last():
    mlp = MLP(1, 1, 1, 2)
    with torch.no_grad():
        for layer, weight in zip(mlp.layers, (1.0, -1.0), strict=True):
            layer.weight.fill_(weight)
            layer.bias.fill_(0.0)
    assert mlp(torch.tensor([[2.0], [-3.0]])).tolist() == [[-2.0], [0.0]]


def test_attention_is_batch_first_and_returns_one_tensor():
    attention = MultiheadAttention(8, 2)
    output = attention(torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.randn(3, 7, 8))
    assert output.shape == (3, 5, 8)


def test_attention_agrees_with_torch_in_its_own_layout():
    ours, theirs = MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.randn(3, 7, 8)
    expected, _ = theirs(*(x.transpose(0, 1) for x in (query, key, value)))
    torch.testing.assert_close(ours(query, key, value), expected.transpose(0, 1))


def test_attention_mask_hides_where_it_is_true():
    attention = MultiheadAttention(8, 2)
    query, tokens = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    before = attention(query, tokens, tokens, mask)
    tokens = tokens.clone()
    tokens[:, 2] += 1
    after = attention(query, tokens, tokens, mask)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    assert not torch.allclose(after[:, 1], before[:, 1])


class Block(FeedForward):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.add_feed_forward(4, 6, dropout)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.feed_forward(x, self.norm)


def test_feed_forward_is_post_norm_with_a_residual():
    block, x = Block(0.0), torch.randn(2, 3, 4)
    expected = block.norm(x + block.linear2(block.linear1(x).relu()))
    torch.testing.assert_close(block(x), expected)


def test_feed_forward_drops_the_hidden_values_and_the_output():
    block, x, seen = Block(0.5), torch.randn(2, 3, 4), []
    drop = block.drop
    block.drop = lambda values: seen.append(values.shape[-1]) or drop(values)
    block(x)
    assert seen == [6, 4]


def test_feed_forward_drops_in_training_alone():
    block, x = Block(0.5), torch.randn(2, 3, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)


def test_xavier_init_bounds_matrices_and_leaves_vectors():
    layer = nn.Linear(20, 10)
    bias = layer.bias.clone()
    nn.init.constant_(layer.weight, 9.0)
    xavier_init(layer)
    bound = (6 / 30) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > bound / 2
    assert torch.equal(layer.bias, bias)
