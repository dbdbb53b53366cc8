"""Processes of a job, and how an error in any of them ends the program."""

import argparse
import functools
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from dimaskdino.engine import argument_parser, launch
from dimaskdino.engine.launch import _dist_url, _num_gpus_under_torchrun, one_line, set_process_timeout
from dimaskdino.errors import DatasetError, UserError


def arguments(**changed: Any) -> argparse.Namespace:
    given = {"num_gpus": None, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", **changed}
    return argparse.Namespace(**given)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the machine has this many GPUs."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("available", "asked", "used"), [(0, None, 0), (4, None, 1), (4, 0, 0), (1, 1, 1)])
def test_one_gpu_is_used_by_default(available: int, asked: int | None, used: int, gpus) -> None:
    gpus(available)
    seen = []
    launch(lambda args: seen.append(args.num_gpus), arguments(num_gpus=asked))
    assert seen == [used]


@pytest.mark.parametrize("asked", [2, -1])
def test_absent_gpus_are_refused(asked: int, gpus, capsys: pytest.CaptureFixture) -> None:
    gpus(1)
    with pytest.raises(SystemExit) as stopped:
        launch(lambda args: None, arguments(num_gpus=asked))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --num-gpus is {asked}, but this machine has 1")
    assert error.count("\n") == 1


def test_user_error_is_one_line_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture) -> None:
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


def read_in_worker(args: argparse.Namespace) -> None:
    next(iter(DataLoader(Unreadable(), num_workers=1)))


def test_error_of_a_data_loader_worker_is_one_line() -> None:
    with pytest.raises(DatasetError) as raised:
        read_in_worker(arguments())
    assert one_line(raised.value) == "Cannot read a/b.jpg: not an image."


def meet(folder: Path) -> None:
    """Return once both processes have joined the job; a collective could still be under way in the other one."""
    (folder / f"{comm.get_rank()}.here").touch()
    while len(list(folder.glob("*.here"))) < 2:
        time.sleep(0.01)


def first_process_waits(fail: Callable[[], None]) -> Callable[[argparse.Namespace], None]:
    """A ``main`` in which process 1 fails while process 0 waits for it."""

    def main(args: argparse.Namespace) -> None:
        meet(args.folder)
        if comm.get_rank() == 1:
            fail()
        comm.synchronize()

    return main


def refuse() -> None:
    raise UserError("only process 1 saw the bad file")


def crash() -> None:
    raise KeyError("a bug in process 1")


def refuse_in_both(args: argparse.Namespace) -> None:
    meet(args.folder)
    raise UserError("a bad key")


@pytest.mark.parametrize(
    ("main", "status", "first", "last"),
    [
        (first_process_waits(refuse), 2, "error: only process 1 saw the bad file", None),
        (refuse_in_both, 2, "error: a bad key", None),
        (first_process_waits(crash), 1, "Traceback", "error: process 1 terminated with exit code 1"),
        (first_process_waits(lambda: os.kill(os.getpid(), signal.SIGKILL)), 1, None, "error: process 1 .* signal 9"),
        (first_process_waits(lambda: os._exit(0)), 1, "Traceback", "error: process 0"),
    ],
    ids=["user error", "user error of both", "bug", "kill", "early end"],
)
def test_failure_of_a_process_ends_the_job(main, status, first, last, tmp_path, monkeypatch, capfd):
    before = multiprocessing.active_children()
    # Forked processes need not import torch anew.
    monkeypatch.setattr(mp, "spawn", functools.partial(mp.start_processes, start_method="fork"))
    with pytest.raises(SystemExit) as stopped:
        launch(main, arguments(num_gpus=0, folder=tmp_path), cpu_processes=2)
    assert stopped.value.code == status
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]  # Gloo's own
    assert first is None or lines[0].startswith(first)
    assert (len(lines) == 1) if last is None else re.match(last, lines[-1])
    assert not [process for process in multiprocessing.active_children() if process not in before]


def wait_for_a_silent_process(args: argparse.Namespace) -> None:
    set_process_timeout(1.5)
    meet(args.folder)
    if comm.get_rank() == 1:
        time.sleep(100)
    comm.synchronize()


def test_silent_process_is_named_after_the_timeout(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(mp, "spawn", functools.partial(mp.start_processes, start_method="fork"))
    monkeypatch.setattr(sys.modules[launch.__module__], "WAIT_FOR_OTHERS_S", 0.5)
    with pytest.raises(SystemExit) as stopped:
        launch(wait_for_a_silent_process, arguments(num_gpus=0, folder=tmp_path), cpu_processes=2)
    assert stopped.value.code == 2
    assert re.search(r"^error: Process 0 waited for process 1 .*PROCESS_TIMEOUT", capfd.readouterr().err, re.MULTILINE)


def test_store_of_several_machines_prints_nothing_of_the_silent(monkeypatch, capfd) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    module = sys.modules[launch.__module__]
    monkeypatch.setattr(module, "WAIT_FOR_OTHERS_S", 0.2)
    assert "Process 0 waited for process 1 " in str(module._with_silent_processes(RuntimeError("timed out")))
    assert not capfd.readouterr().err  # such as torch's warnings


def run_until_killed(args: argparse.Namespace) -> None:
    (args.folder / f"{os.getpid()}.pid").touch()
    while True:
        comm.synchronize()
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(") ")[2][0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_launcher_leaves_no_processes(number: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(mp, "spawn", functools.partial(mp.start_processes, start_method="fork"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for jobs in the background
    try:
        launcher = multiprocessing.get_context("fork").Process(
            target=launch, args=(run_until_killed, arguments(num_gpus=0, folder=tmp_path)), kwargs={"cpu_processes": 2}
        )
        launcher.start()
    finally:
        signal.signal(signal.SIGINT, before)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    os.kill(launcher.pid, number)
    launcher.join()
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(map(is_running, pids)))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of the only process of a job under torchrun."""
    job = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in {**job, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


def test_user_error_under_torchrun_is_one_line_and_status_two(torchrun, capfd) -> None:
    process = multiprocessing.get_context("fork").Process(target=launch, args=(read_in_worker, arguments(num_gpus=0)))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: Cannot read a/b.jpg: not an image."


def test_each_process_of_torchrun_has_a_gpu_of_its_own(gpus) -> None:
    for available, asked, used in ((0, None, 0), (2, 0, 0), (2, None, 2)):
        gpus(available)
        assert _num_gpus_under_torchrun(asked, 2) == used
    gpus(1)
    with pytest.raises(UserError, match="nproc_per_node 1"):
        _num_gpus_under_torchrun(None, 2)


def test_automatic_address_needs_a_single_machine(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        launch(read_in_worker, arguments(num_gpus=0, num_machines=2))
    assert "--dist-url" in capsys.readouterr().err


def test_two_jobs_on_one_machine_do_not_meet() -> None:
    assert argument_parser().parse_args([]).dist_url == "auto"
    first, second = (_dist_url(arguments(num_gpus=2), folder) for folder in ("one", "two"))
    assert first != second
