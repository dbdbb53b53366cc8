"""SOLVER.CHECKPOINT_ASYNC in a run; see tests/checkpoint/test_background.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dimaskdino.checkpoint import checkpointer
from dimaskdino.config import Config
from dimaskdino.engine.best import check_best
from dimaskdino.errors import ConfigError, UserError
from tests.engine import killing


@pytest.fixture
def cfg(toy_cfg: Config) -> Config:
    """Ten iterations, with a checkpoint of every other one."""
    toy_cfg.merge_from_list(["SOLVER.CHECKPOINT_ASYNC", True, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ()])
    return toy_cfg


def test_run_saves_the_same_in_the_background(cfg: Config) -> None:
    cfg.SOLVER.CHECKPOINT_KEEP = 2
    found = []
    for in_background in (True, False):
        cfg.SOLVER.CHECKPOINT_ASYNC = in_background
        killing.train(cfg)
        paths = sorted(Path(cfg.OUTPUT_DIR).glob("*.pth"))
        found.append({path.name: torch.load(path) for path in paths})
        cfg.OUTPUT_DIR += "_now"
    background, now = found
    assert list(background) == list(now) == ["model_0000007.pth", "model_0000009.pth", "model_final.pth"]
    for name, content in background.items():
        torch.testing.assert_close(content["model"], dict(now[name]["model"]), rtol=0, atol=0)
        optimizers = [each["trainer"]["step"]["optimizer"] for each in (content, now[name])]
        torch.testing.assert_close(*optimizers, rtol=0, atol=0)


def test_full_disk_ends_the_run_in_one_line(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpointer.write_weights

    def write_first(path: Path, content: dict[str, Any]) -> None:
        if path.name != "model_0000001.pth":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpointer, "write_weights", write_first)
    with pytest.raises(UserError, match="No space is left"):
        killing.train(cfg)
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000001.pth"


def test_keeping_a_single_checkpoint_is_refused(cfg: Config) -> None:
    cfg.SOLVER.CHECKPOINT_KEEP = 1
    with pytest.raises(ConfigError, match=r"SOLVER\.CHECKPOINT_KEEP is 1"):
        check_best(cfg)
