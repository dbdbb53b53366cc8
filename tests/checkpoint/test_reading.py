"""Weight files of every kind are read, soon and without running code."""

import os
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dimaskdino.checkpoint import pickles, read_weights, reading
from dimaskdino.errors import CheckpointError
from tests.checkpoint.models import RunsCode

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1, 2])}


def save_pickle(content: Any, path: Path, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def save_torch(content: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_weights(read: dict[str, Any]) -> None:
    assert read["model"].keys() == WEIGHTS.keys()
    for key, value in WEIGHTS.items():
        assert read["model"][key].dtype == value.dtype
        assert torch.equal(read["model"][key], value)


def test_torch_files_of_both_formats_are_read(tmp_path: Path) -> None:
    for zipped in (True, False):
        assert_weights(read_weights(save_torch({"model": WEIGHTS}, tmp_path / "a.pth", zipped)))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_arrays_and_tensors_are_read(tmp_path: Path, protocol: int) -> None:
    arrays = {key: value.numpy() for key, value in WEIGHTS.items()}
    for weights in (arrays, OrderedDict(arrays), WEIGHTS):
        assert_weights(read_weights(save_pickle({"model": weights, "__author__": "us"}, tmp_path / "a.pkl", protocol)))


def test_pipe_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth is not a regular file"):
        read_weights(tmp_path / "a.pth")


def test_a_torch_file_may_be_called_pkl(tmp_path: Path) -> None:
    assert_weights(read_weights(save_torch({"model": WEIGHTS}, tmp_path / "a.pkl")))


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert_weights(read_weights(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod.module.module."]
)
def test_wrapper_prefixes_are_dropped(tmp_path: Path, prefix: str) -> None:
    wrapped = {prefix + key: value for key, value in WEIGHTS.items()}
    assert_weights(read_weights(save_torch({"model": wrapped}, tmp_path / "a.pth")))


@pytest.mark.parametrize("entry", ["state_dict", "model_state", "ema_state"])
def test_weights_are_found_under_common_entries(tmp_path: Path, entry: str) -> None:
    assert_weights(read_weights(save_torch({entry: WEIGHTS, "epoch": 3}, tmp_path / "a.pth")))


def test_plain_weights_are_preferred_to_averages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    averages = {key: value * 0 for key, value in WEIGHTS.items()}
    with caplog.at_level("INFO"):
        assert_weights(read_weights(save_torch({"ema_state": averages, "model": WEIGHTS}, tmp_path / "a.pth")))
    assert "moving averages of the weights (ema_state); they are not used" in caplog.text


def test_names_that_are_numbers_are_read(tmp_path: Path) -> None:
    assert list(read_weights(save_torch({1: torch.zeros(1)}, tmp_path / "a.pth"))["model"]) == ["1"]


def test_a_training_state_with_numpy_numbers_is_read(tmp_path: Path) -> None:
    state = {"best": np.float64(0.5), "step": np.int64(3), "groups": [{"lr": 0.1}]}
    read = read_weights(save_torch({"model": WEIGHTS, "trainer": state}, tmp_path / "a.pth"))
    assert read["trainer"] == state


def test_caffe2_files_are_recognized_by_their_form(tmp_path: Path) -> None:
    blobs = {"conv1_w": np.zeros((1, 1), np.float32), "conv1_w_momentum": np.zeros((1, 1), np.float32)}
    for content in (blobs, {"blobs": blobs, "cfg": "text"}):
        read = read_weights(save_pickle(content, tmp_path / "a.pkl"))
        assert read["__author__"] == "Caffe2"
        assert list(read["model"]) == ["conv1_w"]


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "legacy.pth", "zip.pkl"])
@pytest.mark.parametrize("place", ["weight", "entry"])
def test_files_that_would_run_code_are_refused(tmp_path: Path, name: str, place: str) -> None:
    trap = RunsCode(tmp_path / "made")
    content = {"model": {**WEIGHTS, "b": trap}} if place == "weight" else {"model": WEIGHTS, "trainer": trap}
    if name == "a.pkl":
        path = save_pickle(content, tmp_path / name)
    else:
        path = save_torch(content, tmp_path / name, zipped=name != "legacy.pth")
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.mkdir, .*could run code.*--trust"):
        read_weights(path)
    assert not (tmp_path / "made").exists()


def test_nested_storages_run_no_code(tmp_path: Path) -> None:
    nested = save_torch(RunsCode(tmp_path / "made"), tmp_path / "nested.pth", zipped=False).read_bytes()

    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (nested,)

    with pytest.raises(CheckpointError, match="could run code"):
        read_weights(save_pickle({"model": {"a": Storage()}}, tmp_path / "a.pkl"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("module", ["builtins", "os", "numpy", "torch", "torch.storage", "functools"])
def test_pickles_reach_only_arrays_and_tensors(tmp_path: Path, module: str) -> None:
    name = {"builtins": "eval", "os": "system", "numpy": "load", "torch": "load", "functools": "partial"}.get(
        module, "os"
    )
    (tmp_path / "a.pkl").write_bytes(b"c" + f"{module}\n{name}\n.".encode())
    with pytest.raises(CheckpointError, match=f"asks for {module}.{name}"):
        read_weights(tmp_path / "a.pkl")


def test_files_cannot_change_the_functions_they_call(tmp_path: Path) -> None:
    defaults = torch._utils._rebuild_parameter.__defaults__
    path = tmp_path / "a.pkl"
    # Protocol 2: fetch the function, then "build" it with a state of attributes to set.
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b.")
    with pytest.raises(CheckpointError):
        read_weights(path)
    assert torch._utils._rebuild_parameter.__defaults__ == defaults


def test_trusted_files_may_run_code_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.pkl", "a.pth"):
        content = {"model": WEIGHTS, "other": RunsCode(tmp_path / f"made by {name}")}
        path = (save_pickle if name.endswith("pkl") else save_torch)(content, tmp_path / name)
        assert_weights(read_weights(path, trust=True))
        assert (tmp_path / f"made by {name}").exists()
        assert f"{path} is trusted" in caplog.text


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut short"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as weights"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not weights by name"),
        ({"epoch": 3}, "holds no weights; its entries are epoch"),
        ({}, "its entries are none"),
        ({"model": {}}, "holds no weights: its state dict is empty"),
        ({"model": {"a": "text"}}, "holds a str as a, not an array"),
        ({"model": {"a": {"b": torch.zeros(1)}}}, "holds a dict as a, not an array"),
        ({"model": {"a": [[1.0]]}}, "holds a list as a, not an array"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_weights(save_torch(content, tmp_path / "a.pth"))


def doubling(levels: int) -> list[Any]:
    """A list of 2 ** ``levels`` numbers in as many lines."""
    nested: list[Any] = [1.0]
    for _ in range(levels):
        nested = [nested, nested]
    return nested


def doubling_key(levels: int) -> bytes:
    """The pickle of a dictionary whose key is a tuple of 2 ** ``levels`` values; hashing it would take ages."""
    pairs = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b"\x80\x02}(K\x01K\x01\x86q\x00" + pairs + b"K\x01u."


def as_torch_file(pickled: bytes, path: Path) -> Path:
    """A zip of torch's that holds ``pickled``."""
    save_torch({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("kind", ["list.pkl", "list.pth", "key.pkl", "key.pth", "storages.pkl"])
def test_nested_pickles_end_soon(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind.startswith("list"):
        content = {"model": {"a": doubling(40)}}
        save_pickle(content, path) if kind == "list.pkl" else save_torch(content, path)
    elif kind == "key.pkl":
        path.write_bytes(doubling_key(40))
    elif kind == "key.pth":
        as_torch_file(doubling_key(40), path)
    else:
        storage = save_torch(torch.zeros(3), tmp_path / "storage.pth", zipped=False).read_bytes()
        loads = b"h\x00h\x01\x85R0" * 100_000
        head = b"\x80\x02ctorch.storage\n_load_from_bytes\nq\x00T" + len(storage).to_bytes(4, "little") + storage
        path.write_bytes(head + b"q\x01" + loads + b".")
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=kind) as error:
        read_weights(path)
    assert time.monotonic() - started < 20
    assert "\n" not in str(error.value)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MAX_TENSORS", 1)
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", save_torch({"model": WEIGHTS}, tmp_path / "a.pth")):
        with pytest.raises(CheckpointError, match=f"{path.name} holds 2 tensors"):
            read_weights(path)


def test_long_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_WORK", 50)
    for name, zipped in (("zip.pth", True), ("legacy.pth", False)):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle too long"):
            read_weights(save_torch({"model": WEIGHTS}, tmp_path / name, zipped))
