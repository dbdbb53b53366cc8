"""Running a tool inside the test process."""

import runpy
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def run_script(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """Run a script of the repository with a command line; returns its exit status."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return 0
