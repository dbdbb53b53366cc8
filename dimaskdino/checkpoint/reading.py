"""Reading weight files of every kind in bounded time and without running code, and writing them."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dimaskdino.errors import CheckpointError

logger = logging.getLogger(__name__)

# Entries under which training codes keep the weights; plain weights are preferred to their moving averages.
MODEL_ENTRIES = ("model", "state_dict", "model_state", "blobs")
AVERAGED_ENTRIES = ("ema_state", "model_ema", "ema", "state_dict_ema")
# Entries that describe the weights and stay with them: whose weights they are, and the classes by index.
AUTHOR = "__author__"
CLASS_NAMES = "class_names"
DESCRIPTIONS = (AUTHOR, CLASS_NAMES)
# What wrappers of a model put before every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

ZIP_MAGIC = b"PK\x03\x04"
SAFETENSORS = ".safetensors"

# Far beyond any checkpoint of these models, and read in seconds.
_MAX_TENSORS = 50_000
_MAX_PICKLED = 1_000_000
_MAX_STORAGES = 5_000

# numpy 2 moved the functions that rebuild arrays; older files name the older place.
_NUMPY = "numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core"
_multiarray = importlib.import_module(f"{_NUMPY}.multiarray")
_numeric = importlib.import_module(f"{_NUMPY}.numeric")


def read_weights(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a weight file: torch's own formats, safetensors, or a pickle of arrays.

    Args:
        path: a local file.
        trust: unpickle whatever the file holds, which lets it run any code; logged as a warning.

    Returns:
        The file's entries. "model" is its state dict on the CPU, without the prefixes of wrappers. "__author__" is
        "Caffe2" for weights of Caffe2's model zoo.

    Raises:
        CheckpointError: a file that is damaged, holds no weights, would run code, or takes too long to read.
    """
    path = Path(path)
    try:
        content = _read_content(path, trust)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"holds a {type(content).__name__}, not weights by name.")
        return _entries(path, dict(content))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error


def class_names_of(content: Mapping[str, Any]) -> list[str] | None:
    """The class names by index in what :func:`read_weights` returns; None if the file does not hold them."""
    names = content.get(CLASS_NAMES)
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def write_weights(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``path`` completely or not at all, as safetensors if its name ends so, else in torch's format.

    Raises:
        CheckpointError: the path is a folder or cannot be written, or the format cannot hold all of ``content``.
    """
    others = [key for key in content if key not in ("model", *DESCRIPTIONS)]
    if path.suffix == SAFETENSORS and others:
        raise CheckpointError(
            f"{path}: {SAFETENSORS} holds weights alone, not {', '.join(others)}; give --strip to leave that out, or "
            "another suffix."
        )
    with replacing(path) as partial:
        if path.suffix == SAFETENSORS:
            _write_safetensors(partial, content)
        else:
            torch.save(dict(content), partial)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write to, which replaces ``path`` only once it is complete.

    Raises:
        CheckpointError: the path is a folder, or cannot be written.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of the file to write.")
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({type(error).__name__}: {error}).") from error
    finally:
        if partial.is_file():
            partial.unlink()


def _write_safetensors(path: Path, content: Mapping[str, Any]) -> None:
    metadata = {key: json.dumps(content[key]) for key in DESCRIPTIONS if key in content}
    # safetensors refuses tensors that share memory, as the names of one head do in a release.
    copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in content["model"].items()}
    save_file(copies, path, metadata)


def _read_content(path: Path, trust: bool) -> Any:
    if trust:
        logger.warning("%s is trusted: whatever code it holds is run while it is read.", path)
    try:
        if path.suffix == SAFETENSORS:
            return _read_safetensors(path)
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            file.seek(0)
            is_pickle = path.suffix == ".pkl" and not is_zip
            if not trust:
                _check_pickles(file, is_zip=is_zip, count=1 if is_pickle else 5)
            if is_pickle:
                return (_TrustingUnpickler if trust else _ArrayUnpickler)(file).load()
            return _torch_load(file, trust)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        if found := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", str(error)):
            raise CheckpointError(_refusal(found[1])) from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot be read as weights ({type(error).__name__}: {reason}).") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        _check_number(file.keys())
        metadata = file.metadata() or {}
    content: dict[str, Any] = {"model": load_file(path)}
    for key in DESCRIPTIONS:
        if key in metadata:
            content[key] = _from_metadata(metadata[key])
    return content


def _from_metadata(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # Files of earlier versions hold the author as it is.


def _check_number(names: Collection[str]) -> None:
    if len(names) > _MAX_TENSORS:
        raise CheckpointError(f"holds {len(names):,} tensors, far more than any model here has.")


def _refusal(what: str) -> str:
    return (
        f"asks for {what}, which is not a weight and could run code, so it was not read. If you know where the file is "
        "from, tools/convert_checkpoint.py --trust rewrites it as plain weights, running whatever it holds."
    )


def _check_pickles(file: IO[bytes], *, is_zip: bool, count: int = 5) -> None:
    """Bound the time that unpickling takes, that is, the opcodes and what their tuples expand to.

    Args:
        file: a file of pickles, at its start.
        is_zip: it is torch's zip; otherwise it starts with pickles.
        count: how many; torch's older format has 5 before its data.

    Raises:
        CheckpointError: it is too long, or has tuples that contain each other so often that hashing one does not end.
    """
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    _check_opcodes(archive.open(name), 1)
    else:
        _check_opcodes(file, count)
    file.seek(0)


def _check_opcodes(file: IO[bytes], count: int) -> None:
    """Follow pickles on a stack that holds the number of values in each tuple, 0 for the rest, and None for marks."""
    work = 0
    for _ in range(count):
        stack: list[int | None] = []
        memo: dict[int, int | None] = {}
        for opcode, argument, _ in pickletools.genops(file):
            _follow(opcode, argument, stack, memo)
            work += 1 + ((stack[-1] or 0) if stack else 0)
            if work > _MAX_PICKLED:
                raise CheckpointError("is a pickle too long or too deeply nested to be weights, so it was not read.")


def _follow(opcode: Any, argument: Any, stack: list[int | None], memo: dict[int, int | None]) -> None:
    if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif opcode.name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif opcode.name == "DUP":
        stack.append(stack[-1])
    elif opcode.name == "MARK":
        stack.append(None)
    else:
        popped = _pop(opcode, stack)
        hashable = "TUPLE" in opcode.name or opcode.name == "FROZENSET"
        size = sum(1 + (each or 0) for each in popped) if hashable else 0
        stack += [size] * len(opcode.stack_after)


def _pop(opcode: Any, stack: list[int | None]) -> list[int | None]:
    """Take what ``opcode`` takes from the stack."""
    before = opcode.stack_before
    if pickletools.markobject not in before:
        start = len(stack) - len(before)
        popped = stack[start:]
        del stack[start:]
        return popped
    mark = len(stack) - 1 - stack[::-1].index(None)
    popped = stack[mark + 1 :]
    del stack[mark - before.index(pickletools.markobject) :]
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
        raise CheckpointError(_refusal(f"the codec {encoding}"))
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


class _TrustingUnpickler(pickle.Unpickler):
    """Keeps the bytes of the oldest files, which Python 2 wrote."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")


