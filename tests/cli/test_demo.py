"""tools/demo.py on a model and pictures that take seconds."""

import os
import runpy
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
    again = run(SCRIPT, "--output", output, "--config-file", config, "--pictures", 1)
    assert again.status == 0
    assert f"The earlier run in {output / 'run'} is replaced" in again.out
    assert not (output / "run" / "of_the_earlier_run").exists()
    assert kept.is_file()


def test_a_folder_that_is_no_run_is_left_alone(run, config: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "demo" / "run" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    refused = run(SCRIPT, "--output", tmp_path / "demo", "--config-file", config)
    assert refused.status == 2
    assert refused.err.startswith(f"error: {thesis.parent} is not the folder of an earlier run")
    assert thesis.is_file()


def test_a_start_that_failed_is_replaced(tmp_path: Path) -> None:
    remove_earlier = runpy.run_path(str(REPO / SCRIPT))["remove_earlier"]
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("log.txt", "log.txt.rank1"):
        (folder / name).touch()
    remove_earlier(folder)
    assert not folder.exists()
    remove_earlier(folder)


def test_the_quick_demo_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = runpy.run_path(str(REPO / SCRIPT))["parse_args"]
    for arguments, output in (
        ([], "output/demo"),
        (["--quick"], "output/demo_quick"),
        (["--quick", "--output", "mine"], "mine"),
    ):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        assert parse_args().output == Path(output)


def test_no_picture_at_all_is_refused(run) -> None:
    refused = run(SCRIPT, "--pictures", 0)
    assert refused.status == 2
    assert "argument --pictures: 0 is too small; it must be at least 1" in refused.err
