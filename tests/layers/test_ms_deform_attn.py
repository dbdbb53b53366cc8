import math
import os
import runpy
import subprocess
import sys

import pytest
import torch

from dimaskdino.layers import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_ops
from dimaskdino.layers.ms_deform_attn_reference import ms_deform_attn_gather

SHAPES = [(3, 4), (2, 1)]

BROKEN_OP = """
import logging, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "dimaskdino._C":
            raise ImportError("undefined symbol: made up")
sys.meta_path.insert(0, Broken())
import torch
logging.basicConfig()
from dimaskdino.layers import ms_deform_attn
one, center = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1, 1, 2), 0.5)
assert ms_deform_attn(one, [(1, 1)], center, one[None]).item() == 1
"""
TOKENS = 14


def inputs(batch=2, queries=3, heads=2, points=2, channels=3, dtype=torch.float64):
    """Value, locations that reach beyond the borders, and weights."""
    value = torch.randn(batch, TOKENS, heads, channels, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, dtype=dtype)
    return value, locations, weights


def bilinear(level: list, x: float, y: float):
    """Sample rows of pixels at pixel coordinates; pixels outside count as zero."""
    height, width = len(level), len(level[0])
    total = torch.zeros_like(level[0][0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total = total + (1 - abs(y - row)) * (1 - abs(x - column)) * level[row][column]
    return total


def slow_attention(value, shapes, locations, weights):
    """The definition as loops."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                start = 0
                for level in range(levels):
                    height, width = shapes[level]
                    tokens = value[b, start : start + height * width, h]
                    rows = [[tokens[r * width + c] for c in range(width)] for r in range(height)]
                    start += height * width
                    for p in range(points):
                        x, y = locations[b, q, h, level, p].tolist()
                        sampled = bilinear(rows, x * width - 0.5, y * height - 0.5)
                        output[b, q, h] += weights[b, q, h, level, p] * sampled
    return output.flatten(2)


@pytest.mark.parametrize("form", [ms_deform_attn, ms_deform_attn_gather])
def test_agrees_with_a_loop_over_everything(form):
    value, locations, weights = inputs()
    torch.testing.assert_close(
        form(value, SHAPES, locations, weights), slow_attention(value, SHAPES, locations, weights)
    )


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 1.0), (0.0, 0.5), (-0.125, 0.5), (1.125, 1.0), (5.0, -5.0)])
@pytest.mark.parametrize("form", [ms_deform_attn, ms_deform_attn_gather])
def test_agrees_with_the_loop_on_and_over_the_borders(form, place):
    value, locations, weights = inputs(batch=1, queries=1)
    locations = torch.tensor(place, dtype=torch.float64).expand_as(locations)
    torch.testing.assert_close(
        form(value, SHAPES, locations, weights), slow_attention(value, SHAPES, locations, weights)
    )


def test_pixel_centers_give_the_tokens_by_hand():
    # One level of 1 x 2 pixels, one head: half of the left token, a quarter of the right one.
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    locations = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).view(1, 1, 1, 1, 2, 2)
    weights = torch.tensor([0.5, 0.25]).view(1, 1, 1, 1, 2)
    assert ms_deform_attn(value, [(1, 2)], locations, weights).item() == 10.0


def test_gradients_are_those_of_finite_differences():
    value, locations, weights = (x.requires_grad_() for x in inputs(batch=1, queries=2, points=1, channels=2))
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, SHAPES, x, w), (value, locations, weights))


def test_heads_and_batch_elements_do_not_mix():
    value, locations, weights = inputs()
    before = ms_deform_attn(value, SHAPES, locations, weights)
    value[0, :, 1] += 1
    after = ms_deform_attn(value, SHAPES, locations, weights)
    changed = (before != after).view(2, 3, 2, 3).any(-1)
    assert not changed[1].any()
    assert not changed[0, :, 0].any()
    assert changed[0, :, 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_has_the_dtype_of_the_value_and_is_contiguous(dtype):
    value, locations, weights = inputs(dtype=dtype)
    output = ms_deform_attn(value, SHAPES, locations, weights)
    assert output.dtype == dtype
    assert output.shape == (2, 3, 6)
    assert output.is_contiguous()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), r"value \(B, S, H, D\)"),
        (lambda v, s, x, w: (v, s, x[..., 0], w), r"sampling_locations \(B, Q, H, L, P, 2\)"),
        (lambda v, s, x, w: (v, s, x, w[0]), r"attention_weights \(B, Q, H, L, P\)"),
        (lambda v, s, x, w: (v, s, x[..., :1], w), "last dimension of 2"),
        (lambda v, s, x, w: (v, s, x, w[..., :1]), r"attention_weights must be \(2, 3, 2, 2, 2\)"),
        (lambda v, s, x, w: (v, s, x[:1], w[:1]), r"attention_weights must be \(2, 3, 2, 2, 2\)"),
        (lambda v, s, x, w: (v[:, :, :1], s, x, w), r"attention_weights must be \(2, 3, 1, 2, 2\)"),
        (lambda v, s, x, w: (v, s[:1], x, w), "1 levels"),
        (lambda v, s, x, w: (v, [(3, 4), (2, 2)], x, w), "hold 16 tokens, but value has 14"),
    ],
    ids=["value", "locations", "weights", "pairs", "points", "batch", "heads", "levels", "tokens"],
)
def test_shapes_that_do_not_belong_together_are_an_error(spoil, message):
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*spoil(value, SHAPES, locations, weights))


def test_tensors_on_two_devices_are_an_error():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="attention_weights is on meta, but value is on cpu"):
        ms_deform_attn(value, SHAPES, locations, weights.to("meta"))


def test_whole_numbers_are_an_error():
    value, locations, weights = inputs()
    with pytest.raises(TypeError, match="sampling_locations must be of a floating dtype, got torch.int64"):
        ms_deform_attn(value, SHAPES, locations.long(), weights)


def test_sizes_that_are_floats_are_an_error():
    value, locations, weights = inputs()
    with pytest.raises(TypeError, match=r"levels \[\(3.0, 4.0\), \(2, 1\)\] must be whole numbers"):
        ms_deform_attn(value, [(3.0, 4.0), (2, 1)], locations, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_pytorch_gives_the_dtype_of_autocast(dtype, monkeypatch):
    value, locations, weights = (x.float() for x in inputs())
    with torch.autocast("cpu", dtype):
        there = ms_deform_attn(value, SHAPES, locations, weights).dtype
        monkeypatch.setattr(ms_deform_attn_ops, "COMPILED", False)
        monkeypatch.setattr(ms_deform_attn_ops, "WANTED", "reference")
        assert ms_deform_attn(value, SHAPES, locations, weights).dtype == there == dtype
        assert ms_deform_attn(value.double(), SHAPES, locations, weights).dtype == torch.float64


@pytest.mark.skipif(ms_deform_attn_ops.MISSING is not None, reason="the compiled op is not there")
def test_op_built_from_older_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(ms_deform_attn_ops, "_OPS", (*ms_deform_attn_ops._OPS, "op_of_tomorrow"))
    assert ms_deform_attn_ops._load() == "the compiled op was built from older sources"


@pytest.mark.skipif(not ms_deform_attn_ops.COMPILED, reason="the compiled op is not in use")
def test_a_source_that_changed_after_the_build_is_told(tmp_path, monkeypatch, caplog):
    kernels, header = tmp_path / "csrc" / "cpu" / "kernels.cpp", tmp_path / "csrc" / "op.h"
    kernels.parent.mkdir(parents=True)
    for path in (kernels, header):
        path.touch()
        os.utime(path, (0, 0))
    monkeypatch.setattr(ms_deform_attn_ops, "__file__", str(tmp_path / "ms_deform_attn_ops.py"))
    ms_deform_attn_ops._tell("cpu", True)
    assert "changed after" not in caplog.text
    kernels.touch()
    ms_deform_attn_ops._tell("cpu", True)
    assert f"{kernels} changed after the compiled op was built; build it with" in caplog.text


def test_a_negative_size_is_an_error():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="negative"):
        ms_deform_attn(value, [(-3, -4), (2, 1)], locations, weights)


def test_references_must_be_points_or_boxes_of_the_queries():
    value, offsets, logits = inputs()
    for shape in ((2, 3, 3), (2, 4, 2), (2, 2)):
        with pytest.raises(ValueError, match=r"reference must be \(B, Q, 2\) or \(B, Q, 4\)"):
            ms_deform_attn_fused(value, SHAPES, torch.rand(shape, dtype=torch.float64), offsets, logits)


def test_a_new_process_logs_once_that_plain_pytorch_is_forced():
    code = (
        "import logging, torch; logging.basicConfig(level='INFO')\n"
        "from dimaskdino.layers import ms_deform_attn\n"
        "for _ in range(2): ms_deform_attn(torch.rand(1, 1, 1, 1), [(1, 1)], torch.rand(1, 1, 1, 1, 1, 2), "
        "torch.rand(1, 1, 1, 1, 1))"
    )
    environment = os.environ | {"DIMASKDINO_MSDA": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("Deformable attention on cpu: plain PyTorch, as DIMASKDINO_MSDA asks") == 1


@pytest.mark.parametrize(
    ("wanted", "missing", "message"),
    [
        ("fast", None, "DIMASKDINO_MSDA is 'fast'.*reference, compiled"),
        ("compiled", "dimaskdino._C", "DIMASKDINO_MSDA is compiled, but .*pip install"),
    ],
)
def test_form_that_cannot_be_had_is_refused(wanted, missing, message, monkeypatch):
    monkeypatch.setenv("DIMASKDINO_MSDA", wanted)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)  # importing it fails
    with pytest.raises((ValueError, ImportError), match=message):
        runpy.run_path(ms_deform_attn_ops.__file__)


@pytest.mark.skipif(not ms_deform_attn_ops.COMPILED, reason="the compiled op is not in use")
def test_compiled_form_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(ms_deform_attn_ops, "_told", set())
    monkeypatch.setattr(ms_deform_attn_ops, "WANTED", "compiled")
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert ms_deform_attn_ops.use_compiled(torch.device("cpu"))
    assert caplog.text.count("Deformable attention on cpu: the compiled op") == 1


def test_without_the_op_plain_pytorch_says_how_to_build_it():
    # A module of that name that cannot be loaded stands for one built for another torch.
    environment = {name: text for name, text in os.environ.items() if name != "DIMASKDINO_MSDA"}
    result = subprocess.run(
        [sys.executable, "-c", BROKEN_OP], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (
        "plain PyTorch, many times slower, as the compiled op could not be loaded (undefined symbol: made up)"
        in result.stderr
    )
    assert "pip install --no-build-isolation -e ." in result.stderr


@pytest.mark.skipif(not ms_deform_attn_ops.COMPILED, reason="the compiled op is not in use")
def test_device_without_kernels_falls_back_unless_compiled_is_forced(monkeypatch, caplog):
    device = torch.device("xpu")
    assert not ms_deform_attn_ops.use_compiled(device)
    assert "plain PyTorch, many times slower, as the op was built without kernels for xpu" in caplog.text
    monkeypatch.setattr(ms_deform_attn_ops, "WANTED", "compiled")
    with pytest.raises(RuntimeError, match="built without kernels for xpu"):
        ms_deform_attn_ops.use_compiled(device)


def module(**options) -> MSDeformAttn:
    return MSDeformAttn(**{"dim": 8, "num_levels": 2, "num_heads": 4, "num_points": 3, **options})


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="8 is not divisible by 3 heads"):
        module(num_heads=3)


def test_fresh_heads_look_in_evenly_spread_directions():
    offsets = module().sampling_offsets.bias.view(4, 2, 3, 2)
    right, down = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for head, direction in enumerate((right, down, -right, -down)):
        for level in range(2):
            for point in range(3):
                torch.testing.assert_close(offsets[head, level, point], direction * (point + 1), rtol=0, atol=1e-6)


def test_diagonal_directions_reach_the_corner_of_the_square():
    offsets = module(num_heads=8).sampling_offsets.bias.view(8, 2, 3, 2)
    torch.testing.assert_close(offsets[1, 0, 0], torch.tensor([1.0, 1.0]))


def test_fresh_attention_weighs_alike_for_any_query():
    attention = module()
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    assert not attention.attention_weights.bias.any()
    assert not attention.value_proj.bias.any()
    assert not attention.output_proj.bias.any()


def identity(attention: MSDeformAttn) -> MSDeformAttn:
    """Value and output projections that change nothing."""
    with torch.no_grad():
        for layer in (attention.value_proj, attention.output_proj):
            layer.weight.copy_(torch.eye(8))
    return attention


def by_hand(tokens, centers):
    """What the fresh module gives when the samples lie at ``centers``: (head, level, point) to (x, y)."""
    locations = torch.tensor(
        [[[centers(head, level, point) for point in range(3)] for level in range(2)] for head in range(4)]
    )
    weights = torch.full((1, 1, 4, 2, 3), 1 / 6)
    return ms_deform_attn(tokens.view(1, TOKENS, 4, 2), SHAPES, locations[None, None], weights)


# Of a fresh module with four heads.
DIRECTIONS = [(1, 0), (0, 1), (-1, 0), (0, -1)]


def test_point_references_take_offsets_in_pixels_of_each_level():
    tokens, (x, y) = torch.randn(1, TOKENS, 8), (0.5, 0.25)
    output = identity(module())(torch.randn(1, 1, 8), torch.tensor([[[x, y]]]), tokens, SHAPES)

    def center(head, level, point):
        (height, width), (right, down) = SHAPES[level], DIRECTIONS[head]
        return x + right * (point + 1) / width, y + down * (point + 1) / height

    torch.testing.assert_close(output, by_hand(tokens, center))


def test_box_references_scale_offsets_by_half_the_box():
    tokens, (x, y, w, h) = torch.randn(1, TOKENS, 8), (0.5, 0.25, 0.2, 0.4)
    output = identity(module())(torch.randn(1, 1, 8), torch.tensor([[[x, y, w, h]]]), tokens, SHAPES)

    def center(head, level, point):
        right, down = DIRECTIONS[head]
        return x + right * (point + 1) / 3 * w / 2, y + down * (point + 1) / 3 * h / 2

    torch.testing.assert_close(output, by_hand(tokens, center))


def test_offsets_and_weights_come_from_the_query():
    attention, tokens = identity(module()), torch.randn(1, TOKENS, 8)
    reference = torch.tensor([[[0.5, 0.5, 0.3, 0.3]]])
    query = torch.randn(1, 1, 8)
    fresh = attention(query, reference, tokens, SHAPES)
    torch.testing.assert_close(attention(2 * query, reference, tokens, SHAPES), fresh)
    for layer in (attention.sampling_offsets, attention.attention_weights):
        before = attention(query, reference, tokens, SHAPES)
        torch.nn.init.normal_(layer.weight)
        assert not torch.allclose(attention(query, reference, tokens, SHAPES), before)


def test_constant_tokens_come_back_where_all_samples_are_inside():
    tokens = torch.randn(8).expand(2, TOKENS, 8)
    flat_box = torch.tensor([0.5, 0.5, 0.1, 0.0]).expand(2, 5, 4)
    output = identity(module())(torch.randn(2, 5, 8), flat_box, tokens, [(3, 4), (1, 2)])
    torch.testing.assert_close(output, tokens[:, :5])
