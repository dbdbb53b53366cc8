"""docs/demo.ipynb is committed without outputs, and its cells run in their order."""

import json
from typing import Any

import pytest

from tests.documentation import REPOSITORY

PATH = REPOSITORY / "docs" / "demo.ipynb"
CELLS: list[dict[str, Any]] = json.loads(PATH.read_text())["cells"]


def test_notebook_is_valid() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(PATH, as_version=4))


def test_no_outputs_are_committed() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


def test_cells_run_and_find_the_drawn_shapes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(REPOSITORY / "docs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    drawn = [list(names["SHAPES"])[label] for label in names["picture"].classes]
    assert sorted(names["result"].class_names) == sorted(drawn)
    assert len(names["found"]["layers"]) >= 4
    written = {path.name for path in names["folder"].iterdir()}
    assert written == {"coco.json", "found.json", "found.png", "shapes.safetensors"}
    assert f"{names['folder']}" in capsys.readouterr().out
