"""Train and evaluate the runs of a table: what is missing, in this process's machine or through Slurm."""

import functools
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dimaskdino.engine.launch import num_cores
from dimaskdino.errors import UserError
from dimaskdino.reproduction.runs import Run

logger = logging.getLogger(__name__)

Command = list[str]
Execute = Callable[[Command], int]

# Gradients are averaged over this many processes on a CPU: two cores are used better so than by two threads.
_MAX_CPU_PROCESSES = 2


def execute(command: Command) -> int:
    """Run ``command`` in the current folder, which the user's relative paths start from. Returns its exit status."""
    return subprocess.run(command, check=False).returncode


@dataclass(frozen=True)
class Launcher:
    """How trainings are started.

    Attributes:
        repository: absolute path of the folder that holds train_net.py.
        num_gpus: as ``train_net.py --num-gpus`` takes it, for runs whose batch they can share; None means one where
            there is one.
    """

    repository: Path
    num_gpus: int | None = None

    def gpus_of(self, run: Run) -> int | None:
        """How many GPUs ``run`` gets: as many as can share its batch equally. None and 0 are as given."""
        if not self.num_gpus:
            return self.num_gpus
        batch = run.cfg.SOLVER.IMS_PER_BATCH
        return max(number for number in range(1, self.num_gpus + 1) if batch % number == 0)

    def train(self, run: Run) -> Command:
        """The command that trains ``run`` from where it stopped, and evaluates it at the end."""
        resume = ["--resume"] if run.has_checkpoint else []
        return [*self._program(run), *resume, *self._arguments(run)]

    def evaluate_layers(self, run: Run) -> Command:
        """The command that evaluates the trained ``run`` after every stage."""
        return [*self._program(run), "--eval-only", "--resume", "--eval-layers", "all", *self._arguments(run)]

    def measure(self, run: Run, folder: Path, iterations: int) -> Command:
        """The command that trains a few iterations of ``run`` from random weights, and keeps nothing but their time."""
        options = [
            *("MODEL.WEIGHTS", "", "DATASETS.TEST", "()"),
            *("SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", "()"),
        ]
        return [*self._program(run), *self._arguments(replace(run, folder=folder, options=(*run.options, *options)))]

    def _program(self, run: Run) -> Command:
        script = str(self.repository / "train_net.py")
        num_processes = self._cpu_processes(run.cfg.SOLVER.IMS_PER_BATCH)
        if num_processes == 1:
            return [sys.executable, script]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        return [sys.executable, *torchrun, script]

    def _cpu_processes(self, batch: int) -> int:
        on_cpu = self.num_gpus == 0 or (self.num_gpus is None and torch.cuda.device_count() == 0)
        return math.gcd(batch, min(_MAX_CPU_PROCESSES, num_cores())) if on_cpu else 1

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

    @property
    def name(self) -> str:
        """``DATASET/ROW``."""
        return f"{self.run.experiment.dataset}/{self.run.experiment.name}"

    def next_command(self, launcher: Launcher) -> Command | None:
        """What has to be done next, or None where everything is there."""
        if not self.run.is_finished:
            return launcher.train(self.run)
        if self.with_layers and not self.run.layers():
            return launcher.evaluate_layers(self.run)
        return None


def run_job(job: Job, launcher: Launcher, run_command: Execute = execute) -> None:
    """Do what is missing of ``job``.

    Raises:
        UserError: a command failed, or ended without what it was started for.
    """
    last = None
    while (command := job.next_command(launcher)) is not None:
        if command == last:
            raise UserError(f"{' '.join(command)} ended well, but its results are not in {job.run.folder}.")
        logger.info("%s: %s", job.name, " ".join(command))
        status = run_command(command)
        if status:
            raise UserError(f"{job.name} stopped with exit status {status} (log: {job.run.folder / 'log.txt'}).")
        last = command


def run_jobs(jobs: Sequence[Job], launcher: Launcher, run_command: Execute = execute) -> list[str]:
    """Do what is missing of every job; one that fails does not keep the next from its turn.

    Returns:
        What happened to each that failed.
    """
    return _failures([functools.partial(run_job, job, launcher, run_command) for job in jobs])


def measure(run: Run, folder: Path, launcher: Launcher, iterations: int, run_command: Execute = execute) -> None:
    """Train a few iterations into ``folder``, for :func:`dimaskdino.reproduction.costs.speeds`.

    Raises:
        UserError: it failed.
    """
    (folder / "metrics.json").unlink(missing_ok=True)
    status = run_command(launcher.measure(run, folder, iterations))
    for weights in folder.glob("*.pth"):
        weights.unlink()
    if status:
        raise UserError(f"The measurement in {folder} stopped with exit status {status}; see its log.txt.")


def measure_all(
    folders: Mapping[Path, Run], launcher: Launcher, iterations: int, run_command: Execute = execute
) -> list[str]:
    """:func:`measure` each run into its folder; one that fails does not keep the next from its turn.

    Returns:
        What happened to each that failed.
    """
    return _failures(
        [functools.partial(measure, run, folder, launcher, iterations, run_command) for folder, run in folders.items()]
    )


def _failures(steps: Sequence[Callable[[], None]]) -> list[str]:
    """Take every step; what is said of those that fail, which is logged at once too."""
    failures = []
    for step in steps:
        try:
            step()
        except UserError as error:
            logger.error("%s", error)
            failures.append(str(error))
    return failures


def unfinished(jobs: Sequence[Job], launcher: Launcher) -> list[Job]:
    """The jobs that have something left to do."""
    return [job for job in jobs if job.next_command(launcher) is not None]
