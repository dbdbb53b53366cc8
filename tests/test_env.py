"""The report of the environment."""

import runpy

import pytest
import torch

import dimaskdino


def test_report_names_versions_op_and_devices(capsys: pytest.CaptureFixture) -> None:
    runpy.run_module("dimaskdino.env", run_name="__main__")
    printed = capsys.readouterr().out
    report = dict(line.split(": ", 1) for line in printed.splitlines()[:5])
    assert report["dimaskdino"] == dimaskdino.__version__
    assert "compiled" in report["deformable attention"]
    assert "thread" in report["devices"]
    assert int(report["CPU cores"]) > 0
    assert f"OMP_NUM_THREADS={torch.get_num_threads()}" in report["variables"]
    assert torch.__version__ in printed
