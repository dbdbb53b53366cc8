"""Unpickling weights in bounded time and without running code: arrays, tensors and plain containers."""

import contextlib
import importlib.util
import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

from dimaskdino.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"

# Far beyond any checkpoint of these models, and read in seconds: opcodes and what their tuples expand to; tensors in a
# plain pickle.
_MAX_WORK = 1_000_000
_MAX_STORAGES = 5_000

# numpy 2 moved the functions that rebuild arrays; older files name the older place.
_NUMPY = "numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core"
_multiarray = importlib.import_module(f"{_NUMPY}.multiarray")
_numeric = importlib.import_module(f"{_NUMPY}.numeric")


def unpickle(file: IO[bytes], *, plain: bool, trust: bool) -> Any:
    """Unpickle a file of torch's, or a plain pickle, from its start; ``trust`` lets it run any code.

    Raises:
        CheckpointError: it would run code, or take too long.
    """
    is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    file.seek(0)
    plain = plain and not is_zip
    if not trust:
        _check_pickles(file, is_zip=is_zip, count=1 if plain else 5)
    if plain:
        # Python 2 wrote the oldest files; latin1 keeps their bytes.
        return pickle.load(file, encoding="latin1") if trust else _ArrayUnpickler(file).load()
    return _torch_load(file, trust)


def refusal(what: str) -> str:
    """The error message about a file that asks for ``what``, a function or class."""
    return (
        f"asks for {what}, which is not a weight and could run code, so it was not read. If you know where the file is "
        "from, tools/convert_checkpoint.py --trust rewrites it as plain weights, running whatever it holds."
    )


def _check_pickles(file: IO[bytes], *, is_zip: bool, count: int = 5) -> None:
    """Bound the time of unpickling: opcodes, and what their tuples expand to; torch's older format has 5 pickles."""
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    _check_opcodes(archive.open(name), 1)
    else:
        _check_opcodes(file, count)
    file.seek(0)


def _check_opcodes(file: IO[bytes], count: int) -> None:
    work = 0
    for _ in range(count):
        machine = _SizeMachine()
        for opcode, argument, _ in pickletools.genops(file):
            work += 1 + machine.follow(opcode, argument)
            if work > _MAX_WORK:
                raise CheckpointError("is a pickle too long or too deeply nested to be weights, so it was not read.")


class _SizeMachine:
    """Follows a pickle's opcodes on a stack that holds the number of values in each tuple, and 0 for anything else."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def follow(self, opcode: Any, argument: Any) -> int:
        """Follow one opcode; returns what is then on top of the stack."""
        stack, memo = self._stack, self._memo
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        elif opcode.name == "MARK":
            self._marks.append(len(stack))
        else:
            popped = self._pop(opcode.stack_before)
            hashable = "TUPLE" in opcode.name or opcode.name == "FROZENSET"
            stack += [sum(1 + size for size in popped) if hashable else 0] * len(opcode.stack_after)
        return stack[-1] if stack else 0

    def _pop(self, before: list[Any]) -> list[int]:
        """Take what an opcode takes from the stack, and return the values behind the mark, if it takes one."""
        if pickletools.markobject in before:
            mark = self._marks.pop()
            start = mark - before.index(pickletools.markobject)
        else:
            mark = start = len(self._stack) - len(before)
        popped = self._stack[mark:]
        del self._stack[start:]
        return popped


def _torch_load(file: IO[bytes], trust: bool) -> Any:
    # Training states hold numpy's numbers here and there; `safe_globals` came with torch 2.5.
    numbers = [_multiarray.scalar, np.dtype, *(type(np.dtype(kind)) for kind in (bool, "i4", "i8", "f4", "f8"))]
    allow = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
    with allow(numbers):
        return torch.load(file, map_location="cpu", weights_only=not trust)


class _Call:
    """A function that a pickle may call but, since this has no attributes, not change."""

    __slots__ = ("__call",)

    def __init__(self, function: Callable) -> None:
        self.__call = function

    def __call__(self, *args: Any) -> Any:
        return self.__call(*args)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise CheckpointError(refusal(f"the codec {encoding}"))
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _Call(_latin1),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Call(torch._utils._rebuild_parameter),
}
for _place in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_place}.multiarray", "_reconstruct"] = _Call(_multiarray._reconstruct)
    _ALLOWED[f"{_place}.multiarray", "scalar"] = _Call(_multiarray.scalar)
    _ALLOWED[f"{_place}.numeric", "_frombuffer"] = _Call(_numeric._frombuffer)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows arrays, tensors and Python's plain containers; anything else is refused before it is imported."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self._unread = file.seek(0, os.SEEK_END)
        self._storages = 0
        file.seek(0)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _Call(self._load_storage)
        if (module, name) not in _ALLOWED:
            raise CheckpointError(refusal(f"{module}.{name}"))
        return _ALLOWED[module, name]

    def _load_storage(self, content: bytes) -> Any:
        """Read a tensor's storage, a nested file of torch's format; the same bytes again and again are refused."""
        self._unread -= len(content)
        self._storages += 1
        if self._unread < 0 or self._storages > _MAX_STORAGES:
            raise CheckpointError(
                "holds too many storages to be weights, or the same ones many times, so it was not read."
            )
        _check_pickles(io.BytesIO(content), is_zip=content.startswith(ZIP_MAGIC))
        return _torch_load(io.BytesIO(content), trust=False)
