"""The report of the environment."""

import subprocess
import sys

import torch

import dimaskdino


def test_the_report_names_versions_op_and_devices() -> None:
    done = subprocess.run([sys.executable, "-m", "dimaskdino.env"], capture_output=True, text=True, check=True)
    report = dict(line.split(": ", 1) for line in done.stdout.splitlines()[:5])
    assert report["dimaskdino"] == dimaskdino.__version__
    assert "compiled" in report["deformable attention"]
    assert "thread" in report["devices"]
    assert int(report["CPU cores"]) > 0
    assert f"OMP_NUM_THREADS={torch.get_num_threads()}" in report["variables"]
    assert torch.__version__ in done.stdout
