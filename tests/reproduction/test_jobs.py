"""Which commands are started, in which order, and what a failure does."""

import json
import logging
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from dimaskdino.errors import UserError
from dimaskdino.reproduction import jobs
from dimaskdino.reproduction.jobs import (
    JOB_FILE,
    Job,
    Launcher,
    SlurmTask,
    check_submission,
    measure,
    measure_all,
    run_job,
    run_jobs,
    submit,
    unfinished,
)
from tests.reproduction.fakes import open_run, stage, write_run

REPOSITORY = Path(__file__).parents[2]
GPUS = Launcher(REPOSITORY, 8)
TIMES = {"timeout_min": 60}


class Trainer:
    """Stands for the processes that are started: writes their files and remembers their commands."""

    def __init__(self, output: Path, row: str = "neither", dataset: str = "shapes", statuses: tuple[int, ...] = ()):
        self.output, self.row, self.dataset, self.statuses = output, row, dataset, list(statuses)
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> int:
        self.commands.append(command)
        status = self.statuses.pop(0) if self.statuses else 0
        if status:
            return status
        run = self.output / self.dataset / open_run(self.output, self.row, self.dataset).folder.name
        if "--eval-only" in command:
            path = run / "inference" / "layers.json"
            path.write_text(json.dumps([stage("layer.0", 1.0, 2.0), stage("layer.1", 30.0, 25.0)]))
        else:
            shutil.rmtree(run, ignore_errors=True)
            write_run(self.output, self.dataset, self.row)
        return 0


def job(output: Path, row: str = "neither", dataset: str = "shapes", *, with_layers: bool = False) -> Job:
    return Job(open_run(output, row, dataset), with_layers)


def test_new_run_is_trained_with_file_options_and_gpus(tmp_path):
    run = open_run(tmp_path, "di_only", "coco", options=("SOLVER.MAX_ITER", "5"))
    command = GPUS.train(run)
    assert command[:2] == [sys.executable, str(REPOSITORY / "train_net.py")]
    assert command[2:] == [
        *("--config-file", str(run.experiment.config_file), "--num-gpus", "8"),
        *("SOLVER.MAX_ITER", "5", "OUTPUT_DIR", str(run.folder)),
    ]


@pytest.mark.parametrize(
    ("asked", "batch", "given"), [(8, 4, 4), (8, 16, 8), (6, 4, 4), (6, 16, 4), (3, 16, 2), (0, 4, 0), (None, 4, None)]
)
def test_a_run_gets_the_gpus_that_can_share_its_batch(asked, batch, given, tmp_path):
    run = open_run(tmp_path, "neither", "coco", options=("SOLVER.IMS_PER_BATCH", str(batch)))
    launcher = Launcher(REPOSITORY, asked)
    assert launcher.gpus_of(run) == given
    for command in (launcher.train(run), launcher.evaluate_layers(run), launcher.measure(run, tmp_path, 20)):
        assert ("--num-gpus" in command) is (given is not None)
        if given is not None:
            assert command[command.index("--num-gpus") + 1] == str(given)


def test_an_interrupted_run_is_resumed(tmp_path):
    write_run(tmp_path, "shapes", "neither", done=300, evaluated=False)
    assert "--resume" in (job(tmp_path).next_command(GPUS) or [])
    assert "--resume" not in (job(tmp_path, "di_only").next_command(GPUS) or [])


def test_a_trained_run_is_resumed_for_its_evaluation(tmp_path):
    write_run(tmp_path, "shapes", "neither", evaluated=False)
    command = job(tmp_path).next_command(GPUS)
    assert command is not None
    assert "--resume" in command
    assert "--eval-only" not in command


def test_a_finished_run_is_not_trained_again(tmp_path):
    write_run(tmp_path, "shapes", "neither")
    trainer = Trainer(tmp_path)
    run_job(job(tmp_path), GPUS, trainer)
    assert trainer.commands == []
    assert unfinished([job(tmp_path), job(tmp_path, "di_only")], GPUS)[0].run.experiment.name == "di_only"


def test_results_by_stage_are_evaluated_after_the_training(tmp_path):
    trainer = Trainer(tmp_path)
    run_job(job(tmp_path, with_layers=True), GPUS, trainer)
    first, second = trainer.commands
    assert "--eval-only" not in first
    assert [flag for flag in second if flag.startswith("--")] == [
        *("--eval-only", "--resume", "--eval-layers", "--config-file", "--num-gpus")
    ]
    run_job(job(tmp_path, with_layers=True), GPUS, trainer)
    assert len(trainer.commands) == 2


