"""The benchmarks of queries, scaling and training keys, and the commits that they can be compared with."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import against, one_pass, queries, scaling, training_keys
from benchmarks.against import Case
from benchmarks.training_keys import ALONE, KEYS, SHARDING, TWO, configured, measure, rows
from dimaskdino.errors import UserError


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Path:
    """A repository whose only commit has a setup.py that fails."""
    folder = tmp_path / "repository"
    (folder / "dimaskdino").mkdir(parents=True)
    (folder / "dimaskdino" / "__init__.py").touch()
    (folder / "setup.py").write_text("raise SystemExit('no compiler')\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    monkeypatch.setattr(against, "ROOT", folder)
    return folder


def test_an_unknown_commit_is_one_line(repository):
    with pytest.raises(UserError, match=r"^--against nothing: [^\n]+$"), against.checkout("nothing"):
        pass


def test_commit_that_cannot_be_built_is_one_line(repository):
    with pytest.raises(UserError, match=r"^--against HEAD: [^\n]*no compiler[^\n]*$"), against.checkout("HEAD"):
        pass
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1


def test_worktrees_of_killed_runs_are_removed(repository, tmp_path):
    (repository / "dimaskdino" / "_C.so").touch()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running = (tmp_path / f"dimaskdino-{process}-x" / "tree" for process in (ended.pid, os.getpid()))
    for tree in (left, running):
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), "HEAD"], cwd=repository, check=True)
    with against.checkout("HEAD"):
        assert not left.parent.exists()
        assert running.is_dir()
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert str(left) not in listed


def test_a_commit_with_the_same_op_takes_its_library(repository):
    (repository / "dimaskdino" / "_C.so").write_bytes(b"library")
    with against.checkout("HEAD") as tree:
        assert (tree / "dimaskdino" / "_C.so").read_bytes() == b"library"
        assert tree != repository
    assert not tree.exists()


def test_rows_are_those_of_the_table():
    names = [case.name for cases in against.ROWS.values() for case in cases]
    assert len(names) == 12
    assert "inference, 800 x 1216, bfloat16" in names
    assert "training step, 400 objects, 512 x 512, float32" in names


@pytest.mark.parametrize("train", [True, False])
def test_a_run_is_measured_with_this_many_queries(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "SIZE", 64)
    found = queries.measure(20, train=train)
    assert found["seconds"] > 0
    assert found["MiB"] >= 0
    cfg = queries.configured(20)
    assert cfg.MODEL.MaskDINO.NUM_OBJECT_QUERIES == cfg.TEST.DETECTIONS_PER_IMAGE == 20


def test_every_point_varies_one_thing(tmp_path, monkeypatch, capsys):
    asked: list[tuple[Case, list[str]]] = []

    def measure(tree: Path, case: Case, config_file: Path, options: list[str]) -> dict[str, float]:
        asked.append((case, options))
        return {"seconds": len(asked), "peak": 2**30 * len(asked)}

    monkeypatch.setattr(scaling, "measure", measure)
    picture = tmp_path / "scaling.png"
    arguments = ["--sizes", "64", "96", "--objects", "5", "--queries", "20", "--threads", "2", "--side", "32"]
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments, "--output", str(picture)])
    scaling.main()
    assert asked == [
        (Case(64, 64), ["--runs", "1"]),
        (Case(96, 96), ["--runs", "1"]),
        (Case(32, 32, 5), ["--runs", "1"]),
        (Case(32, 32), ["--runs", "1", "--queries", "20"]),
        (Case(32, 32), ["--runs", "1", "--threads", "2"]),
    ]
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    numbers = [[float(cell) for cell in row] for row in rows if row[0].strip().isdigit()]
    assert numbers == [[64, 1, 1], [96, 2, 2], [5, 3, 3], [20, 4, 4], [2, 5, 5]]
    with Image.open(picture) as drawn:
        assert drawn.width > 3 * drawn.height  # four panels


def test_a_point_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any) -> dict[str, float]:
        raise UserError("inference, 64 x 64, float32 failed: out of memory.")

    monkeypatch.setattr(scaling, "measure", fails)
    monkeypatch.setattr(sys, "argv", ["scaling", "--sizes", "64"])
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert "out of memory" in capsys.readouterr().err


def test_objects_are_of_the_classes_of_the_model() -> None:
    classes = one_pass.sample(32, 32, objects=50, num_classes=3)["instances"].gt_classes
    assert set(classes.tolist()) == {0, 1, 2}


DEMO = str(Path(__file__).parents[2] / "configs" / "demo" / "dimaskdino_shapes.yaml")


def options(name: str, tmp_path: Path) -> argparse.Namespace:
    output = tmp_path / "found.json"
    settings = {"config_file": DEMO, "size": 64, "batch": 2, "steps": 2, "warm_up": 1, "cpu_time": True}
    return argparse.Namespace(one=name, **settings, output=output)


def test_rows_are_ratios_to_the_default_of_as_many_processes() -> None:
    def runs(*seconds: float, mebibytes: float) -> list[dict[str, float]]:
        return [{"seconds": each, "mebibytes": mebibytes} for each in seconds]

    accumulated, full = "`SOLVER.ACCUMULATION_STEPS 2`", f"`{SHARDING} full`"
    found = {
        ALONE: runs(1.0, 2.0, 9.0, mebibytes=1000),
        accumulated: runs(3.0, 3.0, 8.0, mebibytes=500),
        TWO: runs(4.0, mebibytes=2000),
        full: runs(5.0, mebibytes=1000),
    }
    assert rows(found) == [
        [ALONE, "1 (2.00 s)", "1 (1000 MiB)"],
        [accumulated, "1.50", "0.50"],
        [TWO, "1 (4.00 s)", "1 (2000 MiB)"],
        [full, "1.25", "0.50"],
    ]


def test_each_key_changes_the_configuration(tmp_path: Path) -> None:
    dumps = {name: configured(options(name, tmp_path)).dump() for name in KEYS}
    assert dumps[ALONE] == dumps[TWO]
    assert len(set(dumps.values())) == len(KEYS) - 1


def test_a_key_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    monkeypatch.setattr(training_keys.AveragedWeights, "update", lambda self, iteration: updates.append(iteration))
    args = options("`SOLVER.EMA.ENABLED True`", tmp_path)
    measure(args)
    found = json.loads(args.output.read_text())
    assert found["seconds"] > 0
    assert found["mebibytes"] > 100
    assert updates == [0, 1, 2]
