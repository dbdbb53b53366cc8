"""An accelerator for machines without one: tensors that torch takes to be elsewhere, computed on the CPU.

The name of the device is "meta", the only one besides the CPU that torch accepts without hardware. As with a GPU, an
operation on tensors of both sides is an error; copies from one side to the other, and operations that wait for the
device to tell the host a number or a size, are recorded.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("meta")
PACKAGE = Path(__file__).parents[1] / "dimaskdino"

aten = torch.ops.aten
# These take indices that are on the host, at the price of a copy.
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}


@dataclass
class Traffic:
    """Where in the package (file:line) the host and the device waited for one another, once for each time."""

    to_device: list[str] = field(default_factory=list)
    to_host: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


class RemoteTensor(Tensor):
    """A tensor on the device; ``data_here`` has its elements."""

    data_here: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor) -> "RemoteTensor":
        with _disable_current_modes():
            shell = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=DEVICE)
            return Tensor._make_subclass(cls, shell, False)

    def __init__(self, data: Tensor) -> None:
        self.data_here = data

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("A tensor on a device has no NumPy array; call .cpu() first.")

    def tolist(self) -> Any:
        return self.cpu().tolist()  # which torch itself does of no subclass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        raise AssertionError("Only inside `accelerator()` can tensors on the device be computed with.")


class _Accelerator(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        _map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        remote = {id(x.data_here): x for x in tensors if isinstance(x, RemoteTensor)}
        there = self._check(func, args, kwargs, tensors, bool(remote))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        with _disable_current_modes():
            args, kwargs = _map(lambda x: x.data_here if isinstance(x, RemoteTensor) else x, (args, kwargs))
            result = func(*args, **kwargs)
            if not there:
                return result
            # An operation in place gives back what it was given.
            return _map(lambda x: remote[id(x)] if id(x) in remote else _send(x), result)

    def _check(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], remote: bool) -> bool:
        """Whether the result is on the device; refuses what a GPU would refuse, and records the traffic."""
        device = kwargs.get("device")
        there = remote if device is None else torch.device(device) == DEVICE
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0]
            if func is aten.copy_.default:
                there, source = isinstance(args[0], RemoteTensor), args[1]
            if there != isinstance(source, RemoteTensor):
                (self.traffic.to_device if there else self.traffic.to_host).append(_place())
            return there
        here = [x for x in tensors if not isinstance(x, RemoteTensor) and x.dim() > 0]
        if remote and here:
            if func not in _INDEXING or not isinstance(args[0], RemoteTensor):
                shapes = [tuple(x.shape) for x in here]
                raise RuntimeError(f"{_place()}: {func} of tensors on the device and on the host, the latter {shapes}.")
            self.traffic.to_device.append(_place())
        masks = func in _INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if remote and (func in _WAITING or masks):
            self.traffic.waits.append(_place())
        return there


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The function of each leaf of arguments or results; torch's tree_map takes longer than most operations."""
    if isinstance(tree, tuple | list):
        return type(tree)([_map(function, each) for each in tree])
    return {key: _map(function, each) for key, each in tree.items()} if isinstance(tree, dict) else function(tree)


def _send(data: Any) -> Any:
    return RemoteTensor(data) if isinstance(data, Tensor) else data


def _place() -> str:
    """The innermost line of the package that is being run, or of whatever else."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe())]
    name, line = next((each for each in frames if each[0].startswith(f"{PACKAGE}{os.sep}")), frames[0])
    return f"{Path(name).name}:{line}"


class _Autocast(torch.autocast):
    """torch knows no autocast of this device; where it is switched off, any other will do."""

    def __init__(self, device_type: str, **options: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, **options)


@contextmanager
def accelerator() -> Iterator[Traffic]:
    """Inside, tensors on :data:`DEVICE` are computed with; gives the record of what crosses."""
    traffic = Traffic()
    with _Accelerator(traffic), mock.patch.object(torch, "autocast", _Autocast):
        yield traffic


def send(module: nn.Module) -> nn.Module:
    """Move parameters and buffers to the device, in place; inside :func:`accelerator`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_send(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _send(buffer)
    return module
