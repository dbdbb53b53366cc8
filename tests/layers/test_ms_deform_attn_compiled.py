"""The compiled op on the CPU against the reference form in float64."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimaskdino.layers import MSDeformAttn, ms_deform_attn_ops
from dimaskdino.layers.ms_deform_attn import ms_deform_attn_fused
from dimaskdino.layers.ms_deform_attn_reference import ms_deform_attn_fused_reference
from tests.layers.ms_deform_attn_case import DTYPES, FORMS, Case, args_of, assert_close, expected, run
from tests.layers.ms_deform_attn_case import check as check_form

pytestmark = pytest.mark.skipif(
    not ms_deform_attn_ops.COMPILED, reason=f"the compiled op is not in use: {ms_deform_attn_ops.MISSING or 'forced'}"
)

SHAPES = [(7, 9), (4, 6), (5, 2), (3, 3), (1, 2), (1, 1)]
# Few queries read the tokens where they lie; many read a copy of them with a frame of zeros.
FEW, MANY = 5, 200


check = functools.partial(check_form, factor=4)


def check_sizes():
    """Every width of the vector loops, both paths, all dtypes: what each instruction set is put to."""
    for form in FORMS:
        for dtype in DTYPES:
            for channels in (1, 5, 4, 8, 16, 24, 32, 96):
                for queries in (FEW, MANY):
                    check(
                        form,
                        Case(dtype=dtype, channels=channels, shapes=SHAPES[:3], points=3, queries=queries, heads=2),
                    )


def test_matches_the_reference_form():
    check_sizes()


@pytest.mark.parametrize("capability", ["avx2", "portable"])
def test_every_instruction_set_matches_the_reference_form(capability):
    if capability == torch.ops.dimaskdino.cpu_capability():
        pytest.skip("test_matches_the_reference_form checks it")
    code = (
        "import torch; from dimaskdino.layers import ms_deform_attn_ops\n"
        f"assert torch.ops.dimaskdino.cpu_capability() == '{capability}'\n"
        "from tests.layers.test_ms_deform_attn_compiled import check_sizes; check_sizes()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DIMASKDINO_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    if "one that this processor has" in result.stderr:
        pytest.skip(f"no {capability} here")
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_an_error():
    code = "import torch, dimaskdino._C; torch.ops.dimaskdino.cpu_capability()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DIMASKDINO_CPU_CAPABILITY": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DIMASKDINO_CPU_CAPABILITY is 'mmx'" in result.stderr


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(list(FORMS)),
    dtype=st.sampled_from(DTYPES),
    channels=st.integers(1, 128),
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    points=st.integers(1, 8),
    queries=st.integers(0, 40),
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    reference_size=st.sampled_from([2, 4]),
    low=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_match_the_reference_form(form, **options):
    check(form, Case(**options))


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("reference_size", [2, 4])
def test_gradients_are_those_of_finite_differences(queries, reference_size):
    case = Case(
        dtype=torch.float64,
        channels=3,
        shapes=[(2, 3), (2, 1)],
        points=2,
        queries=min(queries, 40),
        batch=1,
        heads=2,
        reference_size=reference_size,
    )
    for form in FORMS:
        value, shapes, *samples = args_of(case, form)
        inputs = [x.clone().requires_grad_() for x in (value, *samples)]
        function = FORMS[form][0]
        assert torch.autograd.gradcheck(lambda v, *s, f=function, at=shapes: f(v, at, *s), inputs)


# Pixels of a level of 4 x 8: on centers, on the border, half over it, and beyond. Powers of two, so that nothing is
# rounded and both forms stand on the same side of each center.
PLACES = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 3.5, 4.0, 4.5, 6.5, 7.0, 7.5, 8.0, 9.0, 1e4, -1e4, 3e38]


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_places_on_and_around_the_border_match_the_reference_form(queries):
    case = Case(dtype=torch.float32, channels=16, shapes=[(4, 8)], points=4, queries=queries, batch=1)
    pixels = torch.tensor(PLACES)[
        torch.randint(len(PLACES), case.locations.shape, generator=torch.Generator().manual_seed(1))
    ]
    case.locations = (pixels + 0.5) / torch.tensor([8.0, 4.0])
    check("locations", case)


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_locations_that_are_not_finite_sample_nothing(queries):
    case = Case(dtype=torch.float32, channels=16, shapes=SHAPES[:2], points=2, queries=queries)
    places = case.locations.view(-1, 2)
    places[0::7, 0], places[1::7, 1], places[2::7, 0] = torch.nan, torch.inf, -torch.inf
    check("locations", case)
    bad = ~places.isfinite().all(-1)
    assert run("locations", case)[2].view(-1, 2)[bad].eq(0).all()
    assert run("locations", case)[3].view(-1)[bad].eq(0).all()


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_tokens_outside_a_sample_are_never_read(queries):
    case = Case(dtype=torch.float32, channels=16, shapes=SHAPES[:2], points=2, queries=queries)
    case.locations[:, :, :, 0] = -5.0
    wanted = run("locations", case)
    case.value[:, : SHAPES[0][0] * SHAPES[0][1]] = torch.nan
    for one, other in zip(run("locations", case), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_logits_that_are_not_finite_spread_as_in_softmax(queries):
    case = Case(dtype=torch.float32, channels=16, shapes=SHAPES[:2], points=2, queries=queries)
    case.logits[0, 0, 0, 0, 0] = torch.nan
    case.logits[0, 1, 0, 0, 0] = torch.inf
    case.logits[0, 2, 0] = -torch.inf
    case.logits[0, 3, 0, 0] = -torch.inf
    case.logits[0, 4, 0, 0, 0] = 200.0
    output = ms_deform_attn_fused(*case.fused_args)
    wanted = ms_deform_attn_fused_reference(*case.fused_args)
    torch.testing.assert_close(output, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert wanted[0, :3, :16].isnan().all()
    assert wanted[0, 3:].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 3])
def test_gradients_do_not_depend_on_the_number_of_threads(form, heads):
    case = Case(dtype=torch.float32, channels=16, shapes=SHAPES[:3], points=4, queries=MANY, batch=1, heads=heads)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(form, case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_arguments_may_be_views(form):
    case = Case(dtype=torch.float32, channels=16, shapes=SHAPES[:2], points=2, queries=FEW)
    wanted = run(form, case)
    for name in ("value", "grad", "locations", "weights", "reference", "offsets", "logits"):
        tensor = getattr(case, name)
        setattr(case, name, torch.stack((tensor, tensor), dim=-1)[..., 0])
    value, shapes, *samples = args_of(case, form)
    inputs = [x.requires_grad_() for x in (value, *samples)]
    output = FORMS[form][0](inputs[0], shapes, *inputs[1:])
    got = output.detach(), *torch.autograd.grad(output, inputs, case.grad)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spoil", ["queries", "batch", "shapes", "levels"])
def test_nothing_to_sample_gives_zeros(form, spoil):
    options = {"dtype": torch.float32, "channels": 4, "shapes": [(2, 3)], "points": 2, "queries": 3}
    options[spoil if spoil != "levels" else "shapes"] = {"shapes": [(0, 3), (2, 0)], "levels": []}.get(spoil, 0)
    case = Case(**options)
    for one, other in zip(
        run(form, case), (case.grad, *(x for x in args_of(case, form) if x is not case.shapes)), strict=True
    ):
        assert one.shape == other.shape
        assert one.eq(0).all()


def flat(shapes):
    return [size for shape in shapes for size in shape]


@pytest.mark.parametrize("reference_size", [2, 4])
def test_torch_finds_nothing_wrong_with_the_registration(reference_size):
    case = Case(
        dtype=torch.float64, channels=3, shapes=[(2, 3), (2, 1)], points=2, queries=4, reference_size=reference_size
    )
    ops, shapes = torch.ops.dimaskdino, flat(case.shapes)
    value, _, *samples = case.args
    _, _, *fused = case.fused_args

    def wants_grad(tensors):
        return [x.clone().requires_grad_() for x in tensors]

    torch.library.opcheck(ops.ms_deform_attn.default, (*wants_grad([value]), shapes, *wants_grad(samples)))
    torch.library.opcheck(ops.ms_deform_attn_fused.default, (*wants_grad([value]), shapes, *wants_grad(fused)))
    torch.library.opcheck(ops.ms_deform_attn_backward.default, (case.grad, value, shapes, *samples))
    for wanted in (True, False):
        torch.library.opcheck(ops.ms_deform_attn_fused_backward.default, (case.grad, value, shapes, *fused, wanted))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_into_one_graph(form):
    case = Case(dtype=torch.float32, channels=8, shapes=SHAPES[:2], points=2, queries=FEW)
    value, shapes, *samples = args_of(case, form)
    inputs = [x.clone().requires_grad_() for x in (value, *samples)]

    def function(value, *samples):
        return FORMS[form][0](value * 2, shapes, *samples) + 1

    output = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    wanted = function(*inputs)
    assert torch.equal(output, wanted)
    grads = (torch.autograd.grad(x, inputs, case.grad) for x in (output, wanted))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_module_exports_with_the_op_inside():
    module = MSDeformAttn(dim=8, num_levels=2, num_heads=2)
    args = (torch.randn(1, 5, 8), torch.rand(1, 5, 4), torch.randn(1, 22, 8), [(3, 4), (2, 5)])
    program = torch.export.export(module, args)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("dimaskdino.ms_deform_attn_fused.default") == 1
    torch.testing.assert_close(program.module()(*args), module(*args))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_takes_plain_pytorch_even_when_run_first(monkeypatch):
    # As export to ONNX does; nothing of the op may get into the trace, not even the question for its instruction set.
    monkeypatch.setattr(ms_deform_attn_ops, "_told", set())
    module = MSDeformAttn(dim=8, num_levels=2, num_heads=2).requires_grad_(False)
    args = (torch.randn(1, 5, 8), torch.rand(1, 5, 4), torch.randn(1, 22, 8))
    shapes = [(3, 4), (2, 5)]
    traced = torch.jit.trace(lambda *tensors: module(*tensors, shapes), args, check_trace=False)
    assert "grid_sampler" in str(traced.graph)
    assert "dimaskdino::" not in str(traced.graph)
    torch.testing.assert_close(traced(*args), module(*args, shapes))


def test_onnx_export_takes_plain_pytorch(monkeypatch):
    assert ms_deform_attn_ops.use_compiled(torch.device("cpu"))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not ms_deform_attn_ops.use_compiled(torch.device("cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_torch_func_maps_and_derives_it(form):
    cases = [Case(dtype=torch.float64, channels=3, shapes=SHAPES[:2], points=2, queries=4, seed=i) for i in range(2)]
    samples = args_of(cases[0], form)[2:]

    def loss(value, *samples):
        return (FORMS[form][0](value, SHAPES[:2], *samples) * cases[0].grad).sum()

    values = torch.stack([case.value for case in cases])
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(0, *(None,) * len(samples)))(values, *samples)
    for case, got in zip(cases, mapped, strict=True):
        value = case.value.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(loss(value, *samples), value)[0])
    derived = torch.func.grad(loss, argnums=tuple(range(1 + len(samples))))(values[0], *samples)
    inputs = [x.clone().requires_grad_() for x in (values[0], *samples)]
    for one, other in zip(derived, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_is_an_error(form):
    case = Case(dtype=torch.float64, channels=3, shapes=SHAPES[:1], points=1, queries=2)
    value, shapes, *samples = args_of(case, form)
    value.requires_grad_()
    (grad,) = torch.autograd.grad((FORMS[form][0](value, shapes, *samples) ** 2).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_derivative_in_forward_mode_is_an_error(form):
    # The op would drop the tangent, and the derivative of all that it is part of would be wrong.
    value, *arguments = args_of(Case(dtype=torch.float64, channels=3, shapes=SHAPES[:1], points=1, queries=2), form)
    with torch.autograd.forward_ad.dual_level():
        FORMS[form][0](value, *arguments)
        dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            FORMS[form][0](dual, *arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_samples_in_its_dtype_at_exact_locations(form, dtype):
    case = Case(dtype=torch.float32, channels=16, shapes=SHAPES[:2], points=2, queries=MANY)
    wanted = expected(FORMS[form][1], case.grad, *args_of(case, form))
    with torch.autocast("cpu", dtype):
        case.grad = case.grad.to(dtype)
        output, *grads = run(form, case)
    assert output.dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert_close(output, wanted[0], factor=2)
    for one, other in zip(grads, wanted[1:], strict=True):
        assert_close(one, other, dtype=dtype, factor=4)


def spoiled(spoil, *names):
    """Arguments of an op by name, some of them changed."""
    case = Case(dtype=torch.float32, channels=4, shapes=SHAPES[:2], points=2, queries=FEW)
    args = {name: flat(case.shapes) if name == "shapes" else getattr(case, name) for name in names}
    return [spoil.get(name, lambda given: given)(value) for name, value in args.items()]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ({"value": lambda x: x[0]}, ValueError, r"value must be \(B, S, H, D\)"),
        ({"value": lambda x: x.int()}, TypeError, "value must be float32, float64, float16 or bfloat16, got Int"),
        ({"shapes": lambda x: x[:-1]}, ValueError, "pairs of height and width"),
        ({"shapes": lambda x: [-2, -3, *x[2:]]}, ValueError, r"must lie in 0 to 2\^30"),
        ({"shapes": lambda x: [2**40, 2**40]}, ValueError, r"must lie in 0 to 2\^30"),
        ({"shapes": lambda x: [100, 100, *x[2:]]}, ValueError, "hold more than the 87 tokens"),
        ({"shapes": lambda x: [1, 1, *x[2:]]}, ValueError, "hold 25 tokens, but value has 87"),
        ({"locations": lambda x: x[..., :1]}, ValueError, r"must be \(B, Q, H, L, P, 2\)"),
        ({"locations": lambda x: x[:1]}, ValueError, "sampling_locations must be"),
        ({"locations": lambda x: x.double()}, TypeError, "sampling_locations must be Float, got Double"),
        ({"weights": lambda x: x[:, :1]}, ValueError, "attention_weights must be"),
        ({"weights": lambda x: x.half()}, TypeError, "attention_weights must be Float, got Half"),
        ({"grad": lambda x: x[..., :1]}, ValueError, "grad_output must be"),
        ({"grad": lambda x: x.double()}, TypeError, "grad_output must be Float, got Double"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_the_op_itself_refuses_what_it_could_not_read(spoil, error, message):
    with pytest.raises(error, match=message):
        torch.ops.dimaskdino.ms_deform_attn_backward(*spoiled(spoil, "grad", "value", "shapes", "locations", "weights"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ({"reference": lambda x: x[..., :1]}, ValueError, r"reference must be \(B, Q, 2 or 4\)"),
        ({"reference": lambda x: x.double()}, TypeError, "reference must be Float, got Double"),
        ({"offsets": lambda x: x.half()}, TypeError, "offsets must be Float or the dtype of value"),
        ({"logits": lambda x: x.half()}, TypeError, "logits must be Float, got Half"),
        ({"logits": lambda x: x[:, :, :1]}, ValueError, "logits must be"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_the_fused_op_itself_refuses_what_it_could_not_read(spoil, error, message):
    with pytest.raises(error, match=message):
        torch.ops.dimaskdino.ms_deform_attn_fused(*spoiled(spoil, "value", "shapes", "reference", "offsets", "logits"))
