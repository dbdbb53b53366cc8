"""The classical one-thread-per-channel CUDA kernels, built by nvcc when they are asked for."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tools.build_op import cuda_folders, find_toolkit, toolkit_homes, toolkit_problem

SOURCE = Path(__file__).with_name("classical.cu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

Shapes = Sequence[tuple[int, int]]


class Classical:
    """Forward and backward of the classical design.

    Args:
        library: the compiled ``classical.cu``.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def forward(self, value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        """As ``dimaskdino.layers.ms_deform_attn``; value in float32, float16 or bfloat16, the rest in float32."""
        batch, _, heads, channels = value.shape
        output = value.new_empty(batch, locations.shape[1], heads * channels)
        sizes = _sizes(value, spatial_shapes, locations)
        tensors = [_pointer(x) for x in (value, locations, weights, output)]
        _check(self._library.classical_forward(DTYPES.index(value.dtype), *sizes, *tensors, _stream(value)))
        return output

    def backward(
        self, grad_output: Tensor, value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of value, locations and weights; float32, at most 1024 channels."""
        if value.dtype != torch.float32:
            raise ValueError(f"The classical backward kernel is written for float32, got {value.dtype}.")
        grads = (torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights))
        sizes = _sizes(value, spatial_shapes, locations)
        tensors = [_pointer(x) for x in (grad_output, value, locations, weights, *grads)]
        _check(self._library.classical_backward(*sizes, *tensors, _stream(value)))
        return grads


def load() -> Classical:
    """Build the kernels for the current GPU, in a few seconds, and load them.

    Raises:
        RuntimeError: where there is no nvcc, or it fails.
    """
    homes = toolkit_homes(os.environ, Path(torch.__file__).parents[1])
    toolkit = find_toolkit(homes, torch.version.cuda)
    if toolkit is None:
        raise RuntimeError(
            f"The classical kernels are built by nvcc: {toolkit_problem(torch.version.cuda, None, homes)}."
        )
    major, minor = torch.cuda.get_device_capability()
    # Loaded libraries outlive their files, so the folder need not outlive this call.
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "classical.so"
        options = ["-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC", "-shared"]
        options += [f"-L{lib}" for lib in cuda_folders(toolkit.home, "lib64", "lib")]
        done = subprocess.run(
            [str(toolkit.home / "bin" / "nvcc"), *options, str(SOURCE), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        return Classical(library)


def _sizes(value: Tensor, shapes: Shapes, locations: Tensor) -> tuple[ctypes.Array, ctypes.Array]:
    flat = [size for shape in shapes for size in shape]
    sizes = (*value.shape, locations.shape[1], len(shapes), locations.shape[4])
    return (ctypes.c_int * 7)(*sizes), (ctypes.c_int * len(flat))(*flat)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    if not tensor.is_contiguous():
        raise ValueError("The classical kernels take contiguous tensors.")
    return ctypes.c_void_p(tensor.data_ptr())


def _stream(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0)


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"The classical kernel could not be launched: CUDA error {error}.")
