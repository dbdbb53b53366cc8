"""Trainings of the toy detector in processes of their own, which can be hurt from outside."""

import argparse
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from detectron2.utils import comm

from dimaskdino.config import Config
from dimaskdino.data.datasets import register_all
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.engine import Trainer, launch
from dimaskdino.engine.launch import set_process_timeout
from dimaskdino.engine.run_folder import setup_loggers
from tests.engine.conftest import make_toy_cfg
from tests.engine.job import RecordingTrainer  # noqa: F401  (registers the detectors)

HUNG_AFTER_S = 120.0
# What a clock measures.
TIMES = ("time", "data_time", "eta_seconds", "rank_data_time")


class ToyTrainer(Trainer):
    """Scores a sum of the weights."""

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = {"bbox": {"AP": sum(p.sum().item() for p in self.model.parameters())}}
        return self._last_eval_results


def stress_cfg(shapes: Path, output: Path, *options: Any) -> Config:
    """32 iterations of a model that draws random numbers, with random augmentations."""
    cfg = make_toy_cfg(shapes, output)
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "RandomToyDetector", "INPUT.MIN_SIZE_TRAIN", (32, 48, 64)),
            *("INPUT.RANDOM_FLIP", "horizontal", "DATALOADER.ASPECT_RATIO_GROUPING", True, "LOG.PICTURES", 0),
            *("SOLVER.MAX_ITER", 32, "SOLVER.STEPS", (20,), "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 8),
            *("TEST.BEST_METRIC", "bbox/AP", "SOLVER.PROCESS_TIMEOUT", 5.0, *options),
        ]
    )
    return cfg


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status, negative for a signal; None if it had to be ended after :data:`HUNG_AFTER_S`.
        errors: what it wrote to stderr.
        seconds: that it ran after it was hurt.
    """

    status: int | None
    errors: str
    seconds: float


@dataclass
class Job:
    """A training in a process of its own.

    Args:
        cfg: of the training.
        resume: go on from the last checkpoint.
        processes: of the training.
        file_limit: bytes of the largest file that it can write; 0 for any.
    """

    cfg: Config
    resume: bool = False
    processes: int = 1
    file_limit: int = 0

    def start(self) -> "Job":
        """Start it; the log goes to a file beside the run's folder."""
        self._log = Path(f"{self.cfg.OUTPUT_DIR}.stderr")
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=(self, self._log))
        self._process.start()
        self.pid = self._process.pid or 0
        return self

    def wait(self, seconds: float) -> None:
        """Wait until it ends, but not longer than ``seconds``."""
        self._process.join(seconds)

    def end(self, hurt: Callable[[], object] = lambda: None) -> Ended:
        """Hurt it, and wait for its end."""
        hurt()
        started = time.monotonic()
        self._process.join(HUNG_AFTER_S)
        seconds = time.monotonic() - started
        hung = self._process.exitcode is None
        if hung:
            for pid in [*self.ranks(), self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.join()
        text = self._log.read_text(errors="replace") if self._log.is_file() else ""
        return Ended(None if hung else self._process.exitcode, text, seconds)

    def ranks(self) -> list[int]:
        """The process ids of the processes of a training of several, in order."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.is_file() else []

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.exitcode is None

    def is_training(self) -> bool:
        """Whether it holds the lock of its folder, or has ended."""
        return not self.is_running() or Path(self.cfg.OUTPUT_DIR, "run.lock").is_file()


def _run(job: Job, log: Path) -> None:
    """In the new process: train as train_net.py does, and exit as it does."""
    sys.stderr = log.open("a", buffering=1)  # which pytest may have replaced
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    for number, file in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(file.fileno(), number)
    for name in ("fvcore", "detectron2", "dimaskdino"):
        logging.getLogger(name).handlers.clear()  # earlier tests' handlers write to files of theirs
    if job.file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_limit, resource.RLIM_INFINITY))
    mp.spawn = functools.partial(mp.start_processes, start_method="fork")  # which need not import torch anew
    sys.modules[launch.__module__].WAIT_FOR_OTHERS_S = 2.0  # type: ignore[attr-defined]
    # A process that was stopped does not see SIGTERM; torch waits 30 seconds before it sends SIGKILL.
    mp.ProcessContext.join = functools.partialmethod(mp.ProcessContext.join, grace_period=2.0)
    args = argparse.Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto", job=job)
    launch(_train, args, cpu_processes=job.processes)
    sys.stderr.flush()
    os._exit(0)


def _train(args: argparse.Namespace) -> None:
    cfg = args.job.cfg
    setup_loggers(Path(cfg.OUTPUT_DIR), comm.get_rank())
    set_process_timeout(cfg.SOLVER.PROCESS_TIMEOUT)
    register_all(cfg=cfg)
    check_datasets(cfg)
    torch.manual_seed(7)
    trainer = ToyTrainer(cfg)
    trainer.resume_or_load(resume=args.job.resume)
    trainer.train()


def progress(cfg: Config) -> float:
    """The part of a run that its last checkpoint holds, from 0 to 1."""
    tag = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    number = re.fullmatch(r"model_(\d+)\.pth", tag.read_text()) if tag.is_file() else None
    return (int(number[1]) + 1) / cfg.SOLVER.MAX_ITER if number else float(tag.is_file())


def outcome(cfg: Config) -> dict[str, Any]:
    """What a finished run left: weights, moments, best score and records."""
    folder = Path(cfg.OUTPUT_DIR)
    content = torch.load(folder / "model_final.pth", weights_only=False)
    lines = (folder / "metrics.json").read_text().splitlines()
    return {
        "model": content["model"],
        "optimizer": content["trainer"]["step"]["optimizer"]["state"],
        "best": torch.load(folder / "model_best.pth", weights_only=False)["iteration"],
        "records": [{key: x for key, x in json.loads(line).items() if key not in TIMES} for line in lines],
    }


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other
