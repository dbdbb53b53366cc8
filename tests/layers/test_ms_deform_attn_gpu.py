"""The compiled op on a GPU. Its kernels are also tested without one: test_ms_deform_attn_cuda_emulated.py."""

import functools

import pytest
import torch

from dimaskdino.layers import ms_deform_attn_ops
from dimaskdino.layers.ms_deform_attn import ms_deform_attn
from dimaskdino.layers.ms_deform_attn_reference import ms_deform_attn_reference
from tests.layers.ms_deform_attn_case import DTYPES, FORMS, Case, args_of, assert_close, expected, run
from tests.layers.ms_deform_attn_case import check as check_form

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ms_deform_attn_ops.has_kernels("cuda")),
    reason="no GPU, or the op was built without CUDA",
)

SIZES = [(1, 1, 1), (6, 2, 3), (16, 4, 4), (17, 6, 8), (32, 3, 4), (32, 4, 4), (32, 5, 4), (64, 4, 4), (128, 2, 5)]
SHAPES = [(17, 23), (9, 12), (5, 6), (3, 3), (1, 2), (1, 1)]


def make_case(dtype=torch.float32, channels=32, levels=4, points=4, queries=300, **options):
    return Case(
        dtype=dtype,
        channels=channels,
        shapes=SHAPES[:levels],
        points=points,
        queries=queries,
        **{"device": "cuda", **options},
    )


