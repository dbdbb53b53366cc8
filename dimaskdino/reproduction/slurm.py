"""Submit trainings to Slurm through submitit, a job each; one that runs out of time is queued again and goes on."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dimaskdino.errors import UserError
from dimaskdino.reproduction.jobs import Job, Launcher, run_job

logger = logging.getLogger(__name__)

# A run's folder remembers its job here, so that no second one is sent while that waits or runs.
JOB_FILE = "slurm_job"


@dataclass(frozen=True)
class SlurmTask:
    """What a job does; submitit calls ``checkpoint`` when its time is over or another job takes its place."""

    job: Job
    launcher: Launcher

    def __call__(self) -> None:
        """Train and evaluate what is missing."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        run_job(self.job, self.launcher)

    def checkpoint(self) -> Any:
        """The same again: the run goes on from its last checkpoint."""
        return _submitit().helpers.DelayedSubmission(self)


def submit(jobs: Sequence[Job], launcher: Launcher, parameters: Mapping[str, Any], *, cluster: str) -> list[str]:
    """Submit every job that is not waiting or running already.

    Args:
        jobs: with something left to do.
        launcher: its ``num_gpus`` are asked for, on one machine.
        parameters: more of submitit's, such as ``timeout_min`` or ``slurm_partition``.
        cluster: ``slurm``, or another of submitit's.

    Returns:
        A line for every job that says what became of it.

    Raises:
        UserError: submitit is not installed, or cannot submit.
    """
    if launcher.num_gpus is None:
        raise UserError("--submit needs --num-gpus: how many GPUs each job asks for.")
    submitit = _submitit()
    lines = []
    for job in jobs:
        waiting = _waiting_job(submitit, job)
        if waiting is None:
            job_id = _submit_one(submitit, job, launcher, parameters, cluster)
            said = f"submitted as job {job_id}; its log is in {job.run.folder / 'slurm'}"
        else:
            said = f"not submitted, job {waiting} waits or runs already (if not, remove {job.run.folder / JOB_FILE})"
        lines.append(f"{job.run.experiment.dataset}/{job.run.experiment.name}: {said}")
    return lines


def _submit_one(submitit: ModuleType, job: Job, launcher: Launcher, parameters: Mapping[str, Any], cluster: str) -> str:
    """Submit one job and remember its id, which is returned."""
    try:
        executor = submitit.AutoExecutor(folder=job.run.folder / "slurm", cluster=cluster)
        executor.update_parameters(
            name=f"dimaskdino_{job.run.experiment.name}",
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=launcher.num_gpus,
            **parameters,
        )
        job_id = executor.submit(SlurmTask(job, launcher)).job_id
    except (TypeError, NameError, AssertionError, RuntimeError) as error:
        # Unknown and wrong parameters, no Slurm on this machine, a refusal by Slurm itself.
        raise UserError(f"submitit cannot submit {job.run.experiment.name}: {error}") from error
    (job.run.folder / JOB_FILE).write_text(job_id)
    return job_id


def _submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise UserError("--submit needs the package submitit: python -m pip install submitit") from error


def _waiting_job(submitit: ModuleType, job: Job) -> str | None:
    """The job that was sent for this run and is not over, or None."""
    file = job.run.folder / JOB_FILE
    if not file.is_file():
        return None
    job_id = file.read_text().strip()
    return None if submitit.SlurmJob(folder=job.run.folder / "slurm", job_id=job_id).done() else job_id
