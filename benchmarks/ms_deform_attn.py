"""Deformable attention, every form side by side in one process: `python -m benchmarks.ms_deform_attn`, `make bench`.

Each row is one case, dtype and pass. A form's column is how many times faster it is than the form named under "against"
(grid_sample, or on a GPU the classical kernel where nvcc is at hand and the kernel does that dtype), whose milliseconds
and peak memory stand there too. Results are compared with those of the reference form in
float64 along the way: a wrong form of ours ends the run; a wrong form of another package is reported.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.measure import Work, copy_bandwidth, load_bandwidth, peak_bytes, side_by_side
from dimaskdino.devices import default_device
from dimaskdino.layers import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_ops
from dimaskdino.layers.ms_deform_attn_reference import (
    SpatialShapes,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
    sampling_locations,
)

SHAPES_1024 = [(128, 128), (64, 64), (32, 32), (16, 16)]
HEADS, CHANNELS, POINTS = 8, 32, 4
TOKENS = sum(height * width for height, width in SHAPES_1024)
PASSES = ["forward", "backward", "forward + backward"]
# Relative to the largest element, for results of that dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Case:
    """Arguments of all forms: an encoder (every token a query, samples around it) or a decoder (boxes anywhere)."""

    name: str
    value: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    grad: Tensor

    @property
    def locations(self) -> Tensor:
        """(B, Q, H, L, P, 2) in float32."""
        return sampling_locations(self.reference, self.offsets.float(), SHAPES_1024).contiguous()

    @property
    def weights(self) -> Tensor:
        """(B, Q, H, L, P) in float32."""
        return self.logits.float().flatten(-2).softmax(-1).view(self.logits.shape)


def make_case(name: str, dtype: torch.dtype, device: torch.device) -> Case:
    """``encoder B`` or ``decoder Q``, from a fixed seed."""
    kind, number = name.split()
    batch, queries = (int(number), TOKENS) if kind == "encoder" else (1, int(number))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    samples = (batch, queries, HEADS, len(SHAPES_1024), POINTS)
    if kind == "encoder":
        reference, spread = _centers().expand(batch, -1, -1), 2.0  # in pixels
    else:
        reference, spread = 0.1 + 0.8 * torch.rand(batch, queries, 4, generator=generator), 1.0  # in halves of the box
    tensors = (
        normal(batch, TOKENS, HEADS, CHANNELS).to(dtype),
        reference.contiguous(),
        (spread * normal(*samples, 2)).to(dtype),
        normal(*samples).to(dtype),
        normal(batch, queries, HEADS * CHANNELS).to(dtype),
    )
    return Case(name, *(tensor.to(device) for tensor in tensors))


def _centers() -> Tensor:
    """(1, S, 2): the center of every token."""
    levels = []
    for height, width in SHAPES_1024:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        levels.append(torch.stack((x.flatten(), y.flatten()), dim=-1))
    return torch.cat(levels)[None]


@dataclass
class Form:
    """One way to compute the op.

    ``function`` takes value, shapes and the other tensors: offsets and logits where it is ``fused``, else locations and
    weights. ``schedule`` is how the CUDA kernels cut up the work (threads and heads per block); empty as they choose.
    ``ours`` is False for another package: what it gets wrong or cannot do is reported and does not end the run.
    """

    function: Callable[..., Tensor]
    fused: bool
    schedule: str = ""
    ours: bool = True


def separate_steps(value: Tensor, shapes: SpatialShapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """The compiled op after softmax and location arithmetic in PyTorch."""
    weights = logits.float().flatten(-2).softmax(-1).view(logits.shape)
    return ms_deform_attn(value, shapes, sampling_locations(reference, offsets.float(), shapes), weights)


def forms_for(device: torch.device, schedules: Sequence[str]) -> dict[str, Form]:
    """The forms by name; the first of ours, or the classical kernel, is what the others are compared with."""
    forms: dict[str, Form] = {}
    if device.type == "cuda":
        forms |= _classical()
    forms |= _deformops() | _torch_ms_deform_attn()
    forms["grid_sample"] = Form(ms_deform_attn_reference, fused=False)
    forms["compiled"] = Form(ms_deform_attn, fused=False)
    forms["softmax + grid_sample"] = Form(ms_deform_attn_fused_reference, fused=True)
    forms["softmax + compiled"] = Form(separate_steps, fused=True)
    forms["fused"] = Form(ms_deform_attn_fused, fused=True)
    return forms | {f"fused {schedule}": Form(ms_deform_attn_fused, True, schedule) for schedule in schedules}


def _classical() -> dict[str, Form]:
    from benchmarks import classical

    try:
        kernels = classical.load()
    except RuntimeError as error:
        print(f"without the classical kernel: {error}", file=sys.stderr)
        return {}

    class Classical(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
            ctx.shapes = shapes
            ctx.save_for_backward(value, locations, weights)
            return kernels.forward(value, shapes, locations, weights)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:
            value, locations, weights = ctx.saved_tensors
            grads = kernels.backward(grad.contiguous(), value, ctx.shapes, locations, weights)
            return grads[0], None, grads[1], grads[2]

    return {"classical": Form(Classical.apply, fused=False)}


def _deformops() -> dict[str, Form]:
    """The PyPI package (Python 3.12 on), where it is installed. It takes weights in the dtype of the values only."""
    try:
        msda = importlib.import_module("deformops.registry").msda
    except (ImportError, AttributeError) as error:
        print(f"without deformops: {error}", file=sys.stderr)
        return {}

    def function(value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = _sizes(tuple(shapes), value.device)
        output = msda(value, sizes, starts, locations, weights.flatten(-2).to(value.dtype))
        return output.reshape(value.shape[0], locations.shape[1], -1)

    return {"deformops": Form(function, fused=False, ours=False)}


def _torch_ms_deform_attn() -> dict[str, Form]:
    """The PyPI package, where it is installed. It takes all tensors in one dtype."""
    try:
        package_op = importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    except (ImportError, AttributeError) as error:
        print(f"without torch-ms-deform-attn: {error}", file=sys.stderr)
        return {}

    def function(value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = _sizes(tuple(shapes), value.device)
        return package_op(value, sizes, starts, locations.to(value.dtype), weights.to(value.dtype))

    return {"torch-ms-deform-attn": Form(function, fused=False, ours=False)}


_kept_sizes: dict[Any, tuple[Tensor, Tensor]] = {}


def _sizes(shapes: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Level sizes and starts as tensors, made once: copying them is no part of what is measured."""
    if shapes not in _kept_sizes:
        areas = torch.tensor([0, *(height * width for height, width in shapes[:-1])])
        _kept_sizes[shapes] = (torch.tensor(shapes, device=device), areas.cumsum(0).to(device))
    return _kept_sizes[shapes]