def test_a_failure_names_the_log_and_the_next_call_continues(tmp_path):
    trainer = Trainer(tmp_path, statuses=(3,))
    with pytest.raises(UserError, match=r"neither stopped with exit status 3 .*neither/log\.txt"):
        run_job(job(tmp_path), GPUS, trainer)
    run_job(job(tmp_path), GPUS, trainer)
    assert job(tmp_path).run.is_finished


def test_the_next_run_starts_after_a_failure(tmp_path, caplog):
    trainer = Trainer(tmp_path, "di_only", statuses=(3,))
    (failure,) = run_jobs([job(tmp_path, "neither"), job(tmp_path, "di_only")], GPUS, trainer)
    assert failure.startswith("shapes/neither stopped with exit status 3")
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [failure]
    assert job(tmp_path, "di_only").run.is_finished
    assert not job(tmp_path, "neither").run.is_finished


def test_the_next_measurement_starts_after_a_failure(tmp_path):
    run, statuses = open_run(tmp_path, "neither", "coco"), [1, 0]
    failures = measure_all({tmp_path / "a": run, tmp_path / "b": run}, GPUS, 20, lambda command: statuses.pop(0))
    assert [failure.split(" stopped")[0] for failure in failures] == [f"The measurement in {tmp_path / 'a'}"]
    assert statuses == []


def test_a_command_without_results_is_not_repeated_forever(tmp_path):
    with pytest.raises(UserError, match="train_net.py.*results are not in"):
        run_job(job(tmp_path), GPUS, lambda command: 0)


def test_a_command_runs_in_the_callers_folder(tmp_path, monkeypatch):
    repository, caller = tmp_path / "repository", tmp_path / "caller"
    repository.mkdir()
    caller.mkdir()
    (repository / "beside.py").write_text("STATUS = 3")
    (repository / "train_net.py").write_text("import beside\nopen('here', 'w').close()\nexit(beside.STATUS)")
    monkeypatch.chdir(caller)
    with pytest.raises(UserError, match="exit status 3"):
        run_job(job(tmp_path), Launcher(repository, 1))
    assert (caller / "here").is_file()


@pytest.mark.parametrize(
    ("num_gpus", "available", "cores", "batch", "processes"),
    [(0, 0, 8, 8, 2), (None, 0, 2, 8, 2), (None, 0, 1, 8, 1), (0, 0, 2, 5, 1), (None, 1, 8, 8, 1), (4, 4, 8, 8, 1)],
)
def test_two_processes_share_a_divisible_batch_on_a_cpu(
    num_gpus, available, cores, batch, processes, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    run = open_run(tmp_path, options=("SOLVER.IMS_PER_BATCH", str(batch)))
    command = Launcher(REPOSITORY, num_gpus).train(run)
    assert ("torch.distributed.run" in command) is (processes > 1)
    if processes > 1:
        assert command[command.index("--nproc_per_node") + 1] == str(processes)


def test_a_measurement_leaves_nothing_but_its_times(tmp_path):
    folder, seen = tmp_path / "measured", []
    folder.mkdir()
    (folder / "metrics.json").write_text("of an earlier measurement")

    def train(command: list[str]) -> int:
        assert not (folder / "metrics.json").exists()
        seen.extend(command)
        (folder / "model_final.pth").write_text("")
        (folder / "metrics.json").write_text("{}")
        return 0

    measure(open_run(tmp_path, "neither", "coco"), folder, GPUS, 20, train)
    options = dict(zip(seen[-10::2], seen[-9::2], strict=True))
    assert (options["MODEL.WEIGHTS"], options["SOLVER.MAX_ITER"], options["OUTPUT_DIR"]) == ("", "20", str(folder))
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]
    with pytest.raises(UserError, match="exit status 1"):
        measure(open_run(tmp_path, "neither", "coco"), folder, GPUS, 20, lambda command: 1)


class FakeSubmitit(types.ModuleType):
    """The part of submitit in use: remembers what was submitted and which jobs are over."""

    def __init__(self) -> None:
        super().__init__("submitit")
        self.submitted: list[SlurmTask] = []
        self.parameters: dict = {}
        self.gpus: list[int] = []
        self.max_num_timeout = 0
        self.over: set[str] = set()
        self.refuses = False
        fake = self

        class AutoExecutor:
            def __init__(self, folder, cluster, *, slurm_max_num_timeout=3):
                Path(folder).mkdir(parents=True)
                assert cluster == "slurm"
                fake.max_num_timeout = slurm_max_num_timeout

            def update_parameters(self, **parameters):
                if "nonsense" in parameters:
                    raise NameError("nonsense")
                fake.parameters = parameters
                fake.gpus.append(parameters["gpus_per_node"])

            def submit(self, task):
                if fake.refuses:
                    raise RuntimeError("limit\n")
                fake.submitted.append(task)
                return types.SimpleNamespace(job_id=str(100 + len(fake.submitted)))

        class SlurmJob:
            def __init__(self, folder, job_id):
                self.job_id = job_id

            def done(self):
                return self.job_id in fake.over

        self.AutoExecutor, self.SlurmJob = AutoExecutor, SlurmJob
        self.helpers = types.SimpleNamespace(DelayedSubmission=lambda task: ("again", task))


