"""The binding of the CUDA kernels, compiled for CPU tensors and the emulated kernels (tests/layers/cuda_emulation)."""

import os
import shutil

import pytest
import torch

from tests.layers.cuda_emulation import build, build_binding
from tests.layers.ms_deform_attn_case import DTYPES, FORMS, Case, args_of, assert_close, expected

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is compiled by g++")

SHAPES = [(7, 9), (4, 5), (1, 3), (2, 1)]
NAMES = {"locations": "ms_deform_attn", "fused": "ms_deform_attn_fused"}


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    flags = os.environ.get("EMULATION_FLAGS", "-Og").split()  # sanitizers, say
    folder = tmp_path_factory.mktemp("binding")
    kernels = build(folder, COMPILER, [*flags, "-D__CUDA_ARCH__=900"])
    torch.ops.load_library(build_binding(folder, COMPILER, flags, kernels))
    return torch.ops.dimaskdino_emulated


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(**options):
    defaults = {"dtype": torch.float32, "channels": 32, "shapes": SHAPES, "points": 4, "queries": 7}
    return Case(**{**defaults, **options})


def run(ops, form, case, **options):
    """Output and all gradients, from the two ops of a form."""
    value, shapes, *samples = args_of(case, form)
    sizes = [size for shape in shapes for size in shape]
    output = getattr(ops, NAMES[form])(value, sizes, *samples)
    more = [options.get("reference_grad", True)] if form == "fused" else []
    grads = getattr(ops, NAMES[form] + "_backward")(case.grad, value, sizes, *samples, *more)
    return output, *grads


def check(form, case, got):
    for one, wanted in zip(got, expected(FORMS[form][1], case.grad, *args_of(case, form)), strict=True):
        assert one.is_contiguous()
        assert_close(one, wanted, factor=8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference_form(ops, form, dtype):
    for options in ({}, {"reference_size": 4, "low": True, "channels": 5, "batch": 1}):
        case = make_case(dtype=dtype, **options)
        output, *grads = got = run(ops, form, case)
        check(form, case, got)
        samples = args_of(case, form)[2:]
        assert [x.dtype for x in (output, *grads)] == [dtype, dtype, *(x.dtype for x in samples)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_algorithms_sum_in_fixed_point(ops, form, dtype, deterministic):
    case = make_case(dtype=dtype, queries=60, channels=8, shapes=[(3, 3)], batch=1)
    got = run(ops, form, case)
    check(form, case, got)
    order = torch.randperm(60)
    for name in ("grad", "locations", "weights", "reference", "offsets", "logits"):
        setattr(case, name, getattr(case, name)[:, order].contiguous())
    assert torch.equal(run(ops, form, case)[1], got[1])


@pytest.mark.parametrize("form", FORMS)
def test_arguments_may_be_views(ops, form):
    case = make_case()
    wanted = run(ops, form, case)
    # Every second of a larger tensor, and contiguous ones that start 4 bytes after an aligned address.
    case.value = torch.stack((case.value, case.value), dim=-1)[..., 0]
    for name in ("grad", "locations", "weights", "reference", "offsets", "logits"):
        tensor = getattr(case, name)
        setattr(case, name, tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor))
    assert all(x.data_ptr() % 16 for x in (case.grad, *args_of(case, form)[2:]))
    for one, other in zip(run(ops, form, case), wanted, strict=True):
        assert torch.equal(one, other)


def test_the_gradient_of_the_reference_can_be_left_out(ops):
    case = make_case(reference_size=4)
    with_reference = run(ops, "fused", case)
    without = run(ops, "fused", case, reference_grad=False)
    assert without[2].shape == (0,)
    for i in (0, 1, 3, 4):
        assert torch.equal(with_reference[i], without[i])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}, {"shapes": [(0, 3), (2, 0)]}], ids=str)
def test_nothing_to_sample_gives_zeros(ops, form, empty):
    case = make_case(**empty)
    output, *grads = run(ops, form, case)
    assert output.shape == case.grad.shape
    assert output.eq(0).all()
    for grad, wanted in zip(grads, (case.value, *args_of(case, form)[2:]), strict=True):
        assert grad.shape == wanted.shape
        assert grad.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_what_the_kernels_do_not_take_is_an_error(ops, form):
    with pytest.raises(ValueError, match="at most 16 levels on CUDA, got 17"):
        run(ops, form, make_case(shapes=[(1, 1)] * 17))
    case = make_case()
    value, shapes, *samples = args_of(case, form)
    with pytest.raises(ValueError, match="must be"):
        getattr(ops, NAMES[form])(value[0], [size for shape in shapes for size in shape], *samples)
    with pytest.raises(TypeError, match="must be"):
        getattr(ops, NAMES[form])(value.double(), [size for shape in shapes for size in shape], *samples)
    case.grad = case.grad[:, :-1]
    with pytest.raises(ValueError, match="grad_output"):
        run(ops, form, case)


@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_may_be_asked_for(ops, form, monkeypatch):
    case = make_case()
    wanted = run(ops, form, case)
    monkeypatch.setenv("DIMASKDINO_CUDA_SCHEDULE", "64,2")
    # Another order of the additions, at most.
    for one, other in zip(run(ops, form, case), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    monkeypatch.setenv("DIMASKDINO_CUDA_SCHEDULE", "64")
    with pytest.raises(ValueError, match="DIMASKDINO_CUDA_SCHEDULE is 64; it takes threads and heads per block"):
        run(ops, form, case)
    monkeypatch.setenv("DIMASKDINO_CUDA_SCHEDULE", "48,1")
    with pytest.raises(ValueError, match=r"the CUDA kernels are not made for these sizes .*channels 32, queries 7"):
        run(ops, form, case)
