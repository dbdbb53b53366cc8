"""Reading weight files of every kind without running anything that they hold."""

import contextlib
import importlib.util
import io
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dimaskdino.errors import CheckpointError

logger = logging.getLogger(__name__)

# Entries under which training codes keep the weights, the plain ones before their moving averages.
MODEL_ENTRIES = ("model", "state_dict", "model_state", "blobs")
AVERAGED_ENTRIES = ("ema_state", "model_ema", "ema", "state_dict_ema")
# Entry that says whose weights they are; in safetensors, of the file's metadata.
AUTHOR = "__author__"
# What wrappers of a model put before every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

ZIP_MAGIC = b"PK\x03\x04"

# numpy 2 moved the functions that rebuild arrays; files of either age name either place.
_NUMPY = "numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core"
_multiarray = importlib.import_module(f"{_NUMPY}.multiarray")
_numeric = importlib.import_module(f"{_NUMPY}.numeric")


def read_weights(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a weight file: torch's own formats, safetensors, or a pickle of arrays.

    Args:
        path: a local file.
        trust: unpickle whatever the file holds, which lets it run any code; logged as a warning.

    Returns:
        The file's entries; "model" is its state dict, names as in the file but for wrappers' prefixes, values tensors
        on the CPU. "__author__" is "Caffe2" for the weights of Caffe2's model zoo.

    Raises:
        CheckpointError: for a file that is damaged, holds no weights, or would run code.
    """
    path = Path(path)
    content = _read_content(path, trust)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not weights by name.")
    return _entries(path, dict(content))


def _read_content(path: Path, trust: bool) -> Any:
    if trust:
        logger.warning("%s is trusted: whatever code it holds is run while it is read.", path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            file.seek(0)
            if path.suffix == ".pkl" and not is_zip:
                # Python 2 wrote the oldest ones: latin1 keeps their bytes as they are.
                return (pickle.Unpickler if trust else _ArrayUnpickler)(file, encoding="latin1").load()
            return _torch_load(file, trust)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        if found := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", str(error)):
            raise CheckpointError(f"{path} {_refusal(found[1])}") from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read as weights ({type(error).__name__}: {reason}).") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        author = (file.metadata() or {}).get(AUTHOR)
    weights = load_file(path)
    return weights if author is None else {"model": weights, AUTHOR: author}


def _refusal(what: str) -> str:
    return (
        f"asks for {what}, which is no weight and could run code, so it was not read. If you know where the file is "
        "from, tools/convert_checkpoint.py with --trust rewrites it as plain weights, running whatever it holds."
    )


def _torch_load(file: IO[bytes], trust: bool) -> Any:
    # Training states hold numpy's numbers here and there; `safe_globals` came with torch 2.5.
    numbers = [_multiarray.scalar, np.dtype, *(type(np.dtype(kind)) for kind in (bool, "i4", "i8", "f4", "f8"))]
    allow = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
    with allow(numbers):
        return torch.load(file, map_location="cpu", weights_only=not trust)


class _Call:
    """A function that a pickle may call but, having no attributes, not change."""

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
    # Tensors inside a plain pickle: their storages come as nested files of torch's own format.
    ("torch._utils", "_rebuild_tensor_v2"): _Call(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Call(torch._utils._rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Call(lambda content: _torch_load(io.BytesIO(content), trust=False)),
}
for _place in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_place}.multiarray", "_reconstruct"] = _Call(_multiarray._reconstruct)
    _ALLOWED[f"{_place}.multiarray", "scalar"] = _Call(_multiarray.scalar)
    _ALLOWED[f"{_place}.numeric", "_frombuffer"] = _Call(_numeric._frombuffer)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows arrays, tensors and Python's plain containers; everything else is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(_refusal(f"{module}.{name}"))
        return _ALLOWED[module, name]


def _entries(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Put the state dict under "model", keep what else the file holds."""
    if content and all(isinstance(value, Tensor | np.ndarray) for value in content.values()):
        caffe2 = path.suffix == ".pkl" and not any("." in str(key) for key in content)
        content = {"model": content, **({AUTHOR: "Caffe2"} if caffe2 else {})}
    averaged = [entry for entry in AVERAGED_ENTRIES if isinstance(content.get(entry), Mapping)]
    entry = next((e for e in (*MODEL_ENTRIES, *averaged) if isinstance(content.get(e), Mapping)), None)
    if entry is None:
        raise CheckpointError(f"{path} holds no weights; its entries are {', '.join(map(str, content)) or 'none'}.")
    if entry in averaged:
        logger.info("%s holds moving averages of weights alone (%s): they are used.", path, entry)
    elif averaged:
        logger.info("%s also holds moving averages of the weights (%s): they are not used.", path, ", ".join(averaged))
    if entry == "blobs":
        content[AUTHOR] = "Caffe2"
    content["model"] = _state_dict(path, content.pop(entry))
    return content


def _state_dict(path: Path, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    if not raw:
        raise CheckpointError(f"{path} holds no weights: the state dict in it is empty.")
    # Caffe2 keeps its optimiser's state beside the weights.
    raw = _unwrapped({str(key): value for key, value in raw.items() if not str(key).endswith("_momentum")})
    state = {}
    for key, value in raw.items():
        try:
            state[key] = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        except TypeError as error:
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, not an array.") from error
    return state


def _unwrapped(raw: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes of wrappers; a model may be wrapped more than once, in any order."""
    for prefix in WRAPPER_PREFIXES:
        if raw and all(key.startswith(prefix) for key in raw):
            return _unwrapped({key.removeprefix(prefix): value for key, value in raw.items()})
    return raw
