"""Submit trainings to Slurm through submitit, a job each; one that runs out of time is queued again and goes on."""

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dimaskdino.errors import UserError
from dimaskdino.reproduction.jobs import Job, Launcher, run_job

logger = logging.getLogger(__name__)

# A run's folder remembers its job here, so that no second one is sent while that waits or runs.
JOB_FILE = "slurm_job"

# submitit's name for how often a job is queued again after its time is over; its own 3 would give up on most runs. This
# is meant to be enough for every run, and yet to end one that its time limit never lets reach a checkpoint.
_MAX_TIMEOUTS_KEY = "slurm_max_num_timeout"
_MAX_TIMEOUTS = 1000


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


def check_submission(launcher: Launcher, parameters: Mapping[str, Any]) -> None:
    """Check what :func:`submit` needs, before anything else is done.

    Raises:
        UserError: the number of GPUs or the time limit is missing, a number is none, submitit is not installed.
    """
    if launcher.num_gpus is None:
        raise UserError("--submit needs --num-gpus: how many GPUs each job asks for.")
    limits = [key for key in ("timeout_min", "slurm_time") if key in parameters]
    if not limits:
        raise UserError(
            "--submit needs the time limit of a job in minutes, or submitit asks for five: --slurm timeout_min=2880 "
            "(what the partition allows; a job whose time is over is queued again and goes on)."
        )
    for key in (*limits, _MAX_TIMEOUTS_KEY):
        # submitit computes with them; a text such as 2-00:00:00 would break the job when its time is over.
        if not isinstance(parameters.get(key, 0), int):
            raise UserError(f"--slurm {key} is {parameters[key]!r}; it must be a whole number (times are in minutes).")
    _submitit()


def submit(jobs: Sequence[Job], launcher: Launcher, parameters: Mapping[str, Any], *, cluster: str) -> Iterator[str]:
    """Submit every job that is not waiting or running already, each as its line is asked for.

    Args:
        jobs: with something left to do.
        launcher: the GPUs that it gives a run are asked for, on one machine.
        parameters: more of submitit's, such as ``timeout_min`` and ``slurm_partition``.
        cluster: ``slurm``, or another of submitit's.

    Yields:
        A line for every job that says what became of it.

    Raises:
        UserError: submitit cannot submit, or what :func:`check_submission` says.
    """
    check_submission(launcher, parameters)
    submitit = _submitit()
    for number, job in enumerate(jobs):
        waiting = _waiting_job(submitit, job)
        if waiting is None:
            try:
                job_id = _submit_one(submitit, job, launcher, parameters, cluster)
            except UserError as error:
                # What Slurm says of this one (a limit, a wrong parameter) it would say of the next.
                left = ", ".join(each.name for each in jobs[number:])
                raise UserError(f"{error}. Not submitted: {left}.") from error
            said = f"submitted as job {job_id}; its log is in {job.run.folder / 'slurm'}"
        else:
            said = f"not submitted, job {waiting} waits or runs already (if not, remove {job.run.folder / JOB_FILE})"
        yield f"{job.name}: {said}"


def _submit_one(submitit: ModuleType, job: Job, launcher: Launcher, parameters: Mapping[str, Any], cluster: str) -> str:
    """Submit one job and remember its id, which is returned."""
    try:
        max_timeouts = {_MAX_TIMEOUTS_KEY: parameters.get(_MAX_TIMEOUTS_KEY, _MAX_TIMEOUTS)}
        executor = submitit.AutoExecutor(folder=job.run.folder / "slurm", cluster=cluster, **max_timeouts)
        executor.update_parameters(
            name=f"dimaskdino_{job.run.experiment.name}",
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=launcher.gpus_of(job.run),
            **{key: value for key, value in parameters.items() if key != _MAX_TIMEOUTS_KEY},
        )
        job_id = executor.submit(SlurmTask(job, launcher)).job_id
    except (TypeError, NameError, AssertionError, RuntimeError) as error:
        # Unknown and wrong parameters, no Slurm on this machine, a refusal by Slurm itself.
        reason = str(error).strip().removesuffix(".")
        raise UserError(f"submitit cannot submit {job.name}: {reason}") from error
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
