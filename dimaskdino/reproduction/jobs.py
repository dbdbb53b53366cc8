"""Train and evaluate runs: what is missing of each, on this machine or, through submitit, on a Slurm cluster."""

import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dimaskdino.engine.launch import cpu_processes
from dimaskdino.errors import UserError, require
from dimaskdino.reproduction.runs import Run

logger = logging.getLogger(__name__)

Command = list[str]
Execute = Callable[[Command], int]

JOB_FILE = "slurm_job"  # holds the id of a run's job, so that no second one is submitted while it waits or runs
# How often submitit queues a job again after its time limit. Its own 3 would give up on most runs; this is enough for
# every run, and still ends one that never reaches a checkpoint.
_MAX_TIMEOUTS_KEY, _MAX_TIMEOUTS = "slurm_max_num_timeout", 1000


def execute(command: Command) -> int:
    """Run ``command`` in the current folder, which relative paths start from, and return its exit status."""
    return subprocess.run(command, check=False).returncode


@dataclass(frozen=True)
class Launcher:
    """How trainings are started."""

    repository: Path  # absolute path of the folder of train_net.py
    # ``train_net.py --num-gpus`` of runs whose batch that many can share; None means one, or the CPU without any
    num_gpus: int | None = None

    def gpus_of(self, run: Run) -> int | None:
        """GPUs for ``run``: as many of ``num_gpus`` as can share its batch equally."""
        if not self.num_gpus:
            return self.num_gpus
        batch = run.cfg.SOLVER.IMS_PER_BATCH
        return max(number for number in range(1, self.num_gpus + 1) if batch % number == 0)

    def train(self, run: Run) -> Command:
        """The command that trains ``run`` from where it stopped and evaluates it at the end."""
        resume = ["--resume"] if run.has_checkpoint else []
        return [*self._program(run), *resume, *self._arguments(run)]

    def evaluate_layers(self, run: Run) -> Command:
        """The command that evaluates the trained ``run`` after every stage."""
        return [*self._program(run), "--eval-only", "--resume", "--eval-layers", "all", *self._arguments(run)]

    def measure(self, run: Run, folder: Path, iterations: int) -> Command:
        """The command that trains a few iterations of ``run`` from random weights."""
        keys = {"MODEL.WEIGHTS": "", "DATASETS.TEST": "()", "SOLVER.MAX_ITER": str(iterations), "SOLVER.STEPS": "()"}
        options = (*run.options, *(word for pair in keys.items() for word in pair))
        return [*self._program(run), *self._arguments(replace(run, folder=folder, options=options))]

    def _program(self, run: Run) -> Command:
        script = str(self.repository / "train_net.py")
        on_cpu = self.num_gpus == 0 or (self.num_gpus is None and torch.cuda.device_count() == 0)
        processes = math.gcd(run.cfg.SOLVER.IMS_PER_BATCH, cpu_processes()) if on_cpu else 1
        if processes == 1:
            return [sys.executable, script]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return [sys.executable, *torchrun, script]

    def _arguments(self, run: Run) -> Command:
        num_gpus = self.gpus_of(run)
        gpus = [] if num_gpus is None else ["--num-gpus", str(num_gpus)]
        folder = str(run.folder.absolute())
        return ["--config-file", str(run.experiment.config_file), *gpus, *run.options, "OUTPUT_DIR", folder]


@dataclass(frozen=True)
class Job:
    """A run, and whether its results by stage are wanted too."""

    run: Run
    with_layers: bool

    def next_command(self, launcher: Launcher) -> Command | None:
        """What to do next; None if everything is there."""
        if not self.run.is_finished:
            return launcher.train(self.run)
        if self.with_layers and not self.run.layers():
            return launcher.evaluate_layers(self.run)
        return None


def unfinished(jobs: Sequence[Job], launcher: Launcher) -> list[Job]:
    """The jobs that have something left to do."""
    return [job for job in jobs if job.next_command(launcher) is not None]


def run_job(job: Job, launcher: Launcher, run_command: Execute = execute) -> None:
    """Do what is missing of ``job``; UserError if a command failed, or succeeded without leaving its results."""
    last = None
    while (command := job.next_command(launcher)) is not None:
        if command == last:
            raise UserError(f"{' '.join(command)} succeeded, but its results are not in {job.run.folder}.")
        logger.info("%s: %s", job.run.name, " ".join(command))
        status = run_command(command)
        if status:
            raise UserError(f"{job.run.name} stopped with exit status {status} (log: {job.run.folder / 'log.txt'}).")
        last = command


def run_jobs(jobs: Sequence[Job], launcher: Launcher, run_command: Execute = execute) -> list[str]:
    """Do what is missing of every job, also after one fails, and return the failures."""
    return _failures(partial(run_job, job, launcher, run_command) for job in jobs)


