"""Signals that end a run so that it can go on later, and the lock on its folder."""

import contextlib
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from dimaskdino.errors import UserError

LOCK_FILE = "run.lock"
# sysexits.h calls it EX_TEMPFAIL: start the same command again with --resume.
REQUEUE_STATUS = 75
INTERRUPTED_STATUS = 128 + signal.SIGINT
_STDERR = 2  # Logging is not safe in a signal handler.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """While it is entered, SIGTERM, SIGUSR1 and the first Ctrl-C only ask for the end of the run.

    The second Ctrl-C ends the process at once. Only the main thread of a process can receive signals; elsewhere this
    does nothing.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._pid = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]

    @property
    def exit_status(self) -> int:
        """What the process exits with."""
        return INTERRUPTED_STATUS if self.received == signal.SIGINT else REQUEUE_STATUS

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # A loader worker, which its parent ends.
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        again = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
        os.write(_STDERR, f"{signal.Signals(number).name}: saving after this iteration{again}\n".encode())


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock on a run's folder; the system releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    path = folder / LOCK_FILE
    with path.open("a+") as file:
        _lock(file.fileno(), path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_not_locked(folder: Path) -> None:
    """Check that no other process trains in ``folder``; raises as :func:`folder_lock`."""
    path = folder / LOCK_FILE
    if path.is_file():
        with path.open("r+") as file:
            _lock(file.fileno(), path)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = path.read_text(errors="replace").strip() or "another process"
        raise UserError(
            f"OUTPUT_DIR {path.parent}: {holder} trains in this folder ({LOCK_FILE}); wait until it ends, end it, or "
            "set OUTPUT_DIR to another folder."
        ) from error
    except OSError:
        return  # A file system without locks.