def leaves(case: Case, fused: bool) -> list[Tensor]:
    """The tensors of one form, apart from the level shapes, as leaves that want gradients."""
    samples = [case.reference, case.offsets, case.logits] if fused else [case.locations, case.weights]
    tensors = [x.detach().clone() for x in (case.value, *samples)]
    for tensor in tensors:
        # The decoder's references are detached in the model, and the encoder's are constants.
        tensor.requires_grad_(tensor.shape[-1] != case.reference.shape[-1] or tensor.dim() != 3)
    return tensors


def make_work(form: Form, passes: str, tensors: list[Tensor], grad: Tensor) -> Work:
    """What is timed: one of :data:`PASSES` of a form, giving all tensors that it computes."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def compute() -> Tensor:
        return form.function(tensors[0], SHAPES_1024, *tensors[1:])

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (compute(),)

    def both() -> tuple[Tensor, ...]:
        output = compute()
        return output, *torch.autograd.grad(output, wanted, grad)

    if passes == "backward":
        kept = compute()
        return lambda: torch.autograd.grad(kept, wanted, grad, retain_graph=True)
    return forward if passes == "forward" else both


def with_schedule(work: Work, schedule: str) -> Work:
    """The same, with the CUDA kernels' work cut up so."""
    if not schedule:
        return work

    def scheduled() -> object:
        os.environ["DIMASKDINO_CUDA_SCHEDULE"] = schedule
        try:
            return work()
        finally:
            del os.environ["DIMASKDINO_CUDA_SCHEDULE"]

    return scheduled


def deviation(work: Work, exact: Work, dtype: torch.dtype) -> str:
    """What is wrong with a result of ``work``, compared with the same in float64; empty where nothing is.

    The gradient of a location jumps at the centers of pixels, and rounding decides on which side the few samples are
    that stand there: one element in a thousand may differ.
    """
    for part, wanted in zip(work(), exact(), strict=True):
        off = (part.double() - wanted).abs() > TOLERANCE[dtype] * wanted.abs().max()
        allowed = 1e-3 if part.shape[-1] == 2 else 0.0
        if not off.double().mean().item() <= allowed:
            largest = (part.double() - wanted).abs().max() / wanted.abs().max()
            return f"{int(off.sum())} of {off.numel()} elements are wrong, by {largest:.2g} of the largest at most"
    return ""


