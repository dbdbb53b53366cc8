"""Running the commands inside the test process, as a shell would."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data_pipeline.scripts import REPO, run_script

# A model and pictures that train in milliseconds a step.
TINY = [
    *("MODEL.MaskDINO.HIDDEN_DIM", "64", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "64", "MODEL.SEM_SEG_HEAD.MASK_DIM", "64"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.MaskDINO.DEC_LAYERS", "2"),
    *("MODEL.MaskDINO.TRAIN_NUM_POINTS", "64", "MODEL.MaskDINO.DN_NUM", "8", "TEST.DETECTIONS_PER_IMAGE", "10"),
    *("DATASETS.SHAPES.IMAGE_SIZE", "64", "DATASETS.SHAPES.NUM_TRAIN", "8", "DATASETS.SHAPES.NUM_VAL", "3"),
    *("INPUT.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "LOG.PICTURES", "1"),
]


@dataclass(frozen=True)
class Finished:
    """Exit status and what was written."""

    status: int
    out: str
    err: str


@pytest.fixture
def fresh_loggers() -> Iterator[None]:
    """Remove the handlers that a command adds: they write to this test's streams and folders."""
    yield
    for name in ("fvcore", "detectron2", "dimaskdino"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, fresh_loggers: None) -> Callable[..., Finished]:
    """``run("train_net.py", "--flag", ...)`` runs a script of the repository from its root."""
    monkeypatch.chdir(REPO)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run_in_root(script: str, *arguments: object) -> Finished:
        status = run_script(monkeypatch, script, *arguments)
        captured = capfd.readouterr()
        return Finished(status, captured.out, captured.err)

    return run_in_root


@pytest.fixture
def tiny(shapes_root: Path, tmp_path: Path) -> list[str]:
    """Arguments of a tiny job on the CPU that writes to ``tmp_path / "run"``; options may follow."""
    config = os.path.join("configs", "demo", "dimaskdino_shapes.yaml")
    options = [*TINY, "DATASETS.SHAPES.ROOT", str(shapes_root), "OUTPUT_DIR", str(tmp_path / "run")]
    return ["--num-gpus", "0", "--config-file", config, *options]
