"""The CUDA kernels' own source, run on the CPU (tests/layers/cuda_emulation) and compared with the reference form."""

import math
import os
import random
import shutil

import pytest
import torch

from benchmarks import classical
from dimaskdino.layers.ms_deform_attn_reference import ms_deform_attn_fused_reference, ms_deform_attn_reference
from tests.layers.cuda_emulation import Kernels, build
from tests.layers.ms_deform_attn_case import DTYPES, Case, assert_close, expected

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is compiled by g++")


def build_for(architecture, folder):
    flags = os.environ.get("EMULATION_FLAGS", "-Og").split()  # sanitizers, say
    return build(folder, COMPILER, [*flags, f"-D__CUDA_ARCH__={architecture}"], extra=[classical.SOURCE])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_for(900, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def without_wide_atomics(tmp_path_factory):
    return Kernels(build_for(800, tmp_path_factory.mktemp("emulated_8_0")))


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


def check_locations_form(kernels, case, exact=False):
    output, *grads = expected(ms_deform_attn_reference, case.grad, *case.args)
    assert_close(kernels.forward(*case.args), output)
    # Locations are multiplied by the size of the level before the dot products: a few more roundings.
    for got, wanted in zip(kernels.backward(case.grad, *case.args, exact=exact), grads, strict=True):
        assert_close(got, wanted, factor=4)


def check_fused_form(kernels, case, exact=False):
    output, *grads = expected(ms_deform_attn_fused_reference, case.grad, *case.fused_args)
    assert_close(kernels.forward_fused(*case.fused_args), output)
    for got, wanted in zip(kernels.backward_fused(case.grad, *case.fused_args, exact=exact), grads, strict=True):
        assert_close(got, wanted, factor=8)


# Every specialization, and what none is made for: (D, levels, P).
SPECIALIZED = [(16, 4, 4), (32, 3, 4), (32, 4, 4), (32, 5, 4), (32, 2, 3), (64, 4, 4), (64, 1, 5), (128, 2, 4)]
GENERAL = [(1, 1, 1), (2, 2, 2), (3, 6, 8), (8, 4, 4), (17, 3, 4), (24, 5, 2), (31, 1, 7), (48, 2, 6), (96, 1, 3)]
SHAPES = [(7, 9), (4, 5), (1, 3), (2, 1), (1, 1), (3, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "levels", "points"), SPECIALIZED + GENERAL)
def test_both_forms_match_the_reference_form(kernels, dtype, channels, levels, points):
    for low, reference_size in ((False, 2), (True, 4)):
        case = Case(
            dtype=dtype,
            channels=channels,
            shapes=SHAPES[:levels],
            points=points,
            queries=5,
            low=low,
            reference_size=reference_size,
        )
        check_fused_form(kernels, case)
    check_locations_form(kernels, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 128])
def test_single_atomic_additions_match_the_reference_form(without_wide_atomics, dtype, channels):
    case = Case(dtype=dtype, channels=channels, shapes=SHAPES[:4], points=4, queries=5)
    check_locations_form(without_wide_atomics, case)
    check_fused_form(without_wide_atomics, case)


def test_random_sizes_match_the_reference_form(kernels):
    choose = random.Random(3)
    for seed in range(40):
        case = Case(
            dtype=choose.choice(DTYPES),
            channels=choose.choice([4, 8, 16, 32, 64, choose.randint(1, 128)]),
            shapes=[(choose.randint(1, 8), choose.randint(1, 8)) for _ in range(choose.randint(1, 6))],
            points=choose.randint(1, 8),
            queries=choose.randint(1, 9),
            batch=choose.randint(1, 3),
            heads=choose.randint(1, 5),
            reference_size=choose.choice([2, 4]),
            low=choose.random() < 0.5,
            seed=seed,
        )
        check_locations_form(kernels, case, exact=choose.random() < 0.5)
        check_fused_form(kernels, case, exact=choose.random() < 0.5)


@pytest.mark.parametrize("channels", [32, 6])
def test_many_queries_fill_several_blocks(kernels, channels):
    case = Case(
        dtype=torch.float32, channels=channels, shapes=[(8, 8), (4, 4)], points=4, queries=131, heads=2, batch=1
    )
    check_locations_form(kernels, case)
    check_fused_form(kernels, case)


