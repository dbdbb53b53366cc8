"""Which checkpoint of a folder a run goes on from, and which files are recognized as damaged."""

import logging
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.checkpoint.folder import damage
from dimaskdino.errors import CheckpointError
from tests.checkpoint.models import Counter


def save(folder: Path, *iterations: int, run_id: str = "this", final: int | None = None) -> None:
    """Write checkpoints whose weights are the iteration."""
    checkpointer = Checkpointer(nn.Linear(1, 1), str(folder), trainer=Counter(0))
    checkpointer.run_id = run_id
    for iteration in [*iterations, *([] if final is None else [final])]:
        nn.init.constant_(checkpointer.model.weight, iteration)
        name = "model_final" if iteration == final else f"model_{iteration:07d}"
        checkpointer.save(name, iteration=iteration)


def resumed(folder: Path, *, run_id: str = "this") -> float | None:
    """The iteration that a run goes on from; None if it starts anew."""
    checkpointer = Checkpointer(nn.Linear(1, 1), str(folder), trainer=Counter(0))
    checkpointer.run_id = run_id
    if not checkpointer.has_checkpoint():
        return None
    checkpointer.resume_or_load("", resume=True)
    return checkpointer.model.weight.item()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with torch.serialization._open_zipfile_reader(str(path)) as archive:
        content[archive.get_record_offset("data/0")] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("spoil", [halve, cut_the_end, flip, empty, zeros, Path.unlink])
def test_checkpoint_before_a_damaged_one_is_used(tmp_path, spoil, caplog):
    save(tmp_path, 3, 7, 11)
    assert resumed(tmp_path) == 11
    last = tmp_path / "model_0000011.pth"
    spoil(last)
    assert damage(last)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 7
    assert str(last) in caplog.text
    assert "model_0000007.pth" in caplog.text
    flip(tmp_path / "model_0000007.pth")
    assert resumed(tmp_path) == 3


def test_any_altered_byte_of_weights_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = tmp_path / "model_0000003.pth"
    whole = path.read_bytes()
    expected = torch.load(path)
    for place in random.Random(1).sample(range(len(whole)), 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        if not damage(path):  # a byte that means nothing, such as padding
            assert str(torch.load(path)) == str(expected)


@pytest.mark.parametrize(
    "tag", [b"", b"caf\xe9.pth", b"model_0000001.pth", b"../model_0000003.pth", b"/etc/passwd", b".."]
)
def test_unusable_last_checkpoint_is_passed_over(tmp_path: Path, tag: bytes, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "run", 3, 7)
    save(tmp_path, 3)
    (tmp_path / "run" / "last_checkpoint").write_bytes(tag)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path / "run") == 7
    assert "last_checkpoint" in caplog.text


def test_final_checkpoint_counts_by_its_iteration(tmp_path: Path) -> None:
    save(tmp_path, 3, final=5)
    save(tmp_path, 9)
    empty(tmp_path / "model_0000009.pth")
    assert resumed(tmp_path) == 5


def test_lost_last_checkpoint_is_found_by_its_run(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == 3
    assert resumed(tmp_path, run_id="another") is None
    assert resumed(tmp_path, run_id="") is None


def test_checkpoints_of_another_run_are_not_used(tmp_path: Path) -> None:
    save(tmp_path, 3, 7, run_id="before")
    save(tmp_path, 5)
    empty(tmp_path / "model_0000005.pth")
    with pytest.raises(CheckpointError, match=r"last_checkpoint.*--resume"):
        resumed(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path), trainer=Counter(0))
    for value in (float("nan"), float("inf")):
        nn.init.constant_(checkpointer.model.bias, value)
        with pytest.raises(CheckpointError, match=r"model_0000007\.pth.*bias.*--resume"):
            checkpointer.save("model_0000007", iteration=7)
    assert not (tmp_path / "model_0000007.pth").exists()
    assert resumed(tmp_path, run_id="this") == 3