class _ArrayUnpickler(_TrustingUnpickler):
    """Knows arrays, tensors and Python's plain containers; anything else is refused before it is imported."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._unread = file.seek(0, os.SEEK_END)
        self._storages = 0
        file.seek(0)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _Call(self._load_storage)
        if (module, name) not in _ALLOWED:
            raise CheckpointError(_refusal(f"{module}.{name}"))
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


def _entries(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Put the state dict under "model", and keep what else the file holds."""
    if content and all(isinstance(value, Tensor | np.ndarray) for value in content.values()):
        caffe2 = path.suffix == ".pkl" and not any("." in str(key) for key in content)
        content = {"model": content, **({AUTHOR: "Caffe2"} if caffe2 else {})}
    averaged = [entry for entry in AVERAGED_ENTRIES if isinstance(content.get(entry), Mapping)]
    entry = next((e for e in (*MODEL_ENTRIES, *averaged) if isinstance(content.get(e), Mapping)), None)
    if entry is None:
        found = ", ".join(str(key)[:40] for key in list(content)[:10]) or "none"
        raise CheckpointError(f"holds no weights; its entries are {found}.")
    if entry in averaged:
        logger.info("%s holds only moving averages of weights (%s); they are used.", path, entry)
    elif averaged:
        logger.info("%s also holds moving averages of the weights (%s); they are not used.", path, ", ".join(averaged))
    if entry == "blobs":
        content[AUTHOR] = "Caffe2"
    content["model"] = _state_dict(content.pop(entry))
    return content


def _state_dict(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    if not raw:
        raise CheckpointError("holds no weights: its state dict is empty.")
    _check_number(raw)
    # Caffe2 keeps its optimizer's state beside the weights.
    raw = _unwrapped({str(key): value for key, value in raw.items() if not str(key).endswith("_momentum")})
    state = {}
    for key, value in raw.items():
        try:
            if not isinstance(value, Tensor | np.ndarray | np.generic | int | float):
                raise TypeError  # A list could expand to anything.
            state[key] = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        except TypeError as error:
            raise CheckpointError(f"holds a {type(value).__name__} as {key:.80}, not an array of numbers.") from error
    return state


def _unwrapped(raw: dict[str, Any]) -> dict[str, Any]:
    """Remove the prefixes of wrappers; a model may be wrapped more than once, in any order."""
    for prefix in WRAPPER_PREFIXES:
        if raw and all(key.startswith(prefix) for key in raw):
            return _unwrapped({key.removeprefix(prefix): value for key, value in raw.items()})
    return raw