@pytest.mark.parametrize(("threads", "heads_per_block"), [(32, 1), (64, 2), (128, 4), (96, 1), (128, 8)])
def test_every_schedule_gives_the_same(library, threads, heads_per_block):
    kernels = Kernels(library, threads=threads, heads_per_block=heads_per_block)
    case = Case(dtype=torch.float32, channels=32, shapes=[(5, 6)], points=4, queries=11, heads=3)
    if threads == 128 and heads_per_block == 8:
        case = Case(dtype=torch.bfloat16, channels=32, shapes=[(5, 6)], points=4, queries=11, heads=9)
    check_locations_form(kernels, case)
    check_fused_form(kernels, case)


@pytest.mark.parametrize(("threads", "heads_per_block"), [(48, 1), (2048, 1), (64, 3), (32, 64)])
def test_an_impossible_schedule_is_refused(library, threads, heads_per_block):
    kernels = Kernels(library, threads=threads, heads_per_block=heads_per_block)
    case = Case(dtype=torch.float32, channels=32, shapes=[(5, 6)], points=4, queries=2)
    with pytest.raises(ValueError, match="CUDA error"):
        kernels.forward(*case.args)


def test_more_levels_than_the_arguments_hold_are_refused(kernels):
    case = Case(dtype=torch.float32, channels=8, shapes=[(1, 1)] * 17, points=1, queries=2)
    with pytest.raises(ValueError, match="CUDA error"):
        kernels.forward(*case.args)


