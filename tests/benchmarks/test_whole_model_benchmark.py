"""The benchmark of the whole model: its table, and that it stops where the forms differ."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import whole_model
from dimaskdino.layers import ms_deform_attn_ops

pytestmark = pytest.mark.skipif(not ms_deform_attn_ops.COMPILED, reason="the benchmark measures the compiled op")
DEMO = str(Path(__file__).parents[2] / "configs" / "demo" / "dimaskdino_shapes.yaml")


@pytest.fixture
def run(monkeypatch, capsys):
    arguments = ["--device", "cpu", "--sizes", "64", "96", "--train-sizes", "64", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["whole_model", "--config-file", DEMO, *arguments])

    def table() -> list[list[str]]:
        whole_model.main()
        lines = capsys.readouterr().out.splitlines()[4:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return table


def test_the_command_prints_a_row_for_each_pass_and_size(run):
    rows = run()
    assert [row[:2] for row in rows] == [["inference", "64"], ["inference", "96"], ["training step", "64"]]
    assert all(float(row[2].removesuffix("x")) > 0 for row in rows)


def test_forms_that_differ_end_the_run(run, monkeypatch):
    plain = whole_model.OP.ms_deform_attn_fused_reference
    monkeypatch.setattr(whole_model.OP, "ms_deform_attn_fused_reference", lambda *args: torch.zeros_like(plain(*args)))
    with pytest.raises(AssertionError, match="not close"):
        run()