# Sums over hundreds of queries in float32, in an order of the GPU's choosing.
check = functools.partial(check_form, factor=20)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "levels", "points"), SIZES)
def test_matches_the_reference_form(form, dtype, channels, levels, points):
    for options in ({}, {"reference_size": 4, "low": True}):
        check(form, make_case(dtype, channels, levels, points, **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [32, 5])
def test_the_encoder_where_every_token_is_a_query(form, channels):
    shapes = [(64, 64), (32, 32), (16, 16), (8, 8)]
    tokens = sum(height * width for height, width in shapes)
    case = Case(
        dtype=torch.float32, channels=channels, shapes=shapes, points=4, queries=tokens, batch=1, heads=8, device="cuda"
    )
    check(form, case)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    case = make_case(torch.float64, channels=3, levels=2, points=2, queries=3, batch=1, heads=2)
    value, shapes, *samples = args_of(case, form)
    inputs = [x[:, :].clone().requires_grad_() for x in (value, *samples)]
    assert torch.autograd.gradcheck(
        lambda value, *samples: FORMS[form][0](value, shapes, *samples), inputs, nondet_tol=1e-10
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_algorithms_give_the_same_bits_every_time(form, dtype, deterministic):
    # Many queries on few tokens: additions to one place from all over the GPU.
    case = Case(
        dtype=dtype, channels=32, shapes=[(4, 4), (2, 2)], points=4, queries=3000, batch=1, heads=8, device="cuda"
    )
    first = run(form, case)
    torch.use_deterministic_algorithms(False)  # the reference form cannot be differentiated by any on a GPU
    check(form, case, got=first)
    torch.use_deterministic_algorithms(True)
    for _ in range(5):
        for one, other in zip(first, run(form, case), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_gradients_of_what_is_not_finite_are_nan(form, deterministic):
    case = make_case()
    case.grad[0, 0, 0] = torch.inf
    assert run(form, case)[1].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_runs_on_the_current_stream(form):
    case = make_case(queries=2000)
    alone = run(form, case)
    stream = torch.cuda.Stream()
    scratch = torch.randn(4096, 4096, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The arguments are only ready after long work on this stream; another stream would read zeros.
        late = make_case(queries=2000)
        kept = late.value.clone()
        late.value.zero_()
        for _ in range(20):
            scratch = scratch @ scratch * 1e-3
        late.value.copy_(kept)
        got = run(form, late)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(got[0], alone[0])
    torch.testing.assert_close(got[1], alone[1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("form", FORMS)
def test_runs_on_the_device_of_its_arguments(form):
    assert torch.cuda.current_device() == 0
    case = make_case(device="cuda:1")
    assert run(form, case)[0].device == torch.device("cuda:1")
    check(form, case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exact", [False, True])
def test_never_waits_for_the_gpu(form, exact):
    case = make_case(torch.bfloat16)
    run(form, case)
    torch.use_deterministic_algorithms(exact)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(form, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS)
def test_can_be_captured_in_a_graph(form):
    case = make_case()
    args = args_of(case, form)
    wanted = FORMS[form][0](*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = FORMS[form][0](*args)
    output.zero_()
    graph.replay()
    assert torch.equal(output, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_training_can_be_captured_in_a_graph(form):
    case = make_case()
    wanted = run(form, case)
    value, shapes, *samples = args_of(case, form)
    inputs = [x.detach().requires_grad_() for x in (value, *samples)]

    def step():
        output = FORMS[form][0](inputs[0], shapes, *inputs[1:])
        return output, *torch.autograd.grad(output, inputs, case.grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made on first use must not be made during the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.zero_()
    graph.replay()
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_samples_in_its_dtype_at_exact_locations(form, dtype):
    case = make_case()
    with torch.autocast("cuda", dtype):
        case.grad = case.grad.to(dtype)
        output, *grads = run(form, case)
    assert output.dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in grads)
    wanted = expected(FORMS[form][1], case.grad, *args_of(case, form))
    assert_close(output, wanted[0], factor=2)
    for one, other in zip(grads, wanted[1:], strict=True):
        assert_close(one, other, dtype=dtype, factor=4)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_into_one_graph(form):
    case = make_case()
    value, shapes, *samples = args_of(case, form)
    inputs = [x.clone().requires_grad_() for x in (value, *samples)]
    compiled = torch.compile(lambda value, *samples: FORMS[form][0](value * 2, shapes, *samples) + 1, fullgraph=True)
    output = compiled(*inputs)
    grads = torch.autograd.grad(output, inputs, case.grad)
    case.value = 2 * case.value
    wanted = run(form, case)
    torch.testing.assert_close(output, wanted[0] + 1)
    torch.testing.assert_close(grads[0], 2 * wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty", ["queries", "batch", "tokens"])
def test_nothing_to_sample_gives_zeros(form, empty):
    options = {"queries": {"queries": 0}, "batch": {"batch": 0}, "tokens": {}}[empty]
    case = make_case(**options)
    if empty == "tokens":
        case = Case(dtype=torch.float32, channels=32, shapes=[(0, 3), (2, 0)], points=4, queries=5, device="cuda")
    output, *grads = run(form, case)
    assert output.eq(0).all()
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("form", FORMS)
def test_arguments_may_be_views(form):
    case = make_case(channels=32)
    wanted = run(form, case)
    # Every second of a larger tensor, and contiguous ones that start 4 bytes after an aligned address.
    case.value = torch.stack((case.value, case.value), dim=-1)[..., 0]
    for name in ("grad", "locations", "weights", "reference", "offsets", "logits"):
        tensor = getattr(case, name)
        shifted = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        setattr(case, name, shifted.copy_(tensor))
    value, shapes, *samples = args_of(case, form)
    inputs = [x.detach().requires_grad_() for x in (value, *samples)]
    assert all(x.data_ptr() % 16 for x in (case.grad, *inputs[1:]))
    output = FORMS[form][0](inputs[0], shapes, *inputs[1:])
    assert torch.equal(output, wanted[0])
    for one, other in zip(torch.autograd.grad(output, inputs, case.grad), wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_tokens_outside_a_sample_are_never_read():
    case = make_case(levels=2)
    case.locations[:, :, :, 0] = -5.0
    wanted = expected(ms_deform_attn_reference, case.grad, *case.args)
    case.value[:, : SHAPES[0][0] * SHAPES[0][1]] = torch.nan
    output, *grads = run("locations", case)
    assert_close(output, wanted[0])
    for one, other in zip(grads, wanted[1:], strict=True):
        assert_close(one, other, factor=20)


def test_locations_that_are_not_finite_sample_nothing():
    case = make_case(levels=2)
    case.locations.view(-1, 2)[:100, 0] = torch.nan
    case.locations.view(-1, 2)[100:200, 1] = torch.inf
    check("locations", case)
    assert run("locations", case)[2].view(-1, 2)[:200].eq(0).all()


def test_more_levels_than_the_kernels_take_are_an_error():
    case = Case(dtype=torch.float32, channels=8, shapes=[(1, 1)] * 17, points=1, queries=2, device="cuda")
    with pytest.raises(ValueError, match="at most 16 levels"):
        ms_deform_attn(*case.args)