def measure(run: Run, folder: Path, launcher: Launcher, iterations: int, run_command: Execute = execute) -> None:
    """Train a few iterations of ``run`` into ``folder``, keeping nothing but their times; UserError if that failed."""
    (folder / "metrics.json").unlink(missing_ok=True)
    status = run_command(launcher.measure(run, folder, iterations))
    for weights in folder.glob("*.pth"):
        weights.unlink()
    if status:
        raise UserError(f"The measurement in {folder} stopped with exit status {status}; see its log.txt.")


def measure_all(
    folders: Mapping[Path, Run], launcher: Launcher, iterations: int, run_command: Execute = execute
) -> list[str]:
    """:func:`measure` each run into its folder, also after one fails, and return the failures."""
    options = launcher, iterations, run_command
    return _failures(partial(measure, run, folder, *options) for folder, run in folders.items())


def _failures(steps: Iterable[Callable[[], None]]) -> list[str]:
    failures = []
    for step in steps:
        try:
            step()
        except UserError as error:
            logger.error("%s", error)
            failures.append(str(error))
    return failures


@dataclass(frozen=True)
class SlurmTask:
    """What a cluster's job does. submitit calls ``checkpoint`` when the job hits its time limit or is preempted."""

    job: Job
    launcher: Launcher

    def __call__(self) -> None:
        """Train and evaluate what is missing."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        run_job(self.job, self.launcher)

    def checkpoint(self) -> Any:
        """Queue the same task again, which resumes from the run's last checkpoint."""
        return _submitit().helpers.DelayedSubmission(self)


def check_submission(launcher: Launcher, parameters: Mapping[str, Any]) -> None:
    """Raise UserError if the number of GPUs, the time limit or submitit is missing, or a value is not a number."""
    if launcher.num_gpus is None:
        raise UserError("--submit needs --num-gpus: the number of GPUs of each job.")
    limits = [key for key in ("timeout_min", "slurm_time") if key in parameters]
    if not limits:
        raise UserError(
            "--submit needs the time limit of a job in minutes: --slurm timeout_min=2880 (what the partition allows; a "
            "job that reaches it is queued again and resumes). Without it, submitit asks for five minutes."
        )
    for key in (*limits, _MAX_TIMEOUTS_KEY):
        # submitit computes with them when a job reaches its time limit; text such as 2-00:00:00 would break it then.
        if not isinstance(parameters.get(key, 0), int):
            raise UserError(f"--slurm {key} is {parameters[key]!r}; it must be a whole number (times are in minutes).")
    _submitit()


def submit(jobs: Sequence[Job], launcher: Launcher, parameters: Mapping[str, Any], *, cluster: str) -> Iterator[str]:
    """Submit each job, unless it waits or runs already, when its line, which says what became of it, is asked for.

    The parameters are submitit's, such as ``timeout_min`` and ``slurm_partition``.

    Raises:
        UserError: submitit cannot submit, or :func:`check_submission` fails.
    """
    check_submission(launcher, parameters)
    submitit = _submitit()
    for number, job in enumerate(jobs):
        waiting = _waiting_job(submitit, job.run)
        if waiting is not None:
            hint = f"if it does not, remove {job.run.folder / JOB_FILE}"
            yield f"{job.run.name}: not submitted, since job {waiting} waits or runs ({hint})"
            continue
        try:
            job_id = _submit_one(submitit, job, launcher, parameters, cluster)
        except UserError as error:
            # Slurm would refuse the next one for the same reason: a limit, a wrong parameter.
            left = ", ".join(each.run.name for each in jobs[number:])
            raise UserError(f"{error}. Not submitted: {left}.") from error
        yield f"{job.run.name}: submitted as job {job_id}; its log is in {job.run.folder / 'slurm'}"


def _submit_one(submitit: ModuleType, job: Job, launcher: Launcher, parameters: Mapping[str, Any], cluster: str) -> str:
    try:
        max_timeouts = {_MAX_TIMEOUTS_KEY: parameters.get(_MAX_TIMEOUTS_KEY, _MAX_TIMEOUTS)}
        executor = submitit.AutoExecutor(folder=job.run.folder / "slurm", cluster=cluster, **max_timeouts)
        executor.update_parameters(
            name=f"dimaskdino_{job.run.folder.name}",
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=launcher.gpus_of(job.run),
            **{key: value for key, value in parameters.items() if key != _MAX_TIMEOUTS_KEY},
        )
        job_id = executor.submit(SlurmTask(job, launcher)).job_id
    except (TypeError, NameError, AssertionError, RuntimeError) as error:
        # Unknown or wrong parameters, no Slurm on this machine, or Slurm itself refuses.
        reason = str(error).strip().removesuffix(".")
        raise UserError(f"submitit cannot submit {job.run.name}: {reason}") from error
    (job.run.folder / JOB_FILE).write_text(job_id)
    return job_id


def _waiting_job(submitit: ModuleType, run: Run) -> str | None:
    """The id of the run's job that is not over yet; None if there is none."""
    file = run.folder / JOB_FILE
    if not file.is_file():
        return None
    job_id = file.read_text().strip()
    return None if submitit.SlurmJob(folder=run.folder / "slurm", job_id=job_id).done() else job_id


def _submitit() -> ModuleType:
    return require("submitit", "--submit", "slurm")