def test_many_levels_and_points(kernels):
    case = Case(dtype=torch.float32, channels=8, shapes=[(2, 3)] * 16, points=13, queries=2, batch=1)
    check_locations_form(kernels, case)
    check_fused_form(kernels, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_locations_on_pixel_centers_and_borders(kernels, dtype):
    case = Case(dtype=dtype, channels=16, shapes=[(8, 4)], points=2, queries=80, batch=1, heads=1)
    steps = torch.arange(-2, 11, dtype=case.acc)  # the border at 0 and 1, half a pixel, and pixel centers
    places = torch.cartesian_prod((steps / 2) / 4, (steps / 2) / 8)[:160]
    case.locations = places.view(1, 80, 1, 1, 2, 2).contiguous()
    check_locations_form(kernels, case)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("channels", [32, 5])
def test_locations_that_are_not_finite_or_far_away_sample_nothing(kernels, channels, exact):
    case = Case(dtype=torch.float32, channels=channels, shapes=[(4, 5), (2, 2)], points=2, queries=4, batch=1, heads=1)
    for i, bad in enumerate([math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38]):
        case.locations.view(-1, 2)[i, i % 2] = bad
    check_locations_form(kernels, case, exact=exact)
    grads = kernels.backward(case.grad, *case.args, exact=exact)
    assert grads[1].view(-1, 2)[:6].eq(0).all()
    assert grads[2].view(-1)[:6].eq(0).all()


@pytest.mark.parametrize("channels", [32, 5])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_tokens_outside_a_sample_are_never_read(kernels, channels, poison):
    shapes = [(3, 3), (4, 4), (2, 5)]
    case = Case(dtype=torch.float32, channels=channels, shapes=shapes, points=3, queries=6)
    case.locations[:, :, :, [0, 2]] = -5.0
    case.locations[:, :, :, 1] = torch.where(torch.rand_like(case.locations[:, :, :, 1]) < 0.5, -0.01, 1.01)
    output, *grads = expected(ms_deform_attn_reference, case.grad, *case.args)
    case.value[:, :9] = poison
    case.value[:, 25:] = poison
    inner = [9 + row * 4 + column for row in (1, 2) for column in (1, 2)]
    case.value[:, inner] = poison
    assert_close(kernels.forward(*case.args), output)
    for got, wanted in zip(kernels.backward(case.grad, *case.args), grads, strict=True):
        assert_close(got, wanted, factor=4)


def test_levels_without_tokens_give_nothing(kernels):
    shapes = [(0, 4), (3, 3), (2, 0), (0, 0)]
    case = Case(dtype=torch.float32, channels=32, shapes=shapes, points=2, queries=3)
    check_locations_form(kernels, case)
    output, *grads = expected(ms_deform_attn_fused_reference, case.grad, *case.fused_args)
    assert_close(kernels.forward_fused(*case.fused_args), output)
    assert_close(kernels.backward_fused(case.grad, *case.fused_args)[0], grads[0], factor=4)


def test_logits_of_any_size_and_masked_ones(kernels):
    case = Case(dtype=torch.float32, channels=32, shapes=[(4, 4), (3, 3)], points=4, queries=6)
    case.logits *= 100
    case.logits[..., 1, :] = -math.inf
    check_fused_form(kernels, case)


def test_the_gradient_of_the_reference_can_be_left_out(kernels):
    case = Case(dtype=torch.float32, channels=32, shapes=[(4, 4)], points=4, queries=6, reference_size=4)
    with_reference = kernels.backward_fused(case.grad, *case.fused_args)
    without = kernels.backward_fused(case.grad, *case.fused_args, reference_grad=False)
    assert without[1] is None
    for i in (0, 2, 3):
        assert torch.equal(with_reference[i], without[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [-90, 0, 10, 90])
def test_exact_sums_match_the_reference_form_at_any_scale(kernels, dtype, exponent):
    if dtype == torch.float16 and abs(exponent) > 80:
        exponent //= 30
    case = Case(dtype=dtype, channels=20, shapes=[(5, 6), (2, 2)], points=4, queries=7)
    case.grad = (case.grad.double() * 2.0**exponent).to(dtype)
    grads = expected(ms_deform_attn_reference, case.grad.double() / 2.0**exponent, *case.args)[1:]
    got = kernels.backward(case.grad, *case.args, exact=True)[0]
    assert_close(got.double() / 2.0**exponent, grads[0], dtype=dtype, factor=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_sums_do_not_depend_on_query_order(kernels, dtype):
    case = Case(dtype=dtype, channels=8, shapes=[(3, 3)], points=4, queries=60, batch=1)
    order = torch.randperm(60)
    once = kernels.backward(case.grad, *case.args, exact=True)[0]
    case.grad, case.locations, case.weights = case.grad[:, order], case.locations[:, order], case.weights[:, order]
    case.offsets, case.logits, case.reference = case.offsets[:, order], case.logits[:, order], case.reference[:, order]
    assert torch.equal(once, kernels.backward(case.grad, *case.args, exact=True)[0])
    check_fused_form(kernels, case, exact=True)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["grad", "weights"])
def test_exact_sums_of_what_is_not_finite_are_nan(kernels, bad, where):
    case = Case(dtype=torch.float32, channels=8, shapes=[(3, 3)], points=2, queries=3)
    getattr(case, where).view(-1)[5] = bad
    assert kernels.backward(case.grad, *case.args, exact=True)[0].isnan().all()


def test_exact_sums_of_zeros_are_zeros(kernels):
    case = Case(dtype=torch.float32, channels=8, shapes=[(3, 3)], points=2, queries=3)
    case.grad.zero_()
    assert kernels.backward(case.grad, *case.args, exact=True)[0].eq(0).all()


def test_the_emulated_low_precisions_round_as_torch_does(kernels):
    """One sample in the middle of a level of one token with weight x is x times the token, rounded."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.cat((torch.randn(4000), torch.randn(96) * 1e-6, torch.tensor([0.0, 7e4, 3e38, 2**-14, 2**-25])))
        weights = torch.rand(values.numel()) * 1.999
        case = Case(dtype=dtype, channels=8, shapes=[(1, 1)], points=1, queries=1, batch=values.numel(), heads=1)
        case.value = values.to(dtype).view(-1, 1, 1, 1).expand_as(case.value).contiguous()
        case.locations.fill_(0.5)
        case.weights = weights.view_as(case.weights)
        wanted = (values.to(dtype).float() * weights).to(dtype)
        got = kernels.forward(*case.args)
        assert torch.equal(got, wanted.view(-1, 1, 1).expand_as(got))


@pytest.mark.parametrize("dtype", classical.DTYPES, ids=str)
@pytest.mark.parametrize("channels", [32, 17, 64])
def test_the_classical_kernels_of_the_benchmark_match_too(library, dtype, channels):
    case = Case(dtype=dtype, channels=channels, shapes=[(7, 9), (4, 5), (1, 3)], points=4, queries=5)
    output, *grads = expected(ms_deform_attn_reference, case.grad, *case.args)
    kernels = classical.Classical(library)
    assert_close(kernels.forward(*case.args), output)
    if dtype == torch.float32:
        for got, wanted in zip(kernels.backward(case.grad, *case.args), grads, strict=True):
            assert_close(got, wanted, factor=4)
