"""tools/demo.py on a model and pictures that take seconds."""

import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from dimaskdino.config import get_cfg
from tests.cli.conftest import TINY
from tests.data_pipeline.scripts import REPO

SCRIPT = "tools/demo.py"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    cfg = get_cfg()
    cfg.merge_from_file(str(REPO / "configs" / "demo" / "dimaskdino_shapes.yaml"))
    cfg.merge_from_list(TINY)
    path = tmp_path / "tiny.yaml"
    path.write_text(cfg.dump())
    return path


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo work in this process instead of starting others."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


def assert_shown(finished, output: Path) -> None:
    assert finished.status == 0, finished.err
    for part in ("| box ", "| mask ", "| layer.0 ", "| layer.1 ", "box minus mask AP at the last decoder layer: "):
        assert part in finished.out.split("2. Drawing")[0]
    assert f"pictures: {output / 'predictions.png'}" in finished.out
    with Image.open(output / "predictions.png") as image:
        assert min(image.size) > 400


def test_demo_trains_and_reports_and_quick_shows_its_model(run, config, tmp_path, monkeypatch):
    output, quick = tmp_path / "demo", tmp_path / "quick"
    assert_shown(run(SCRIPT, "--output", output, "--config-file", config, "--pictures", 2), output)
    weights = output / "run" / "model_final.pth"
    assert weights.is_file()

    # A copy of the tool beside a model of this test.
    tool = tmp_path / "repository" / "tools" / "demo.py"
    tool.parent.mkdir(parents=True)
    shutil.copy(REPO / SCRIPT, tool)
    refused = run(tool, "--quick", "--output", quick, "--config-file", config)
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert str(tool.with_name("demo_model.pth")) in refused.err
    shutil.copy(weights, tool.with_name("demo_model.pth"))
    assert_shown(run(tool, "--quick", "--output", quick, "--config-file", config, "--pictures", 1), quick)
    assert not list(quick.rglob("*.pth"))


def test_all_tasks_are_trained_reported_and_shown_in_one_picture(run, tmp_path: Path) -> None:
    tool, configs = tmp_path / "repository" / "tools" / "demo.py", tmp_path / "repository" / "configs" / "demo"
    tool.parent.mkdir(parents=True)
    configs.mkdir(parents=True)
    shutil.copy(REPO / SCRIPT, tool)
    dino = [*("MODEL.DINO.ENC_LAYERS", "1", "MODEL.DINO.DEC_LAYERS", "1"), *("MODEL.DINO.DN_NUM", "4")]
    for file in (REPO / "configs" / "demo").glob("*_shapes.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(file))
        cfg.merge_from_list([*TINY, *dino, "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "TEST.EVAL_LAYERS", "[]"])
        cfg.merge_from_list(["INPUT.CROP.SIZE", "[64, 64]", "INPUT.SIZE_DIVISIBILITY", "64"])
        (configs / file.name).write_text(cfg.dump())
    finished = run(tool, "--all", "--output", tmp_path / "all", "--pictures", 1)
    assert finished.status == 0, finished.err
    tables = [part.rpartition("Percent:")[2] for part in re.split(r"\d of 5\. ", finished.out)[1:]]
    for table, heads in zip(tables, ("box", "mask", "PQ SQ RQ", "PQ SQ RQ", "mIoU"), strict=True):
        assert all(re.search(rf"\| +{head} +\|", table) for head in heads.split())
    with Image.open(tmp_path / "all" / "tasks.png") as image:
        assert image.width > 6 * 384
        assert image.height > 384


def test_quick_does_not_go_with_all(run) -> None:
    refused = run(SCRIPT, "--quick", "--all")
    assert refused.status == 2
    assert "--quick" in refused.err.splitlines()[-1]
    assert "--all" in refused.err.splitlines()[-1]


def test_each_kind_of_demo_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = runpy.run_path(str(REPO / SCRIPT))["parse_args"]
    for arguments, output in (
        ([], "output/demo"),
        (["--quick"], "output/demo_quick"),
        (["--all"], "output/demo_all"),
        (["--all", "--smoke"], "output/demo_all_smoke"),
        (["--smoke"], "output/demo_smoke"),
        (["--quick", "--output", "mine"], "mine"),
    ):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        assert parse_args().output == Path(output)


@pytest.mark.parametrize(("option", "number", "least"), [("--pictures", 0, 1), ("--seed", -1, 0)])
def test_a_number_that_is_too_small_is_refused(run, option: str, number: int, least: int) -> None:
    refused = run(SCRIPT, option, number)
    assert refused.status == 2
    assert f"argument {option}: {number} is too small; it must be at least {least}" in refused.err
