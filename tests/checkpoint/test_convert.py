"""tools/convert_checkpoint.py: there and back, and what it refuses."""

import pickle
import re
import runpy
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dimaskdino.checkpoint import is_release, read_weights
from tests.checkpoint.models import RunsCode, randomised, save, small_model

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def run(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
    runpy.run_path(str(TOOL), run_name="__main__")


def assert_same_weights(path: Path, ours: dict[str, torch.Tensor]) -> None:
    back = read_weights(path)["model"]
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_a_round_trip_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = randomised(small_model())
    save({"model": ours}, tmp_path / "ours.pth")
    run(monkeypatch, tmp_path / "ours.pth", tmp_path / "new" / "theirs.pth", "--to", "release")
    theirs = torch.load(tmp_path / "new" / "theirs.pth", weights_only=True)["model"]
    assert is_release(theirs)
    assert theirs["criterion.empty_weight"].tolist() == pytest.approx([1, 1, 1, 1, 1, 0.1])
    # Names of one tensor are stored as one tensor, so the file is no larger.
    names = ("_bbox_embed", "bbox_embed.0", "decoder.bbox_embed.1")
    shared = {theirs[f"sem_seg_head.predictor.{name}.layers.0.bias"].data_ptr() for name in names}
    assert len(shared) == 1
    run(monkeypatch, tmp_path / "new" / "theirs.pth", tmp_path / "back.pth", "--to", "ours")
    assert_same_weights(tmp_path / "back.pth", ours)


@pytest.mark.parametrize("to", ["release", "detrex"])
def test_dino_makes_a_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, to: str) -> None:
    dino = {
        "MODEL.META_ARCHITECTURE": "DINO",
        "MODEL.DINO.HIDDEN_DIM": 32,
        "MODEL.DINO.DEC_LAYERS": 2,
        "MODEL.DINO.SHARED_HEADS": to == "release",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 80,
    }
    ours = randomised(small_model(dino))
    save({"model": ours}, tmp_path / "ours.pth")
    run(monkeypatch, tmp_path / "ours.pth", tmp_path / "theirs.pth", "--to", to)
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert is_release(theirs)
    assert len(theirs["class_embed.1.bias"]) == (91 if to == "release" else 80)
    run(monkeypatch, tmp_path / "theirs.pth", tmp_path / "back.pth", "--to", "ours")
    assert ("category id" in capsys.readouterr().out) == (to == "release")
    assert_same_weights(tmp_path / "back.pth", ours)


@pytest.mark.parametrize(
    ("to", "strip", "kept"), [("ours", [], True), ("ours", ["--strip"], False), ("release", [], False)]
)
def test_training_state_is_kept_only_if_names_stay(tmp_path, monkeypatch, capsys, to, strip, kept):
    content = {"model": randomised(small_model()), "trainer": {"optimizer": {}}, "iteration": 3}
    run(monkeypatch, save(content, tmp_path / "a.pth"), tmp_path / "b.pth", "--to", to, *strip)
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert (written.keys() == content.keys()) == kept
    assert ("Left out the training state" in capsys.readouterr().out) != kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.pth does not exist"),
        ({"epoch": 3}, "a.pth holds no weights"),
        ({"model": {"a": torch.zeros(1)}, "trainer": RunsCode()}, "could run code"),
    ],
)
def test_unusable_input_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys, content, message):
    if content is not None:
        save(content, tmp_path / "a.pth")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "a.pth", tmp_path / "b.pth", "--to", "ours")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "b.pth").exists()


def test_a_file_without_heads_keeps_its_names(tmp_path, monkeypatch, capsys):
    path = save({"model": {"fc.weight": torch.zeros(1)}, "__author__": "Caffe2"}, tmp_path / "a.pth")
    run(monkeypatch, path, tmp_path / "b.pth", "--to", "release")
    assert "names are kept" in capsys.readouterr().out
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(written["model"]) == ["fc.weight"]
    assert written["__author__"] == "Caffe2"


def test_safetensors_make_a_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = randomised(small_model())
    ours["strided"] = torch.arange(6.0).reshape(2, 3).T
    path = save({"model": ours, "iteration": 3}, tmp_path / "ours.pth")
    run(monkeypatch, path, tmp_path / "theirs.safetensors", "--to", "release", "--strip")
    assert is_release(load_file(tmp_path / "theirs.safetensors"))
    run(monkeypatch, tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", "--to", "ours")
    assert_same_weights(tmp_path / "back.safetensors", ours)


@pytest.mark.parametrize("strip", [[], ["--strip"]])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_descriptions_stay_with_the_weights(tmp_path, monkeypatch, suffix, strip):
    content = {"blobs": {"conv1_w": np.ones(2, np.float32)}, "class_names": ["car", "bus"]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))  # "blobs" are Caffe2's.
    for source, target in (("a.pkl", f"b{suffix}"), (f"b{suffix}", f"c{suffix}")):
        run(monkeypatch, tmp_path / source, tmp_path / target, "--to", "ours", *strip)
    content = read_weights(tmp_path / f"c{suffix}")
    assert content.keys() == {"model", "__author__", "class_names"}
    assert content["class_names"] == ["car", "bus"]
    assert content["__author__"] == "Caffe2"
    assert content["model"]["conv1_w"].tolist() == [1, 1]


def broken_save(content: object, file: BinaryIO) -> None:
    file.write(b"half a file")
    raise RuntimeError("the disk is full")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("b.safetensors", "holds weights alone, not trainer, iteration; give --strip"),
        ("folder", "is a folder"),
        ("a.pth/b.pth", "cannot be written"),
        ("new/b.pth", "cannot be written .*the disk is full"),
    ],
)
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, capsys, output, message):
    content = {"model": randomised(small_model()), "trainer": {"optimizer": {}}, "iteration": 3}
    path = save(content, tmp_path / "a.pth")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, path, tmp_path / output, "--to", "ours")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.pth"]


def test_the_input_is_not_overwritten(tmp_path, monkeypatch, capsys):
    path = save({"model": randomised(small_model())}, tmp_path / "a.pth")
    with pytest.raises(SystemExit):
        run(monkeypatch, path, path, "--to", "release")
    assert "is the input itself" in capsys.readouterr().err


def test_a_trusted_file_is_converted_with_a_warning(tmp_path, monkeypatch, caplog):
    path = save({"model": randomised(small_model()), "trainer": RunsCode()}, tmp_path / "a.pth")
    run(monkeypatch, path, tmp_path / "b.pth", "--to", "ours", "--strip", "--trust")
    assert "is trusted" in caplog.text
    assert (tmp_path / "b.pth").exists()
