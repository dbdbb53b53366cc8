"""Start the processes of a job: one, one per GPU as detectron2's launcher does, or those that torchrun started."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from dimaskdino.compat import create_local_process_group, leave_process_group, process_groups, silence_gathering
from dimaskdino.engine.run_folder import INTERRUPTED_STATUS, REQUEUE_STATUS, handling
from dimaskdino.errors import USER_ERROR_STATUS, UserError

Main = Callable[[Namespace], object]

TIMEOUT = timedelta(minutes=30)  # until the configuration is read (SOLVER.PROCESS_TIMEOUT)
# A process that gave up waiting asks for this long who else did, to name those that did not.
WAIT_FOR_OTHERS_S = 10.0
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def launch(main: Main, args: Namespace, *, cpu_processes: int = 1) -> None:
    """Run ``main(args)`` in every process of the job.

    ``args.num_gpus`` (per machine; None means one if there is one) is replaced by the number that is used.
    Under torchrun, its processes are the job's. They use GPUs if there are any and ``--num-gpus`` is not 0.
    A :class:`UserError` in any process ends the program with one line on stderr and exit status 2.

    Args:
        main: what every process does; with several processes, a function at the top level of a module.
        args: the parsed command line.
        cpu_processes: number of processes to start on this machine if it uses no GPU; they share its cores.
    """
    if _under_torchrun():
        local_rank = int(os.environ["LOCAL_RANK"])
        _run_in_job(main, args, num_local=int(os.environ["LOCAL_WORLD_SIZE"]), local_rank=local_rank)
        return
    try:
        args.num_gpus = _num_gpus(args.num_gpus)
        num_local = args.num_gpus or cpu_processes
        if num_local * args.num_machines == 1:
            main(args)
        else:
            _spawn(main, args, num_local)
    except UserError as error:
        _print_user_error(error)
        sys.exit(USER_ERROR_STATUS)


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_processes() -> int:
    """Processes of a job on this machine's CPU: two that average gradients use two cores better than two threads do."""
    return min(2, num_cores())


def one_line(error: BaseException) -> str:
    """The message of ``error`` in one line, without the traceback that a data-loader worker wraps it in."""
    message = str(error).strip()
    if "Original Traceback" in message:
        # The last line of a traceback is "module.ClassName: message".
        message = message.splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def _num_gpus(asked: int | None) -> int:
    available = torch.cuda.device_count()
    if asked is None:
        return min(1, available)
    if asked < 0 or asked > available:
        raise UserError(
            f"--num-gpus is {asked}, but this machine has {available}; "
            f"give a number from 0 (train on the CPU) to {available}."
        )
    return asked


def _under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def _num_gpus_under_torchrun(asked: int | None, num_local: int) -> int:
    available = torch.cuda.device_count()
    if asked == 0 or available == 0:
        return 0
    if num_local > available:
        raise UserError(
            f"torchrun started {num_local} processes on a machine with {available} GPUs; "
            f"use --nproc_per_node {available}, or --num-gpus 0 to train on the CPU."
        )
    return num_local


def _spawn(main: Main, args: Namespace, num_local: int) -> None:
    """Start the processes of this machine and wait for them; if one fails, end the others and exit."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # It warns of each process that it ends.
    with tempfile.TemporaryDirectory() as folder:
        job = {"world_size": num_local * args.num_machines, "init_method": _dist_url(args, folder)}
        context = mp.spawn(_worker, args=(main, args, num_local, job), nprocs=num_local, join=False)
        try:
            with _passing_on_signals(context.pids()):
                while not context.join():
                    pass
        except mp.ProcessExitedException as error:
            codes = [process.exitcode or 0 for process in context.processes]
            # That process has printed its error, or the run was saved.
            for status in (USER_ERROR_STATUS, REQUEUE_STATUS, INTERRUPTED_STATUS):
                if status in codes:
                    sys.exit(status)
            _exit_after_crash(codes, str(error))


def _passing_on_signals(pids: list[int]) -> contextlib.AbstractContextManager[None]:
    """Forward signals that end a run to the processes; a terminal sends Ctrl-C to them itself."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def only_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return handling({signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on, signal.SIGINT: only_once})


def _worker(local_rank: int, main: Main, args: Namespace, num_local: int, job: dict[str, Any]) -> None:
    if sys.platform == "linux":
        # If the launcher is killed, Linux ends this process. torch asks for SIGINT, which background jobs ignore.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    rank = num_local * args.machine_rank + local_rank
    _run_in_job(main, args, num_local=num_local, local_rank=local_rank, rank=rank, **job)


