"""The CUDA kernels of deformable attention compiled for the CPU, and called as the binding calls them."""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tests.layers.ms_deform_attn_case import accumulate_dtype

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "dimaskdino" / "layers" / "csrc" / "cuda"
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
_SCALE_BYTES = 32
_EMULATION = "emulation.cpp"
# Objects stay here for as long as their preprocessed source is the same; the processes of `make test` share them.
_OBJECTS = Path(os.environ.get("EMULATION_OBJECTS", HERE.parents[2] / "build" / "emulation"))
# The emulation's own work is not that of the threads which ThreadSanitizer is to see.
_UNCHECKED = {"-fsanitize=thread": "-DFOR_THREAD_SANITIZER"}

Shapes = Sequence[tuple[int, int]]


def build(folder: Path, compiler: str, flags: Sequence[str] = ("-Og",), extra: Sequence[Path] = ()) -> Path:
    """Compile every kernel file, and ``extra`` ones, as C++ with the headers here in the toolkit's place; link them.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    sources = sorted([*KERNELS.glob("*.cu"), *HERE.glob("*.cpp"), *extra])
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda source: _compile(source, compiler, flags), sources))
    library = folder / "emulated.so"
    _run([compiler, *flags, "-shared", "-o", str(library), *objects])
    return library


def build_binding(folder: Path, compiler: str, flags: Sequence[str], library: Path) -> Path:
    """The binding of the kernels for CPU tensors, with the kernels of ``library``, which ``build`` made.

    ``torch.ops.load_library`` brings in its ops, ``torch.ops.dimaskdino_emulated``. Errors as for ``build``.
    """
    source = HERE / "binding" / "binding.cpp"
    torch_folder = Path(torch.__file__).parent
    headers = [f"-isystem{torch_folder / 'include' / part}" for part in (".", "torch/csrc/api/include")]
    compiled = _compile(source, compiler, [*flags, f"-I{source.parent}", *headers])
    binding = folder / "binding.so"
    torch_libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([compiler, *flags, "-shared", "-o", str(binding), compiled, str(library), *torch_libraries])
    return binding


def build_program(folder: Path, compiler: str, flags: Sequence[str], source: str) -> Path:
    """A file here with kernels and a ``main`` of its own as a program; arguments and errors as for ``build``."""
    objects = [_compile(HERE / name, compiler, flags) for name in (source, _EMULATION)]
    program = folder / Path(source).stem
    _run([compiler, *flags, "-o", str(program), *objects])
    return program


def _compile(source: Path, compiler: str, flags: Sequence[str]) -> str:
    if source.name == _EMULATION:
        flags = [_UNCHECKED.get(flag, flag) for flag in flags]
    common = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    command = [compiler, *common, f"-I{HERE}", f"-I{KERNELS}", "-x", "c++"]
    version, code = _run([compiler, "--version"]), _run([*command, "-E", str(source)])
    options = [flag for flag in command if not flag.startswith(("-D", "-I"))]  # those have had their effect
    target = _OBJECTS / f"{source.stem}-{hashlib.sha256(repr((version, options, code)).encode()).hexdigest()[:16]}.o"
    _OBJECTS.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".part")
            _run([*command, "-c", str(source), "-o", str(partial)])
            partial.rename(target)
    return str(target)


def _run(command: list[str]) -> str:
    # A sanitizer that is loaded into Python would slow the compiler down as well.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


class Kernels:
    """The launch functions of kernels.h on CPU tensors.

    Args:
        library: what ``build`` made.
        threads: of a block; 0 lets the launch choose.
        heads_per_block: likewise.
    """

    def __init__(self, library: Path, *, threads: int = 0, heads_per_block: int = 0) -> None:
        self._library = ctypes.CDLL(str(library))
        self._schedule = (ctypes.c_int * 2)(threads, heads_per_block)

    def forward(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        output = self._output(value, locations)
        self._call("forward", value, shapes, locations, value, locations, weights, output)
        return output

    def forward_fused(
        self, value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        output = self._output(value, offsets)
        inputs = (value, reference, reference.shape[-1], offsets, logits, self._is_low(value, offsets))
        self._call("forward_fused", value, shapes, offsets, *inputs, output)
        return output

    def backward(
        self, grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *, exact: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = (self._poisoned(locations), self._poisoned(weights))
        sums = self._sums(value, exact)
        self._call("backward", value, shapes, locations, grad, value, locations, weights, *grads, *sums)
        return self._grad_value(value, shapes, locations, sums), *grads

    def backward_fused(
        self,
        grad: Tensor,
        value: Tensor,
        shapes: Shapes,
        reference: Tensor,
        offsets: Tensor,
        logits: Tensor,
        *,
        exact: bool = False,
        reference_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        batch, queries, heads = logits.shape[:3]
        parts = self._poisoned(reference.new_empty(batch, queries, heads, reference.shape[-1]))
        grads = (parts if reference_grad else None, self._poisoned(offsets), self._poisoned(logits))
        sums = self._sums(value, exact)
        inputs = (grad, value, reference, reference.shape[-1], offsets, logits, self._is_low(value, offsets))
        self._call("backward_fused", value, shapes, offsets, *inputs, *grads, *sums)
        grad_value = self._grad_value(value, shapes, offsets, sums)
        return grad_value, parts.sum(2) if reference_grad else None, grads[1], grads[2]

    def _output(self, value: Tensor, samples: Tensor) -> Tensor:
        return self._poisoned(value.new_empty(value.shape[0], samples.shape[1], value.shape[2] * value.shape[3]))

    @staticmethod
    def _poisoned(tensor: Tensor) -> Tensor:
        """A tensor of that shape in which an element that nobody writes is seen."""
        return torch.full_like(tensor, 123.0)

    @staticmethod
    def _sums(value: Tensor, exact: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if exact:
            return None, torch.zeros_like(value, dtype=torch.int64), torch.empty(_SCALE_BYTES, dtype=torch.uint8)
        return torch.zeros_like(value, dtype=accumulate_dtype(value.dtype)), None, None

    def _grad_value(self, value: Tensor, shapes: Shapes, samples: Tensor, sums: tuple) -> Tensor:
        if sums[0] is not None:
            return sums[0].to(value.dtype)
        grad = self._poisoned(value)
        self._call("exact_sums_to_grad", value, shapes, samples, *sums[1:], grad, schedule=False)
        return grad

    @staticmethod
    def _is_low(value: Tensor, offsets: Tensor) -> int:
        return int(offsets.dtype == value.dtype != accumulate_dtype(value.dtype))

    def _call(
        self,
        name: str,
        value: Tensor,
        shapes: Shapes,
        samples: Tensor,
        *args: Tensor | int | None,
        schedule: bool = True,
    ) -> None:
        sizes = (*value.shape, samples.shape[1], len(shapes), samples.shape[4])
        flat = [size for shape in shapes for size in shape]
        common = [_DTYPES.index(value.dtype), (ctypes.c_int64 * 7)(*sizes), (ctypes.c_int64 * len(flat))(*flat)]
        if schedule:
            common.append(self._schedule)
        stream = ctypes.c_void_p(0)
        pointers = [_argument(arg) for arg in args]
        error = getattr(self._library, f"msda_{name}")(*common, stream, *pointers)
        if error:
            raise ValueError(f"{name} returned CUDA error {error}")


def _argument(arg: Tensor | int | None) -> ctypes.c_void_p | int:
    if isinstance(arg, int):
        return arg
    if arg is None:
        return ctypes.c_void_p(0)
    if not arg.is_contiguous() or arg.data_ptr() % 16:
        raise ValueError("kernels.h asks for contiguous tensors at addresses that 16 divides.")
    return ctypes.c_void_p(arg.data_ptr())