@pytest.fixture
def submitit(monkeypatch) -> FakeSubmitit:
    fake = FakeSubmitit()
    monkeypatch.setitem(sys.modules, "submitit", fake)
    return fake


def test_a_cluster_gets_a_job_for_each_run(tmp_path, submitit):
    given = [job(tmp_path, "neither", "coco"), job(tmp_path, "di_only", "coco")]
    said = submit(given, GPUS, TIMES, cluster="slurm")
    assert [line.split(";")[0] for line in said] == [
        "coco/neither: submitted as job 101",
        "coco/di_only: submitted as job 102",
    ]
    assert submitit.parameters == {
        **{"name": "dimaskdino_di_only", "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 8, "timeout_min": 60}
    }


def test_a_run_whose_job_waits_is_not_submitted_again(tmp_path, submitit):
    given = job(tmp_path, "neither", "coco")
    assert len(list(submit([given], GPUS, TIMES, cluster="slurm"))) == 1
    (said,) = submit([given], GPUS, TIMES, cluster="slurm")
    assert "not submitted, since job 101 waits or runs" in said
    assert JOB_FILE in said
    submitit.over.add("101")
    shutil.rmtree(given.run.folder / "slurm")
    (said,) = submit([given], GPUS, TIMES, cluster="slurm")
    assert "submitted as job 102" in said


def test_a_job_is_queued_again_up_to_1000_times(tmp_path, submitit):
    for times, number in ((TIMES, 1000), ({**TIMES, "slurm_max_num_timeout": 7}, 7)):
        (said,) = submit([job(tmp_path / str(number), "neither", "coco")], GPUS, times, cluster="slurm")
        assert "submitted as job" in said
        assert submitit.max_num_timeout == number
        assert "slurm_max_num_timeout" not in submitit.parameters


def test_a_job_asks_for_the_gpus_of_its_run(tmp_path, submitit):
    given = [job(tmp_path, row, "coco") for row in ("neither", "dimaskdino_swinl_12ep")]
    assert len(list(submit(given, GPUS, TIMES, cluster="slurm"))) == 2
    assert submitit.gpus == [8, 4]


def test_a_refusal_names_every_run_that_was_not_submitted(tmp_path, submitit):
    given = [job(tmp_path, row, "coco") for row in ("neither", "di_only", "no_gtg")]
    lines = submit(given, GPUS, TIMES, cluster="slurm")
    assert "coco/neither: submitted as job 101" in next(lines)
    submitit.refuses = True
    with pytest.raises(
        UserError, match=r"cannot submit coco/di_only: limit\. Not submitted: coco/di_only, coco/no_gtg"
    ):
        next(lines)


def test_a_job_runs_what_is_missing_and_is_queued_again(tmp_path, submitit, monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    trainer = Trainer(tmp_path)
    monkeypatch.setattr(jobs, "run_job", lambda each, launcher: run_job(each, launcher, trainer))
    task = SlurmTask(job(tmp_path), GPUS)
    task()
    assert len(trainer.commands) == 1
    assert task.checkpoint() == ("again", task)


def test_what_a_cluster_needs_is_named(tmp_path, submitit, monkeypatch):
    given = [job(tmp_path)]
    with pytest.raises(UserError, match="--submit needs --num-gpus"):
        check_submission(Launcher(REPOSITORY), TIMES)
    with pytest.raises(UserError, match="time limit .* --slurm timeout_min=2880"):
        check_submission(GPUS, {"slurm_partition": "gpu"})
    for key in ("timeout_min", "slurm_time", "slurm_max_num_timeout"):
        with pytest.raises(UserError, match=f"--slurm {key}.*'2-00:00:00'.*whole number"):
            check_submission(GPUS, {**TIMES, key: "2-00:00:00"})
    check_submission(GPUS, {"slurm_time": 60})
    with pytest.raises(UserError, match="cannot submit shapes/neither: nonsense"):
        next(submit(given, GPUS, {**TIMES, "nonsense": 1}, cluster="slurm"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="submitit.*pip install"):
        check_submission(GPUS, TIMES)
