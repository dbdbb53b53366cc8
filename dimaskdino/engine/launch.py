"""Start the processes of a job: alone, one per GPU as detectron2's launcher does, or as torchrun started them."""

import logging
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dimaskdino.compat import create_local_process_group, leave_process_group, silence_gathering
from dimaskdino.engine.failures import Failure, end_process, one_line, read_failures, report_failure
from dimaskdino.errors import USER_ERROR_STATUS, UserError

Main = Callable[[Namespace], object]

TIMEOUT = timedelta(minutes=30)
GRACE_S = 5.0  # for the other processes to say what they met, once one has failed


def launch(main: Main, args: Namespace, *, cpu_processes: int = 1) -> None:
    """Run ``main(args)`` in every process of the job.

    ``args.num_gpus`` (per machine; None means one where there is one) is replaced by the number that is used.
    Under torchrun its processes are the job's, on GPUs where there are any and ``--num-gpus`` is not 0.
    A :class:`UserError` of any process ends the program with one line on stderr and exit status 2.

    Args:
        main: what every process does; with several processes a function of a module's top level.
        args: of the command line.
        cpu_processes: how many processes to start on this machine where no GPU is used; they share its cores.
    """
    try:
        if _under_torchrun():
            _run_under_torchrun(main, args)
            return
        args.num_gpus = _num_gpus(args.num_gpus)
        num_local = args.num_gpus or cpu_processes
        if num_local * args.num_machines == 1:
            main(args)
        else:
            _spawn(main, args, num_local)
    except UserError as error:
        _exit_with(error)


def _exit_with(error: UserError) -> NoReturn:
    sys.stderr.write(f"error: {one_line(error)}\n")
    sys.exit(USER_ERROR_STATUS)


def _num_gpus(asked: int | None) -> int:
    available = torch.cuda.device_count()
    if asked is None:
        return min(1, available)
    if asked < 0 or asked > available:
        raise UserError(
            f"--num-gpus {asked}, but this machine has {available}; "
            f"give a number from 0 (train on the CPU) to {available}."
        )
    return asked


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def _run_under_torchrun(main: Main, args: Namespace) -> None:
    _join_torchrun(args)
    try:
        main(args)
    except UserError as error:
        rank = f" (process {dist.get_rank()})" if dist.get_rank() else ""
        sys.stderr.write(f"error{rank}: {one_line(error)}\n")
        end_process(USER_ERROR_STATUS)
    leave_process_group()


def _join_torchrun(args: Namespace) -> None:
    num_local = int(os.environ["LOCAL_WORLD_SIZE"])
    available = torch.cuda.device_count()
    args.num_gpus = 0 if args.num_gpus == 0 or available == 0 else num_local
    if args.num_gpus > available:
        raise UserError(
            f"torchrun started {num_local} processes on a machine with {available} GPUs; "
            f"use --nproc_per_node {available}, or --num-gpus 0 to train on the CPU."
        )
    _join(num_local=num_local, local_rank=int(os.environ["LOCAL_RANK"]), on_gpu=args.num_gpus > 0)


def _join(*, num_local: int, local_rank: int, on_gpu: bool, **init_options: Any) -> None:
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        # Threads beyond the cores wait for each other instead of computing.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cores() // num_local)))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, **init_options)
    create_local_process_group(num_local)
    silence_gathering()


def _spawn(main: Main, args: Namespace, num_local: int) -> None:
    """Start this machine's processes and wait for them; a user error among them, or else the first error, is raised."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = _dist_url(args, name)
        context = mp.spawn(_worker, args=(main, args, num_local, url, folder), nprocs=num_local, join=False)
        crashed = _wait_for_failure(context.processes)
        try:
            while not context.join():
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            failures = read_failures(folder)
            if not failures:
                raise
            _raise_failure(failures[0], context.processes, crashed)


def _wait_for_failure(processes: Sequence[BaseProcess]) -> list[int]:
    """Return once all have ended, or one has failed and the others have had time to; they may wait for it forever.

    Returns:
        the processes that were killed or aborted, by their place in ``processes``.
    """
    running = list(processes)
    deadline: float | None = None
    while running and (deadline is None or time.monotonic() < deadline):
        ended = wait(
            [process.sentinel for process in running], None if deadline is None else deadline - time.monotonic()
        )
        for process in running:
            if process.sentinel in ended:
                process.join()
        running = [process for process in running if process.sentinel not in ended]
        if deadline is None and any(process.exitcode for process in processes):
            deadline = time.monotonic() + GRACE_S
    return [place for place, process in enumerate(processes) if (process.exitcode or 0) < 0]


def _raise_failure(failure: Failure, processes: Sequence[BaseProcess], crashed: list[int]) -> NoReturn:
    """Raise the error of a process here; the processes that crashed could not report anything themselves."""
    if failure.is_user_error:
        raise UserError(failure.text) from None
    lines = [f"\n\n-- Process {place} was ended by signal {-(processes[place].exitcode or 0)}" for place in crashed]
    message = f"\n\n-- Process {failure.local_rank} terminated with the following error:\n{failure.text}"
    pid = processes[failure.local_rank].pid or 0
    raise mp.ProcessRaisedException("".join([*lines, message]), failure.local_rank, pid) from None


def _worker(local_rank: int, main: Main, args: Namespace, num_local: int, url: str, folder: Path) -> None:
    try:
        _join(
            num_local=num_local,
            local_rank=local_rank,
            on_gpu=args.num_gpus > 0,
            init_method=url,
            world_size=num_local * args.num_machines,
            rank=num_local * args.machine_rank + local_rank,
        )
        main(args)
        leave_process_group()
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        report_failure(folder, local_rank, error)
        end_process(USER_ERROR_STATUS if isinstance(error, UserError) else 1)


def _dist_url(args: Namespace, folder: str) -> str:
    """Where the processes meet: as given, or on one machine a file in ``folder``, which no other job can be using.

    A port that is free when it is asked for may be taken when it is used.
    """
    if args.dist_url != "auto":
        if args.num_machines > 1 and args.dist_url.startswith("file://"):
            logging.getLogger(__name__).warning("A file:// --dist-url is unreliable between machines; prefer tcp://.")
        return args.dist_url
    if args.num_machines > 1:
        raise UserError("--dist-url auto works on one machine alone; give tcp://HOST:PORT of the first machine.")
    return f"file://{folder}/rendezvous"
