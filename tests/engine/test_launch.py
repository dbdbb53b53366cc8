"""Processes of a job, and how a user error of any of them ends the program."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from dimaskdino.engine import argument_parser, launch
from dimaskdino.engine.failures import one_line
from dimaskdino.engine.launch import _dist_url, _spawn
from dimaskdino.errors import DatasetError, UserError


def arguments(**changed: Any) -> argparse.Namespace:
    given = {"num_gpus": None, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", **changed}
    return argparse.Namespace(**given)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the machine has this many GPUs."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("available", "asked", "used"), [(0, None, 0), (4, None, 1), (4, 0, 0), (1, 1, 1)])
def test_one_process_uses_one_gpu_where_there_is_one(available: int, asked: int | None, used: int, gpus) -> None:
    gpus(available)
    seen = []
    launch(lambda args: seen.append(args.num_gpus), arguments(num_gpus=asked))
    assert seen == [used]


def test_more_gpus_than_there_are_is_an_error(gpus, capsys: pytest.CaptureFixture) -> None:
    gpus(1)
    with pytest.raises(SystemExit) as stopped:
        launch(lambda args: None, arguments(num_gpus=2))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: --num-gpus 2, but this machine has 1; give a number from 0 (train on the CPU) to 1.\n"
    )


def test_a_user_error_is_one_line_on_stderr_and_status_two_and_a_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture,
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise UserError("first line\n  and more")

    with pytest.raises(SystemExit) as stopped:
        launch(fail, arguments())
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: first line and more\n"

    def bug(args: argparse.Namespace) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        launch(bug, arguments())


class Unreadable(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise DatasetError("Cannot read a/b.jpg: not an image.")


def test_a_user_error_of_a_data_loader_worker_is_told_without_its_traceback() -> None:
    with pytest.raises(DatasetError) as raised:
        next(iter(DataLoader(Unreadable(), num_workers=1)))
    assert one_line(raised.value) == "Cannot read a/b.jpg: not an image."


def report_then_fail(args: argparse.Namespace) -> None:
    """Every process writes who it is; then one of them meets a user error while the other waits for it."""
    who = {"rank": comm.get_rank(), "local": comm.get_local_rank(), "local_size": comm.get_local_size()}
    (args.folder / f"{comm.get_rank()}.json").write_text(json.dumps({**who, "all": comm.all_gather(comm.get_rank())}))
    if comm.get_rank() == 1:
        raise UserError("only rank 1 saw the bad file")
    comm.synchronize()


def test_spawned_processes_form_a_job_and_the_user_error_of_one_reaches_the_parent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^only rank 1 saw the bad file$"):
        _spawn(report_then_fail, arguments(num_gpus=0, folder=tmp_path), num_local=2)
    for rank in range(2):
        expected = {"rank": rank, "local": rank, "local_size": 2, "all": [0, 1]}
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def meet(folder: Path) -> None:
    """Return once both processes have joined the job; a collective could still be under way in the other one."""
    (folder / f"{comm.get_rank()}.here").touch()
    while len(list(folder.glob("*.here"))) < 2:
        time.sleep(0.01)


def meet_a_bug(args: argparse.Namespace) -> None:
    meet(args.folder)
    if comm.get_rank() == 1:
        raise KeyError("a bug of process 1")
    comm.synchronize()


def test_a_bug_of_one_process_is_shown_with_its_traceback_and_not_what_the_others_met_because_of_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(mp.ProcessRaisedException, match="(?s)Process 1 .*in meet_a_bug.*a bug of process 1") as raised:
        _spawn(meet_a_bug, arguments(num_gpus=0, folder=tmp_path), num_local=2)
    assert "synchronize" not in str(raised.value)


def lose_a_process(args: argparse.Namespace) -> None:
    meet(args.folder)
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def test_a_process_that_is_killed_is_named_beside_the_error_that_another_met_because_of_it(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match="(?s)Process 1 was ended by signal 9.*Process 0 .*synchronize"):
        _spawn(lose_a_process, arguments(num_gpus=0, folder=tmp_path), num_local=2)


def fail_one_after_the_other(args: argparse.Namespace) -> None:
    meet(args.folder)
    if comm.get_rank() == 0:
        raise ConnectionError("closed by peer")
    time.sleep(0.3)
    raise UserError("what the user can mend")


def test_a_user_error_goes_before_an_error_that_another_process_met_a_moment_earlier(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^what the user can mend$"):
        _spawn(fail_one_after_the_other, arguments(num_gpus=0, folder=tmp_path), num_local=2)


UNDER_TORCHRUN = """
from torch.utils.data import DataLoader
from dimaskdino.engine import launch
from tests.engine.test_launch import Unreadable, arguments

launch(lambda args: next(iter(DataLoader(Unreadable(), num_workers=1))), arguments(num_gpus=0))
"""


def test_a_user_error_under_torchrun_ends_the_process_and_its_data_loader_workers_with_status_two() -> None:
    job = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    environ = {**os.environ, "MASTER_ADDR": "localhost", **{name: str(value) for name, value in job.items()}}
    command = [sys.executable, "-c", UNDER_TORCHRUN]
    finished = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1] == "error: Cannot read a/b.jpg: not an image."


def test_an_automatic_address_needs_a_single_machine() -> None:
    with pytest.raises(UserError, match="one machine alone"):
        _spawn(report_then_fail, arguments(num_gpus=0, num_machines=2), num_local=1)


def test_two_jobs_on_one_machine_do_not_meet() -> None:
    assert argument_parser().parse_args([]).dist_url == "auto"
    first, second = (_dist_url(arguments(num_gpus=2), folder) for folder in ("one", "two"))
    assert first != second
