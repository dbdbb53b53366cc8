"""tools/demo.py on a model and pictures that take seconds."""

import os
from pathlib import Path

import pytest
from PIL import Image

from dimaskdino.config import get_cfg
from tests.cli.conftest import REPO, TINY


def test_the_demo_prints_its_tables_and_the_path_of_the_picture_grid(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One core: the demo trains in this process instead of starting others.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    cfg = get_cfg()
    cfg.merge_from_file(str(REPO / "configs" / "demo" / "dimaskdino_shapes.yaml"))
    cfg.merge_from_list(TINY)
    config = tmp_path / "tiny.yaml"
    config.write_text(cfg.dump())
    output = tmp_path / "demo"
    finished = run("tools/demo.py", "--output", output, "--config-file", config, "--pictures", 2)
    assert finished.status == 0
    for part in ("| box ", "| mask ", "| layer.0 ", "| layer.1 ", "box minus mask AP at the last decoder layer: "):
        assert part in finished.out
    picture = output / "predictions.png"
    assert f"pictures: {picture}" in finished.out
    with Image.open(picture) as image:
        assert min(image.size) > 400
    assert {path.name for path in output.iterdir()} == {"predictions.png", "run", "shapes"}