def floors(case: Case, passes: str) -> tuple[int, int]:
    """Bytes that the fused form must move to and from memory, and bytes that it loads from caches, of one run."""
    inputs = [case.value, case.grad, case.offsets, case.logits]  # grad stands for the output as well
    sizes = sum(x.numel() * x.element_size() for x in inputs)
    corners = 4 * case.logits.numel() * CHANNELS * case.value.element_size()
    # Again, with the gradients written; values loaded once more, their float32 gradients loaded and stored.
    backward = 2 * sizes, corners + 2 * 4 * case.logits.numel() * CHANNELS * 4
    if passes == "forward + backward":
        return sizes + backward[0], corners + backward[1]
    return (sizes, corners) if passes == "forward" else backward


def measure(
    case: Case, forms: dict[str, Form], dtype: torch.dtype, passes: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds and peak bytes of each form, the results compared before. Forms that cannot do the case are left out."""
    works = {}
    for name, form in forms.items():
        tensors = leaves(case, form.fused)
        reference = Form(ms_deform_attn_fused_reference if form.fused else ms_deform_attn_reference, form.fused)
        doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
        unable: tuple[type[Exception], ...] = (NotImplementedError, ValueError) if form.ours else (Exception,)
        where = f"{case.name} {dtype} {passes}"
        try:
            work = with_schedule(make_work(form, passes, tensors, case.grad), form.schedule)
            wrong = deviation(work, make_work(reference, passes, doubles, case.grad.double()), dtype)
        except unable as error:
            print(f"{where}: without {name}: {error}", file=sys.stderr)
            continue
        if wrong and form.ours:
            raise RuntimeError(f"{where}: {name}: {wrong}.")
        if wrong:
            print(f"{where}: {name}: {wrong}", file=sys.stderr)
        works[name] = work
    seconds = side_by_side(works, case.value.device, rounds=rounds)
    return {name: {"s": seconds[name], "bytes": peak_bytes(works[name], case.value.device)} for name in works}


def _mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.0f}"


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    forms = forms_for(device, args.schedules)
    bandwidth, loads = copy_bandwidth(device), load_bandwidth(device)
    table = []
    for name in args.cases:
        for dtype in (getattr(torch, x) for x in args.dtypes):
            case = make_case(name, dtype, device)
            for passes in PASSES:
                results = measure(case, forms, dtype, passes, args.rounds)
                first = next(name for name in results if forms[name].ours)
                packages = [result["s"] for form, result in results.items() if not forms[form].ours]
                row: dict[str, Any] = {"case": name, "dtype": str(dtype)[6:], "pass": passes, "against": first}
                row["ms"] = f"{results[first]['s'] * 1e3:.3g}"
                for form, result in results.items():
                    row[form] = f"{results[first]['s'] / result['s']:.2f}x"
                if packages:
                    row["fused against the best package"] = f"{min(packages) / results['fused']['s']:.2f}x"
                moved, loaded = floors(case, passes)
                row["fused / memory floor"] = f"{results['fused']['s'] / (moved / bandwidth):.1f}"
                if loads:
                    row["fused / load floor"] = f"{results['fused']['s'] / (loaded / loads):.1f}"
                row["peak MiB"] = _mebibytes(results[first]["bytes"])
                row["peak MiB: fused"] = _mebibytes(results["fused"]["bytes"])
                table.append(row)
                print(f"{name} {row['dtype']} {row['pass']}: done", file=sys.stderr)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    cases = ["encoder 1", "encoder 2", "decoder 300", "decoder 900"]
    parser.add_argument("--cases", nargs="+", default=cases, help="'encoder BATCH' or 'decoder QUERIES'")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, help="runs of each form, of which the median counts (5; on a GPU 50)")
    parser.add_argument(
        "--schedules", nargs="+", default=[], help="of the CUDA kernels, to try: threads and heads a block, as in 64,2"
    )
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not ms_deform_attn_ops.COMPILED:
        sys.exit(f"The compiled op is not in use: {ms_deform_attn_ops.MISSING or 'DIMASKDINO_MSDA is reference'}.")
    device = torch.device(args.device)
    args.rounds = args.rounds or (50 if device.type == "cuda" else 5)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.ops.dimaskdino.cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; levels {SHAPES_1024}, {HEADS} heads of {CHANNELS}, {POINTS} points")
    print(tabulate(rows(args), headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main()
