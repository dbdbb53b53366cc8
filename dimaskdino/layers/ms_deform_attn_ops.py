"""The compiled deformable attention as PyTorch ops: loading, the choice of the form, fake kernels, autograd, vmap.

``torch.ops.dimaskdino.ms_deform_attn`` and ``..._fused`` are defined by ``dimaskdino._C`` (csrc/). Importing this
module tells torch the rest of what it needs, so that torch.compile, torch.export and torch.func see one op.
"""

import functools
import importlib
import logging
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dimaskdino.layers.exporting import export_form, is_watched

logger = logging.getLogger(__name__)

VARIABLE = "DIMASKDINO_MSDA"
_OPS = ("ms_deform_attn", "ms_deform_attn_fused", "ms_deform_attn_backward", "ms_deform_attn_fused_backward")
# Loops over points and masks on a CPU. They were added later: a library that was built before works without.
_LOOPS = ("resized_masks", "sample_masks", "sigmoid_and_sums", "sums_at_points", "uncertain_points")
_HOW_TO_BUILD = "build it with `python -m pip install --no-build-isolation -e .` (docs/op.md)"


def _load() -> str | None:
    """Bring in the compiled ops; None, or why they are not there."""
    try:
        importlib.import_module("dimaskdino._C")
    except ModuleNotFoundError:
        return "dimaskdino was installed without its compiled op"
    except ImportError as error:  # most often built for another version of torch
        return f"the compiled op could not be loaded ({error})"
    if not all(hasattr(torch.ops.dimaskdino, name) for name in _OPS):
        return "the compiled op was built from older sources"
    return None


WANTED = os.environ.get(VARIABLE, "")
MISSING = _load()
if WANTED not in ("", "reference", "compiled"):
    raise ValueError(f"{VARIABLE} is '{WANTED}': it must be reference, compiled, or not set.")
if WANTED == "compiled" and MISSING:
    raise ImportError(f"{VARIABLE} is compiled, but {MISSING}; {_HOW_TO_BUILD}.")
COMPILED = MISSING is None and WANTED != "reference"
LOOPS_COMPILED = COMPILED and all(hasattr(torch.ops.dimaskdino, name) for name in _LOOPS)
_told: set[str] = set()


# torch.compile cannot follow a question to the dispatcher, and need not: the answer never changes.
@torch.compiler.assume_constant_result
def has_kernels(device_type: str) -> bool:
    """Whether the compiled op can run on devices of this type, such as ``cuda``."""
    key = torch._C._dispatch_key_for_device(device_type)
    return MISSING is None and torch._C._dispatch_has_kernel_for_dispatch_key("dimaskdino::ms_deform_attn", key)


