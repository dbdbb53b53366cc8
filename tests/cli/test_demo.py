"""tools/demo.py on a model and pictures that take seconds."""

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from dimaskdino.config import get_cfg
from tests.cli.conftest import REPO, TINY

SCRIPT = "tools/demo.py"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    cfg = get_cfg()
    cfg.merge_from_file(str(REPO / "configs" / "demo" / "dimaskdino_shapes.yaml"))
    cfg.merge_from_list(TINY)
    path = tmp_path / "tiny.yaml"
    path.write_text(cfg.dump())
    return path


def test_the_demo_prints_its_tables_and_the_path_of_the_picture_grid(
    run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One core: the demo trains in this process instead of starting others.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    output = tmp_path / "demo"
    finished = run(SCRIPT, "--output", output, "--config-file", config, "--pictures", 2)
    assert finished.status == 0
    assert "is replaced" not in finished.out
    for part in ("| box ", "| mask ", "| layer.0 ", "| layer.1 ", "box minus mask AP at the last decoder layer: "):
        assert part in finished.out.split("2. Drawing")[0]
    picture = output / "predictions.png"
    assert f"pictures: {picture}" in finished.out
    with Image.open(picture) as image:
        assert min(image.size) > 400
    assert {path.name for path in output.iterdir()} == {"predictions.png", "run", "shapes"}

    kept = output / "run" / "model_final.pth"
    assert run(SCRIPT, "--output", output, "--config-file", tmp_path / "absent.yaml").status == 2
    assert kept.is_file()
    (output / "run" / "of_the_earlier_run").touch()
    unfit = tmp_path / "unfit.yaml"
    unfit.write_text(f"_BASE_: {config}\nDATASETS: {{TRAIN: [shapes_trian]}}\n")
    refused = run(SCRIPT, "--output", output, "--config-file", unfit)
    assert refused.status == 2
    assert "shapes_trian" in refused.err.splitlines()[-1]
    assert refused.out.splitlines()[-1] == f"The training did not begin, so the earlier run is in {kept.parent} again"
    assert (kept.parent / "of_the_earlier_run").is_file()
    assert {path.name for path in output.iterdir()} == {"predictions.png", "run", "shapes"}
    again = run(SCRIPT, "--output", output, "--config-file", config, "--pictures", 1)
    assert again.status == 0
    assert f"The earlier run in {output / 'run'} is replaced" in again.out
    assert not (output / "run" / "of_the_earlier_run").exists()
    assert kept.is_file()
    assert {path.name for path in output.iterdir()} == {"predictions.png", "run", "shapes"}


def test_a_folder_that_is_no_run_is_left_alone(run, config: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "demo" / "run" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    refused = run(SCRIPT, "--output", tmp_path / "demo", "--config-file", config)
    assert refused.status == 2
    assert refused.err.startswith(f"error: {thesis.parent} is not the folder of an earlier run")
    assert thesis.is_file()


def test_a_start_that_failed_is_replaced(tmp_path: Path) -> None:
    demo = runpy.run_path(str(REPO / SCRIPT))
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("log.txt", "log.txt.rank1"):
        (folder / name).touch()
    earlier = demo["set_earlier_aside"](folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "config.yaml").touch()
    demo["settle_earlier"](folder, earlier)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "config.yaml"]
    shutil.rmtree(folder)
    demo["settle_earlier"](folder, demo["set_earlier_aside"](folder))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("begun", "kept"), [(True, "log.txt.new"), (False, "log.txt.old")])
def test_of_a_demo_that_was_killed_the_last_training_that_began_is_the_earlier_run(
    tmp_path: Path, begun: bool, kept: str
) -> None:
    folder, aside = tmp_path / "run", tmp_path / ".run_set_aside"
    for path, name in ((folder, "log.txt.new"), (aside, "log.txt.old")):
        path.mkdir()
        (path / name).touch()
    (aside / "config.yaml").touch()
    if begun:
        (folder / "config.yaml").touch()
    earlier = runpy.run_path(str(REPO / SCRIPT))["set_earlier_aside"](folder)
    assert not folder.exists()
    assert {path.name for path in earlier.iterdir()} == {"config.yaml", kept}


def test_the_quick_demo_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = runpy.run_path(str(REPO / SCRIPT))["parse_args"]
    for arguments, output in (
        ([], "output/demo"),
        (["--quick"], "output/demo_quick"),
        (["--quick", "--output", "mine"], "mine"),
    ):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        assert parse_args().output == Path(output)


@pytest.mark.parametrize(("option", "number", "least"), [("--pictures", 0, 1), ("--seed", -1, 0)])
def test_a_number_that_is_too_small_is_refused(run, option: str, number: int, least: int) -> None:
    refused = run(SCRIPT, option, number)
    assert refused.status == 2
    assert f"argument {option}: {number} is too small; it must be at least {least}" in refused.err
