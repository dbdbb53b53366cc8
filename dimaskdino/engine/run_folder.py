"""The folder of a run (OUTPUT_DIR): its lock, logs and records, an earlier run's; and the signals that end a run."""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.data.coco_file import below
from dimaskdino.engine.writers import METRICS_FILE
from dimaskdino.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.txt"
LAST_CHECKPOINT_FILE = "last_checkpoint"
RUN_COMMENT = "# Run "

LOGGERS = ("dimaskdino", "detectron2", "fvcore")
# What these log below a warning is for people; what else detectron2 logs goes to log.txt only.
ON_CONSOLE = ("dimaskdino", "detectron2.engine", "detectron2.evaluation.evaluator")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK_FILE = "run.lock"
# sysexits.h calls it EX_TEMPFAIL: start the same command again with --resume.
REQUEUE_STATUS = 75
INTERRUPTED_STATUS = 128 + signal.SIGINT
_STDERR = 2  # Logging is not safe in a signal handler.


class _Console(logging.StreamHandler):
    """Writes to stdout what a person wants to see."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setLevel(logging.INFO)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.startswith(ON_CONSOLE)

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        self.setFormatter(logging.Formatter(f"[%(asctime)s] {level}%(message)s", datefmt="%m/%d %H:%M:%S"))
        return super().format(record)


class _LogFile(logging.FileHandler):
    """Appends everything to a file; a full disk costs records, but no traceback for each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        form = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
        self.setFormatter(logging.Formatter(form, datefmt="%m/%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not _is_no_space(sys.exc_info()[1]):
            super().handleError(record)


def setup_loggers(folder: Path, rank: int) -> None:
    """Log to ``folder``/log.txt, in other processes than the main one to log.txt.rankN without the console."""
    folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [_LogFile(folder / (f"{LOG_FILE}.rank{rank}" if rank else LOG_FILE))]
    if rank == 0:
        handlers.append(_Console())
    for name in LOGGERS:
        to_set_up = logging.getLogger(name)
        to_set_up.setLevel(logging.DEBUG)
        to_set_up.propagate = False
        for earlier in [handler for handler in to_set_up.handlers if isinstance(handler, _Console | _LogFile)]:
            to_set_up.removeHandler(earlier)
            earlier.close()
        for handler in handlers:
            to_set_up.addHandler(handler)
    # detectron2's loop logs a traceback of every error; the launcher prints a user error in one line.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


def set_earlier_run_aside(folder: Path) -> None:
    """Prepare ``folder`` for a new training, with a warning if it holds an earlier run.

    last_checkpoint is removed, so that a later --resume cannot go on from the earlier run, and metrics.json gets
    another name. No record and no weights are deleted.
    """
    last, metrics = folder / LAST_CHECKPOINT_FILE, folder / METRICS_FILE
    if last.is_file():
        logger.warning(
            "%s holds an earlier run, and without --resume this one starts over: last_checkpoint, which named %s, is "
            "removed; other files stay until this run writes files of the same names.",
            folder,
            last.read_text(errors="replace").strip(),
        )
        last.unlink()
    if metrics.is_file() and metrics.stat().st_size:
        moved = next(path for n in itertools.count(1) if not (path := folder / f"metrics.{n}.json").exists())
        metrics.rename(moved)
        logger.warning("The earlier records in %s are now in %s.", metrics, moved.name)


def write_config(cfg: CfgNode, folder: Path, run_id: str = "") -> None:
    """Write the complete configuration to ``folder``/config.yaml, and the id that :func:`read_run_id` gives back."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    path.write_text((f"{RUN_COMMENT}{run_id}\n" if run_id else "") + cfg.dump(), encoding="utf-8")
    logger.info("The complete configuration is in %s", path)


def inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """The folder of the results on a dataset: its own one if there are several datasets."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", *([below(dataset_name)] if len(cfg.DATASETS.TEST) > 1 else []))


def in_subfolder(cfg: CfgNode, name: str) -> CfgNode:
    """``cfg`` for an evaluation beside the usual one, whose results are in a folder of OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, name)
    return cfg


def read_run_id(folder: Path) -> str:
    """The run whose checkpoints are in ``folder``, as its config.yaml says; "" if nothing says so."""
    path = folder / CONFIG_FILE
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if path.is_file() else ""
    return first.removeprefix(RUN_COMMENT) if first.startswith(RUN_COMMENT) else ""


def check_free_space(folder: Path, model: nn.Module, copies: int = 3) -> None:
    """Raise UserError if ``folder`` lacks room for a checkpoint, which is about ``copies`` times the weights."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    needed, free = copies * weights, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"OUTPUT_DIR {folder} has {free / 2**20:.0f} MiB of free space, but a checkpoint of this model takes about "
            f"{needed / 2**20:.0f} MiB; free space, or set OUTPUT_DIR to a folder on another disk."
        )


def check_same_checkpoint(checkpointer: Checkpointer, *, resume: bool) -> None:
    """Raise UserError in all processes unless all start from the same checkpoint; all of them must call this.

    Each process looks for the last checkpoint itself, and only the main process writes it. If machines do not share
    the folder, those without a checkpoint would train another model.
    """
    found = comm.all_gather(_find_checkpoint(checkpointer) if resume else "was not given --resume")
    if len(set(found)) > 1:
        who = ", ".join(f"process {found.index(what)} {what}" for what in dict.fromkeys(found))
        raise UserError(
            f"--resume: the processes of this job would start from different checkpoints in OUTPUT_DIR "
            f"{checkpointer.save_dir}: {who}. OUTPUT_DIR must be a folder that all machines share."
        )


def _find_checkpoint(checkpointer: Checkpointer) -> str:
    try:
        path = checkpointer.get_checkpoint_file()
    except CheckpointError as error:
        return str(error)  # Loading raises it again, in every process.
    return f"finds {os.path.basename(path)}" if path else "finds none"


@contextlib.contextmanager
def full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turn an error for want of disk space into a :class:`UserError`."""
    try:
        yield
    except Exception as error:
        if not _is_no_space(error):
            raise
        raise UserError(
            f"No space is left for {folder} (OUTPUT_DIR): the disk or a quota is full. Free space, then go on from the "
            "last checkpoint with --resume."
        ) from error


def _is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk caused ``error``; torch raises an error of its own, not always from the system's."""
    while error is not None:
        # torch's message where the system took only the first part of what was to be written.
        if isinstance(error, RuntimeError) and "unexpected pos" in str(error):
            return True
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def handling(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Handle signals with these handlers inside the block; only the main thread of a process receives signals."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()} if here else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class StopSignals:
    """Inside :meth:`caught`, SIGTERM, SIGUSR1 and the first Ctrl-C only ask for the end of the run.

    The second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._pid = os.getpid()

    def caught(self) -> contextlib.AbstractContextManager[None]:
        """Catch the signals inside the block."""
        return handling(dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), self._handle))

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
    """Hold the lock on a run's folder, which ends with the process; raises UserError if another one holds it."""
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
