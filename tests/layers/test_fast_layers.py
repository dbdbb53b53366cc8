"""Layers in their forms: same results, same gradients, same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from dimaskdino.layers import fast_layers, winograd
from dimaskdino.layers.attention import relu
from dimaskdino.layers.fast_layers import FastConv2d, FastLinear, use_fast_layers
from tests.tiny_model import tiny_model


def frozen_norm(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    for name, value in (("weight", 1.5), ("bias", -0.3), ("running_mean", 0.2)):
        getattr(norm, name).copy_(torch.randn(channels) * 0.1 + value)
    norm.running_var.copy_(torch.rand(channels) + 0.5)
    return norm


def conv(*args: int, **options) -> Conv2d:
    torch.manual_seed(0)
    return Conv2d(*args, **options, norm=frozen_norm(args[1]), activation=F.relu).eval()


def in_form(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    use_fast_layers(module)
    return module


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2}])
def test_a_frozen_norm_is_folded(options):
    plain = conv(6, 8, 3, **options)
    x = torch.randn(2, 6, 11, 9)
    with torch.no_grad():
        expected, found = plain(x), in_form(plain)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_norms_stay():
    plain = Conv2d(4, 32, 1, bias=False, norm=nn.GroupNorm(32, 32)).eval()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(in_form(plain)(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(13, 9), (8, 8), (1, 1), (3, 21)])
@pytest.mark.parametrize("strip_bytes", [1, 2**25])
def test_winograd_convolves(size, strip_bytes, monkeypatch):
    monkeypatch.setattr(winograd, "_STRIP_BYTES", strip_bytes)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, *size), torch.randn(7, 5, 3, 3), torch.randn(7)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).float()
    found = winograd.conv3x3(x, winograd.transform_weight(weight), bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    without = winograd.conv3x3(x, winograd.transform_weight(weight), None)
    torch.testing.assert_close(without, expected - bias[:, None, None], rtol=1e-4, atol=1e-4)


def test_winograd_takes_as_many_rows_of_tiles_as_fit(monkeypatch):
    # Two images, 3 tiles of 6 x 6 numbers of 4 bytes in a row of 9 pixels, 5 channels: 4,320 bytes a row of tiles.
    monkeypatch.setattr(winograd, "_STRIP_BYTES", 3 * 4320)
    assert list(winograd._strips(torch.zeros(2, 5, 13, 9))) == [(0, 3, 3), (12, 1, 3)]


def test_wide_convolutions_use_winograd_and_stay_near():
    plain = conv(128, 128, 3, padding=1)
    x = torch.randn(1, 128, 10, 14)
    short = in_form(plain)
    with torch.no_grad():
        expected, found = plain(x), short(x)
    assert short._prepared.weight.shape == (36, 128, 128)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_changed_weights_are_noticed():
    plain = conv(4, 4, 1)
    short, x = in_form(plain), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        short(x)
        for module in (plain, short):
            module.weight.mul_(2)
            module.norm.bias.add_(1)
        torch.testing.assert_close(short(x), plain(x), rtol=1e-5, atol=1e-5)


CONVOLUTIONS = {
    "1x1": ((6, 8, 1), {}),
    "1x1, stride 2": ((6, 8, 1), {"stride": 2, "bias": False}),
    "3x3": ((6, 8, 3), {"padding": 1, "bias": False}),
    "groups": ((6, 8, 3), {"groups": 2}),
    "winograd": ((128, 130, 3), {"padding": 1, "bias": False}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_convolutions_are_those_of_the_plain_form(name, monkeypatch):
    arguments, options = CONVOLUTIONS[name]
    as_linear, of_linear = [], fast_layers._linear_gradients
    monkeypatch.setattr(
        fast_layers, "_linear_gradients", lambda *given, **wanted: as_linear.append(1) or of_linear(*given, **wanted)
    )
    plain = conv(*arguments, **options).train()
    short = in_form(plain)
    x, factors = torch.randn(2, arguments[0], 9, 6), torch.rand(arguments[1], 1, 1)
    found, expected = ([], [])
    for module, results in ((short, found), (plain, expected)):
        leaf = x.clone().requires_grad_()
        result = module(leaf)
        (result * factors).sum().backward()
        results += [result, leaf.grad, *(weight.grad for weight in module.parameters())]
    assert len(found) == 3 + options.get("bias", True)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 3e-5 * other.abs().max()
    assert bool(as_linear) == (name == "1x1")


def test_frozen_weights_get_no_gradient():
    short, x = in_form(nn.Sequential(conv(4, 4, 1), nn.ReLU(), nn.Linear(3, 2))), torch.randn(1, 4, 3, 3)
    for layer in (short[0], short[2]):
        layer.weight.requires_grad_(False)
    short(x).sum().backward()
    assert short[0].weight.grad is short[2].weight.grad is None
    assert short[2].bias.grad.tolist() == [12.0, 12.0]  # 4 channels of 3 rows


def test_weights_of_evaluation_go_when_training_begins():
    short, x = in_form(conv(4, 4, 1)), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        short(x)
    assert short._prepared is not None
    assert short.train()._prepared is None


def test_names_and_weights_stay():
    model = nn.Sequential(conv(4, 4, 1), nn.Linear(4, 2), nn.MultiheadAttention(4, 2))
    short = in_form(model)
    assert isinstance(short[0], FastConv2d)
    assert isinstance(short[1], FastLinear)
    with torch.no_grad():
        short[0](torch.randn(1, 4, 3, 3))
    assert list(short.state_dict()) == list(model.state_dict())
    torch.save(short, "/dev/null")


@pytest.mark.parametrize("least", [0, 10**8])
def test_linear_maps_are_the_same_by_onednn_and_by_torch(monkeypatch, least):
    monkeypatch.setattr(fast_layers, "_WORTHWHILE", least)
    ran = []
    monkeypatch.setattr(fast_layers, "_map", lambda *args, of=fast_layers._map: ran.append(1) or of(*args))
    plain = nn.Linear(6, 5).eval()
    short = in_form(plain)
    for shape in ((6,), (3, 6), (2, 0, 6), (2, 3, 4, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(short(x), plain(x), rtol=1e-5, atol=1e-6)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        factors = torch.randn(5)
        for module, leaf in zip((plain, short), leaves, strict=True):
            module.zero_grad()
            (module(leaf) * factors).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)
        for one, other in zip(plain.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert bool(ran) == (least == 0 and fast_layers._ONEDNN)


def test_layers_of_a_model_have_their_forms():
    model = tiny_model()
    model.train()
    assert {FastConv2d, FastLinear} <= {type(module) for module in model.modules()}
    assert not {Conv2d, nn.Linear} & {type(module) for module in model.modules()}


def test_relu_is_in_place_without_gradients_alone():
    x = torch.tensor([-1.0, 2.0])
    assert relu(x) is x
    leaf = torch.tensor([-1.0, 2.0], requires_grad=True)
    assert relu(leaf * 1).tolist() == x.tolist() == [0.0, 2.0]
    assert leaf.tolist() == [-1.0, 2.0]
