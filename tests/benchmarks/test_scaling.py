"""The benchmark of scaling: what each point measures, its numbers, and its picture."""

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import one_pass, scaling
from benchmarks.against import Case
from dimaskdino.errors import UserError


def test_every_point_varies_one_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
