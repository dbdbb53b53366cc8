"""Reading weight files of every kind in bounded time and without running code, and writing them."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dimaskdino.checkpoint.pickles import refusal, unpickle
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

SAFETENSORS = ".safetensors"

# Far beyond any of these models, and read in seconds.
_MAX_TENSORS = 50_000


def read_weights(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a weight file: torch's own formats, safetensors, or a pickle of arrays.

    ``trust`` lets whatever the file holds run any code, which is logged as a warning.

    Returns:
        The file's entries. "model" is its state dict on the CPU, without the prefixes of wrappers. "__author__" is
        "Caffe2" for weights of Caffe2's model zoo.

    Raises:
        CheckpointError: a file that is damaged, holds no weights, would run code, or takes too long to read.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe waits
            raise CheckpointError("is not a regular file; give the path of a weight file.")
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
            # safetensors refuses tensors that share memory, as the names of one head do in a release.
            copies = {
                key: value.clone(memory_format=torch.contiguous_format) for key, value in content["model"].items()
            }
            save_file(copies, partial, {key: json.dumps(content[key]) for key in DESCRIPTIONS if key in content})
            return
        with partial.open("wb") as file:  # torch's own files do not say why they cannot be written
            torch.save(dict(content), file)


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
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({type(error).__name__}: {error}).") from error
    finally:
        if partial.is_file():
            partial.unlink()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with contextlib.suppress(PermissionError, IsADirectoryError):  # of systems that cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_content(path: Path, trust: bool) -> Any:
    if trust:
        logger.warning("%s is trusted: whatever code it holds is run while it is read.", path)
    try:
        if path.suffix == SAFETENSORS:
            return _read_safetensors(path)
        with path.open("rb") as file:
            return unpickle(file, plain=path.suffix == ".pkl", trust=trust)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        if found := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", str(error)):
            raise CheckpointError(refusal(found[1])) from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot be read as weights ({type(error).__name__}: {reason}).") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        _check_number(file.keys())
        metadata = file.metadata() or {}
    content: dict[str, Any] = {"model": load_file(path)}
    for key in metadata.keys() & {*DESCRIPTIONS}:
        content[key] = metadata[key]
        with contextlib.suppress(ValueError):  # files of earlier versions hold the author as it is
            content[key] = json.loads(metadata[key])
    return content


def _check_number(names: Collection[str]) -> None:
    if len(names) > _MAX_TENSORS:
        raise CheckpointError(f"holds {len(names):,} tensors, far more than any model here has.")


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
