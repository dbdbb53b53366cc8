"""A checkpoint that is written beside the training is the one of its moment, or the one before stays."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dimaskdino.checkpoint import Checkpointer, checkpointer
from dimaskdino.checkpoint.background import BackgroundWriter, copied
from dimaskdino.checkpoint.folder import newest_good
from dimaskdino.checkpoint.reading import write_weights
from dimaskdino.errors import CheckpointError


class Gate:
    """Takes the place of write_weights: waits until it is open, then writes, or fails if it must."""

    def __init__(self) -> None:
        self.open, self.begun, self.error = threading.Event(), 0, None

    def __call__(self, path: Path, content: dict[str, Tensor]) -> None:
        self.begun += 1
        assert self.open.wait(30)
        if self.error:
            raise self.error
        write_weights(path, content)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(checkpointer, "write_weights", gate)
    return gate


@pytest.fixture
def saver(tmp_path: Path) -> Checkpointer:
    saver = Checkpointer(nn.Linear(1, 1, bias=False), str(tmp_path))
    saver.run_id, saver.in_background = "a run", True
    return saver


def fill(saver: Checkpointer, value: float) -> None:
    nn.init.constant_(saver.model.weight, value)


def test_file_has_the_weights_of_its_moment(gate: Gate, saver: Checkpointer, tmp_path: Path) -> None:
    fill(saver, 1.0)
    saver.save("model_0000001", iteration=1)
    fill(saver, 2.0)
    gate.open.set()
    saver.finish()
    assert torch.load(tmp_path / "model_0000001.pth")["model"]["weight"].item() == 1.0
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_checkpoint_before_is_whole_until_the_new_one_is(gate: Gate, saver: Checkpointer, tmp_path: Path) -> None:
    gate.open.set()
    saver.save("model_0000001", iteration=1)
    saver.finish()
    gate.open.clear()
    saver.save("model_0000002", iteration=2)
    # What a run finds that is killed now.
    assert newest_good(tmp_path, "a run") == tmp_path / "model_0000001.pth"
    gate.open.set()
    saver.finish()
    assert newest_good(tmp_path, "a run") == tmp_path / "model_0000002.pth"


def test_one_is_written_at_a_time(gate: Gate, saver: Checkpointer) -> None:
    saver.save("model_0000001", iteration=1)
    second = threading.Thread(target=saver.save, args=("model_0000002",), kwargs={"iteration": 2})
    second.start()
    second.join(0.1)
    assert second.is_alive()
    assert gate.begun <= 1
    gate.open.set()
    second.join(30)
    saver.finish()
    assert gate.begun == 2


def test_error_is_raised_by_the_next_save_or_the_end(gate: Gate, saver: Checkpointer) -> None:
    gate.open.set()
    gate.error = CheckpointError("the disk is full")
    saver.save("model_0000001", iteration=1)
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.save("model_0000002", iteration=2)
    assert gate.begun == 1
    saver.save("model_0000003", iteration=3)
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.finish()
    saver.finish()  # says it once


def test_weights_that_are_not_finite_are_refused_at_once(saver: Checkpointer) -> None:
    fill(saver, torch.nan)
    with pytest.raises(CheckpointError, match="not finite: weight"):
        saver.save("model_0000001", iteration=1)


def test_work_without_error_leaves_none() -> None:
    done = []
    writer = BackgroundWriter()
    writer.start(lambda: done.append(1))
    writer.wait()
    writer.wait()
    assert done == [1]


def test_copy_shares_what_was_shared() -> None:
    value, empty = torch.ones(2, 2), torch.ones(0)
    copy = copied({"one": value, "same": [value.detach()], "transposed": value.T[:1], "empty": empty, "name": "x"})
    value.zero_()
    assert copy["one"].sum() == 4
    assert copy["same"][0].data_ptr() == copy["one"].data_ptr()
    assert copy["transposed"].shape == (1, 2)
    assert (copy["empty"].shape, copy["name"]) == ((0,), "x")