def _exit_after_crash(codes: list[int], otherwise: str) -> NoReturn:
    """Name the processes that were killed or aborted, which could not print anything; the launcher sends SIGTERM."""
    killed = {rank: -code for rank, code in enumerate(codes) if code < 0 and code != -signal.SIGTERM}
    crashed = [f"process {rank} was ended by signal {number}" for rank, number in killed.items()]
    hint = " (Linux sends signal 9 when memory runs out)" if -signal.SIGKILL in codes else ""
    sys.stderr.write(f"error: {'; '.join(crashed) or otherwise}{hint}\n")
    sys.exit(1)


def _run_in_job(main: Main, args: Namespace, *, num_local: int, local_rank: int, **job: Any) -> None:
    """Join the job as one of its processes, run ``main``, and leave the job; a failure ends this process at once."""
    try:
        if _under_torchrun():
            args.num_gpus = _num_gpus_under_torchrun(args.num_gpus, num_local)
        _join(num_local=num_local, local_rank=local_rank, on_gpu=args.num_gpus > 0, **job)
        main(args)
        leave_process_group()
    except BaseException as error:  # noqa: BLE001 (the process ends)
        # The launcher ends all processes once one has failed; this one reports its error first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        explained = _with_silent_processes(error)
        _report(explained, num_local, local_rank)
        _end_process(_exit_status(explained))


def _join(*, num_local: int, local_rank: int, on_gpu: bool, **job: Any) -> None:
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        # More threads than cores would wait for each other instead of computing.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cores() // num_local)))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, **job)
    create_local_process_group(num_local)
    silence_gathering()


def set_process_timeout(seconds: float) -> None:
    """Set how long a process of a job waits for the others; all processes call this before they wait again."""
    if comm.get_world_size() == 1:
        return
    for group in process_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _with_silent_processes(error: BaseException) -> BaseException:
    """For a timeout, an error that names the processes that this one waited for; other errors as they are."""
    if not (isinstance(error, RuntimeError) and re.search("tim(ed|e) ?out", str(error), re.IGNORECASE)):
        return error
    if not dist.is_initialized():
        return error
    keys = [f"gave up waiting {rank}" for rank in range(dist.get_world_size())]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(keys[dist.get_rank()], "")
        deadline = time.monotonic() + WAIT_FOR_OTHERS_S
        while not store.check(keys) and time.monotonic() < deadline:  # store.wait would print warnings of its own
            time.sleep(0.1)
        silent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # The process that keeps the store has ended.
        return error
    who = f"process {', '.join(silent)}" if silent else "each other, in different places"
    return UserError(
        f"Process {dist.get_rank()} waited for {who} and got no answer in time. Look at what that process does, and at "
        f"its log (log.txt.rankN in OUTPUT_DIR); SOLVER.PROCESS_TIMEOUT sets the seconds. ({one_line(error):.200})"
    )


def _report(error: BaseException, num_local: int, local_rank: int) -> None:
    """Print why this process failed, if it is the first of this machine; others fail because they lost it."""
    if isinstance(error, SystemExit | KeyboardInterrupt) or not _is_first_failure(num_local, local_rank):
        return
    if isinstance(error, UserError):
        _print_user_error(error)
    else:
        traceback.print_exception(error)


def _is_first_failure(num_local: int, local_rank: int) -> bool:
    """Count the failures of this machine in the job's store; before there is a job, process 0 reports."""
    if not dist.is_initialized():
        return local_rank == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"failures of machine {dist.get_rank() // num_local}", 1) == 1
    except RuntimeError:  # The process that keeps the store has ended.
        return True


def _print_user_error(error: UserError) -> None:
    sys.stderr.write(f"error: {one_line(error)}\n")


def _exit_status(error: BaseException) -> int:
    if isinstance(error, UserError):
        return USER_ERROR_STATUS
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return INTERRUPTED_STATUS if isinstance(error, KeyboardInterrupt) else 1


def _end_process(status: int) -> NoReturn:
    """End this process of a job at once and leave its process groups as they are.

    Other processes may be waiting for this one in a collective. Destroying a group may wait for them in turn, and a
    group that is still alive when the interpreter exits sometimes aborts the process (a traceback holds the model,
    which holds the group). So the interpreter does not exit; the operating system closes the connections, which tells
    the other processes.
    """
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Data-loader workers would live on for seconds. PyTorch takes the end of a worker for an error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.terminate()
    finally:
        os._exit(status)


def _dist_url(args: Namespace, folder: str) -> str:
    """The address where the processes meet: the one given, or a file in ``folder``, which no other job uses.

    A port that is free now may be taken by the time it is used.
    """
    if args.dist_url != "auto":
        if args.num_machines > 1 and args.dist_url.startswith("file://"):
            logging.getLogger(__name__).warning("A file:// --dist-url is unreliable between machines; prefer tcp://.")
        return args.dist_url
    if args.num_machines > 1:
        raise UserError("--dist-url auto works on one machine only; give tcp://HOST:PORT of the first machine.")
    return f"file://{folder}/rendezvous"
