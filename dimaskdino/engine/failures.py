"""How the failure of one process of a job is told to the process that started it, and how that process ends."""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

from dimaskdino.errors import UserError


class Failure(NamedTuple):
    """Why a process ended.

    A file for each process holds it: unlike a queue it needs no reader, and a process that is killed while it writes
    leaves no half of it behind.
    """

    time_ns: int  # of the clock that all processes of a machine share
    local_rank: int
    is_user_error: bool
    text: str  # the message of a user error, the traceback of any other


def one_line(error: BaseException) -> str:
    """The message of ``error`` alone: a data-loader worker wraps it in the text of its traceback."""
    message = str(error).strip()
    if "Original Traceback" in message:
        # The last line of a traceback is "module.ClassName: message".
        message = message.splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def report_failure(folder: Path, local_rank: int, error: Exception) -> None:
    """Leave ``error`` in ``folder``. A process does so before it ends, so before others can fail because of that."""
    is_user_error = isinstance(error, UserError)
    text = one_line(error) if is_user_error else "".join(traceback.format_exception(error))
    unfinished = folder / f"{local_rank}.unfinished"
    unfinished.write_text(json.dumps(Failure(time.monotonic_ns(), local_rank, is_user_error, text)))
    unfinished.replace(folder / f"{local_rank}.failure")


def read_failures(folder: Path) -> list[Failure]:
    """What the processes have reported, the likely cause first: user errors, then the others, each by time."""
    failures = [Failure(*json.loads(path.read_text())) for path in folder.glob("*.failure")]
    return sorted(failures, key=lambda failure: (not failure.is_user_error, failure.time_ns))


def end_process(status: int) -> NoReturn:
    """End this process of a job at once, with its process groups as they are; for a process that failed.

    Others may be waiting for it in a collective, and what frees a group may wait for them in turn: Gloo for work that
    has not ended, NCCL for every process to do the same. A group that lives on until the interpreter exits (a traceback
    holds the model, which holds the group) aborts the process now and then. So the interpreter does not exit; the
    system closes the connections, which is how the others learn of it.
    """
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Data-loader workers would linger for seconds; that they are killed is no error, which PyTorch takes it for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.terminate()
    finally:
        os._exit(status)