def use_compiled(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the compiled op; which form runs is logged once per type of device.

    Not while torch traces, to ONNX too: a trace cannot hold the op's lists of sizes, and ONNX knows grid_sample.

    Raises:
        RuntimeError: with DIMASKDINO_MSDA=compiled where the op was built without kernels for the device.
    """
    if export_form() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    compiled = COMPILED and has_kernels(device.type)
    if WANTED == "compiled" and not compiled:
        raise RuntimeError(f"{VARIABLE} is compiled, but the op was built without kernels for {device.type}.")
    if not torch.compiler.is_compiling() and device.type not in _told:
        _told.add(device.type)
        _tell(device.type, compiled)
    return compiled


def use_loops(tensor: Tensor) -> bool:
    """Whether the compiled loops over points and masks work on a tensor; not while torch traces."""
    return LOOPS_COMPILED and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not is_watched()


def _tell(device: str, compiled: bool) -> None:
    if compiled:
        name = torch.ops.dimaskdino.cpu_capability() if device == "cpu" else device.upper()
        logger.info("Deformable attention on %s: the compiled op (%s).", device, name)
        changed = _changed_source()
        if changed:
            logger.warning("%s changed after the compiled op was built; %s.", changed, _HOW_TO_BUILD)
    elif WANTED == "reference":
        logger.info("Deformable attention on %s: plain PyTorch, as %s asks.", device, VARIABLE)
    else:
        why = MISSING or f"the op was built without kernels for {device}"
        logger.warning(
            "Deformable attention on %s: plain PyTorch, many times slower, as %s; %s.", device, why, _HOW_TO_BUILD
        )


def _changed_source() -> str:
    """A source of the op that is newer than the op in use, as after a git pull; empty where there is none."""
    built = Path(importlib.import_module("dimaskdino._C").__file__ or "").stat().st_mtime
    sources = sorted(path for path in Path(__file__).with_name("csrc").rglob("*") if path.is_file())
    return next((str(path) for path in sources if path.stat().st_mtime > built), "")


def _fake_forward(value: Tensor, spatial_shapes: list[int], *samples: Tensor) -> Tensor:
    queries = samples[-1].shape[1]
    return value.new_empty(value.shape[0], queries, value.shape[2] * value.shape[3])


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        sampling_locations.new_empty(sampling_locations.shape),
        attention_weights.new_empty(attention_weights.shape),
    )


def _fake_fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        reference.new_empty(reference.shape if reference_grad else (0,)),
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape),
    )


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    value, spatial_shapes, *samples = inputs
    ctx.save_for_backward(value, *samples)
    ctx.spatial_shapes = spatial_shapes


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    value, locations, weights = ctx.saved_tensors
    grads = call("ms_deform_attn_backward", grad_output, value, ctx.spatial_shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


def _fused_backward(ctx: Any, grad_output: Tensor) -> tuple:
    value, reference, offsets, logits = ctx.saved_tensors
    needed = ctx.needs_input_grad[-3]
    grads = call(
        "ms_deform_attn_fused_backward", grad_output, value, ctx.spatial_shapes, reference, offsets, logits, needed
    )
    return grads[0], None, grads[1] if needed else None, grads[2], grads[3]


def _no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("Deformable attention has no second derivative.")


def _fold(size: int, dim: int | None, tensor: Tensor) -> Tensor:
    """The mapped dimension joined with the batch, (V, B, ...) to (V * B, ...)."""
    mapped = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _mapped(op: Any, info: Any, in_dims: tuple, *args: Any) -> tuple:
    folded = [
        _fold(info.batch_size, dim, arg) if isinstance(arg, Tensor) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    result = op(*folded)
    if isinstance(result, Tensor):
        return result.unflatten(0, (info.batch_size, -1)), 0
    # The gradient that was not asked for comes as an empty vector.
    unfolded = tuple(x if x.dim() == 1 else x.unflatten(0, (info.batch_size, -1)) for x in result)
    return unfolded, tuple(None if x.dim() == 1 else 0 for x in result)


class _UnderTransforms(torch.autograd.Function):
    """The forward ops for torch.func.grad and its kin, which torch.library's autograd does not serve.

    Takes the op and its arguments.
    """

    @staticmethod
    def forward(op: Any, *args: Any) -> Tensor:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _save(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        fused = len(ctx.saved_tensors) == 4
        return None, *(_fused_backward if fused else _backward)(ctx, grad_output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: Any, *args: Any) -> tuple:
        return _mapped(op, info, in_dims[1:], *args)


class _BackwardUnderTransforms(torch.autograd.Function):
    """The backward ops, likewise."""

    @staticmethod
    def forward(op: Any, *args: Any) -> tuple:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return _no_second_derivative(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: Any, *args: Any) -> tuple:
        return _mapped(op, info, in_dims[1:], *args)


def call(name: str, *args: Any) -> Any:
    """``torch.ops.dimaskdino.<name>``, under torch.func's transforms as well.

    Raises:
        NotImplementedError: in forward-mode differentiation, whose tangents the op would drop.
    """
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("Deformable attention has no derivative in forward mode.")
    op = getattr(torch.ops.dimaskdino, name)
    if torch._C._are_functorch_transforms_active():
        function = _BackwardUnderTransforms if name.endswith("_backward") else _UnderTransforms
        return function.apply(op, *args)
    return op(*args)


def _register() -> None:
    library = torch.library
    library.register_fake("dimaskdino::ms_deform_attn", _fake_forward)
    library.register_fake("dimaskdino::ms_deform_attn_fused", _fake_forward)
    library.register_fake("dimaskdino::ms_deform_attn_backward", _fake_backward)
    library.register_fake("dimaskdino::ms_deform_attn_fused_backward", _fake_fused_backward)
    library.register_autograd("dimaskdino::ms_deform_attn", _backward, setup_context=_save)
    library.register_autograd("dimaskdino::ms_deform_attn_fused", _fused_backward, setup_context=_save)
    for name in ("ms_deform_attn_backward", "ms_deform_attn_fused_backward"):
        library.register_autograd(f"dimaskdino::{name}", _no_second_derivative)
    for name in _OPS:
        library.register_vmap(f"dimaskdino::{name}", functools.partial(_mapped, getattr(torch.ops.dimaskdino, name)))


if MISSING is None:
    _register()
