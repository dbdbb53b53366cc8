"""What every test starts from: fixed seeds, one thread, no network; and commands run inside the test process."""

import logging
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by the processes that tests start. One thread keeps sums in one order and two
# processes from competing for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

from tests.data_pipeline.scripts import REPO, run_script


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every generator that a test may draw from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def single_threaded() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the tiny dataset is made once for the session."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that would leave this machine, so that a test cannot come to need one."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the tests use no network, and this one connects to {address[0]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


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
