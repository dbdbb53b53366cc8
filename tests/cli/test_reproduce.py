"""tools/reproduce.py and tools/plot_imbalance.py from the command line."""

import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dimaskdino.reproduction import jobs
from dimaskdino.reproduction.tables import DATASETS, paper_tables
from tests.cli.conftest import TINY
from tests.data_pipeline.scripts import REPO
from tests.reproduction.fakes import write_run

SCRIPT = "tools/reproduce.py"


@pytest.fixture
def trainings(run, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run what would be processes of their own inside this one, and remember their arguments."""
    # One core: no torchrun.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    started: list[list[str]] = []

    def start(command: list[str], check: bool) -> SimpleNamespace:
        assert Path(command[1]) == REPO / "train_net.py"
        started.append(command[2:])
        return SimpleNamespace(returncode=run("train_net.py", *command[2:]).status)

    monkeypatch.setattr(jobs.subprocess, "run", start)
    return started


def folders(text: str) -> list[str]:
    """Runs in the table of costs."""
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    return [name for name in names if "/" in name]


def test_a_table_is_trained_once_resumed_and_collected(run, trainings, tmp_path, shapes_root):
    tiny = ["--options", *TINY, "DATASETS.SHAPES.ROOT", shapes_root]
    common = [SCRIPT, "table6", "--dataset", "shapes", "--num-gpus", 0, "--output", tmp_path]

    planned = run(*common, *tiny)
    assert planned.status == 0
    assert trainings == []
    assert "train_net.py" not in planned.out
    assert run(*common, "--verbose", *tiny).out.count("train_net.py --config-file") == 2

    done = run(*common, "--run", *tiny)
    assert done.status == 0, done.err
    assert [Path(each[-1]).name for each in trainings] == ["no_gtg", "dimaskdino"]
    assert done.out.count("| finished |") == 2
    assert {path.name for path in (tmp_path / "shapes").glob("table6.*")} == {"table6.md", "table6.csv", "table6.png"}

    assert run(*common, "--run", *tiny).status == 0
    assert len(trainings) == 2

    stopped = tmp_path / "shapes" / "no_gtg"
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    (stopped / "model_final.pth").unlink()
    (stopped / "metrics.json").unlink()
    assert "stopped at 2 of 3" in run(*common, "--collect", *tiny).out
    assert run(*common, "--run", *tiny).status == 0
    assert trainings[2:] == [["--resume", *trainings[0]]]
    assert "Starting training from iteration 2" in (stopped / "log.txt").read_text()

    changed = run(*common, "--run", *tiny, "SOLVER.MAX_ITER", 5)
    assert changed.status == 2
    assert "SOLVER.MAX_ITER is 3 there and 5 here" in changed.err
    assert len(trainings) == 3


def test_failed_trainings_are_reported_at_the_end(run, trainings: list[list[str]], tmp_path: Path) -> None:
    finished = run(
        *(SCRIPT, "table6", "--dataset", "shapes", "--run", "--num-gpus", 0, "--output", tmp_path),
        *("--options", *TINY, "MODEL.WEIGHTS", "nowhere.pth", "DATASETS.SHAPES.ROOT", tmp_path / "shapes_data"),
    )
    assert finished.status == 2
    message = finished.err.strip().splitlines()[-1]
    assert message.startswith("error: shapes/no_gtg stopped with exit status 2")
    assert "shapes/dimaskdino stopped with exit status 2" in message
    assert [Path(each[-1]).name for each in trainings] == ["no_gtg", "dimaskdino"]
    # The runs that are there are still collected.
    assert (tmp_path / "shapes" / "table6.md").is_file()


def test_the_plan_of_everything_lists_every_run_once(run, tmp_path: Path) -> None:
    finished = run(SCRIPT, "all", *(f"--dataset={dataset}" for dataset in DATASETS), "--output", tmp_path)
    assert finished.status == 0
    names = folders(finished.out)
    assert len(names) == len(set(names))
    assert [sum(name.startswith(f"{dataset}/") for name in names) for dataset in DATASETS] == [42, 21, 2, 2, 31]
    assert "--measure" in finished.out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["table1", "table5", "figure1", "maskdino_semantic"])
def test_a_table_is_planned_and_collected_before_any_run(name, run, tmp_path: Path) -> None:
    table = paper_tables()[name]
    datasets = [f"--dataset={dataset}" for dataset in table.datasets]
    planned = run(SCRIPT, table.name, *datasets, "--dry-run", "--output", tmp_path)
    assert planned.status == 0
    assert {name.split("/")[0] for name in folders(planned.out)} == set(table.datasets)
    collected = run(SCRIPT, table.name, *datasets, "--collect", "--output", tmp_path)
    assert collected.status == 0
    assert collected.out.count(f"{table.title}, on ") == len(table.datasets)
    assert "| not run " in collected.out
    for dataset in table.datasets:
        assert {path.suffix for path in (tmp_path / dataset).iterdir()} == {".md", ".csv"}


def test_a_measured_iteration_gives_the_hours(run, trainings, tmp_path, shapes_root):
    # The first iterations are not timed.
    options = ["--options", *TINY, "DATASETS.SHAPES.ROOT", shapes_root]
    finished = run(
        *(SCRIPT, "table6", "table9", "--dataset", "shapes", "--measure", 5, "--num-gpus", 0),
        *("--output", tmp_path, *options),
    )
    assert finished.status == 0, finished.err
    assert len(trainings) == 1
    assert "unknown" not in finished.out


def test_the_figure_is_collected_with_its_picture(run, tmp_path: Path) -> None:
    write_run(tmp_path, "bdd100k", "maskdino", box=28.0, mask=25.0, first_layer=(16.0, 21.0))
    write_run(tmp_path, "bdd100k", "dimaskdino", box=29.0, mask=26.0, first_layer=(21.0, 22.0))
    finished = run(SCRIPT, "figure1", "--collect", "--output", tmp_path)
    assert "-5.0 / -4.5 (-0.5)" in finished.out
    with Image.open(tmp_path / "bdd100k" / "figure1.png") as image:
        assert min(image.size) > 500


def test_an_impossible_request_is_refused_in_one_line(run, tmp_path: Path) -> None:
    for arguments, parts in (
        (("table1", "--dataset", "shapes"), ("table1", "shapes", "coco")),
        (("table4", "--submit", "slurm", "--slurm", "partition"), ("--slurm", "KEY=VALUE", "'partition'")),
    ):
        refused = run(SCRIPT, *arguments)
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert all(part in refused.err for part in parts)
    assert "invalid choice: 'table10'" in run(SCRIPT, "table10").err
    assert "argument --num-gpus: -1 is too small" in run(SCRIPT, "table4", "--num-gpus", -1).err
    refused = run(SCRIPT, "table4", "--submit", "slurm", "--num-gpus", 8, "--slurm", "slurm_partition=gpu")
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "--slurm timeout_min=2880" in refused.err


def test_the_plan_shows_which_runs_get_fewer_gpus(run, tmp_path: Path) -> None:
    finished = run(SCRIPT, "table1", "--num-gpus", 8, "--output", tmp_path, "--verbose")
    gpus = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in finished.out.splitlines() if "|" in line
    }
    assert gpus["coco/dimaskdino_swinl_12ep"] == gpus["coco/maskdino_swinl_50ep"] == "4"
    assert gpus["coco/dimaskdino_r50_12ep"] == ""
    assert "not 8: no more can share its batch" in finished.out
    commands = [line for line in finished.out.splitlines() if "train_net.py --config-file" in line]
    assert all(("--num-gpus 4" in line) is ("swinl" in line) for line in commands)
    assert "GPUs" not in run(SCRIPT, "table1", "--num-gpus", 4, "--output", tmp_path).out


def test_the_imbalance_is_drawn_from_runs_or_files(run, tmp_path: Path) -> None:
    one = write_run(tmp_path, "bdd100k", "maskdino", first_layer=(16.0, 21.0))
    two = write_run(tmp_path, "bdd100k", "dimaskdino", first_layer=(21.0, 22.0))
    script, picture = "tools/plot_imbalance.py", tmp_path / "figures" / "one.svg"
    finished = run(script, one, two / "inference" / "layers.json", "--output", picture, "--all-layers")
    assert (finished.status, finished.out) == (0, f"{picture}\n")
    drawn = picture.read_text()
    assert "<!-- maskdino_r50_68ep -->" in drawn
    assert "<!-- dimaskdino_r50_68ep -->" in drawn
    labels = ["--labels", "MaskDINO", "DI-MaskDINO"]
    assert run(script, one, two, *labels, "--paper", "--output", tmp_path / "two.png").status == 0
    assert "2 runs, but there are 1" in run(script, one, *labels).err
    again = write_run(tmp_path / "again", "bdd100k", "dimaskdino", box=31.0)
    shutil.copy(two / "inference" / "layers.json", again / "inference")
    refused = run(script, one, again)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "another evaluation" in refused.err
    shutil.rmtree(two / "inference")
    assert "layers.json does not exist" in run(script, one, two).err


def test_the_picture_has_a_known_format(run, tmp_path: Path) -> None:
    one = write_run(tmp_path, "bdd100k", "maskdino", first_layer=(16.0, 21.0))
    script = "tools/plot_imbalance.py"
    plain = run(script, one, "--output", tmp_path / "plain")
    assert (plain.status, plain.out) == (0, f"{tmp_path / 'plain.png'}\n")
    assert (tmp_path / "plain.png").is_file()
    (tmp_path / "file").touch()
    for output, words in (
        ("x.foo", "must end in .png, .pdf, .svg, not in .foo."),
        ("bdd100k", "is a folder"),
        ("file/x.png", "there is a file where a folder is needed"),
    ):
        refused = run(script, one, "--output", tmp_path / output)
        assert refused.status == 2
        assert refused.err.startswith("error: ")
        assert refused.err.count("\n") == 1
        assert words in refused.err


def test_a_file_without_stages_is_refused_in_one_line(run, tmp_path: Path) -> None:
    one = write_run(tmp_path, "bdd100k", "maskdino", first_layer=(16.0, 21.0))
    refused = run("tools/plot_imbalance.py", one / "inference" / "results.json", "--output", tmp_path / "x.png")
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert "results.json holds a dict, not a list" in refused.err


def test_the_examples_of_help_and_guide_are_commands(run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(SCRIPT, "--help").out + (REPO / "docs" / "reproduce.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("  ", "python")) and f"{SCRIPT} " in line]
    assert len(lines) > 12
    parse_args = runpy.run_path(str(REPO / SCRIPT))["parse_args"]
    for line in lines:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *line.split(SCRIPT)[1].split("#")[0].split()])
        assert set(parse_args().tables) <= {*paper_tables(), "all"}


def test_effects_of_two_modules_are_collected(run, tmp_path: Path) -> None:
    for row, box in (("neither", 10.0), ("di_only", 13.0), ("bato_only", 12.0), ("dimaskdino", 17.0)):
        write_run(tmp_path, "shapes", row, box=box)
    collected = run(SCRIPT, "interaction", "--dataset", "shapes", "--collect", "--output", tmp_path)
    assert collected.status == 0, collected.err
    assert re.search(r"\| DI x BATO +\| box AP +\| \+2.00 +\| – +\| \+0.20 +\|", collected.out)
    assert (tmp_path / "shapes" / "interaction.csv").read_text().count("\n") == 7


def test_scores_are_drawn_against_epochs(run, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "shapes", "neither", box=31.5)
    drawn = run("tools/plot_epochs.py", folder, "--metrics", "bbox/AP", "--output", tmp_path / "curves")
    assert drawn.status == 0, drawn.err
    # 1,350 iterations of 8 images, 2,000 an epoch.
    assert "bbox/AP, neither, epoch 5.4: 31.500" in drawn.out
    assert (tmp_path / "curves.png").is_file()
    refused = run("tools/plot_epochs.py", folder, "--atd", 100)
    assert refused.status == 2
    assert "MODEL.META_ARCHITECTURE" in refused.err
