"""--help comes at once: the command lines load no torch, and registration waits for detectron2."""

import subprocess
import sys
from pathlib import Path

import pytest

from dimaskdino.after_import import after_import

REPO = Path(__file__).parents[2]
# Of installing, which say nothing of their own, and one whose defaults are those of a dataset.
OTHERS = {"build_op.py", "detectron2_wheel.py", "install_detectron2.py", "make_shapes.py"}
TOOLS = sorted(path.name for path in (REPO / "tools").glob("*.py") if path.name not in OTHERS)
COMMANDS = ("train_net.py", *(f"tools/{name}" for name in TOOLS))
RUN = """
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    slow = ("torch", "torch._dynamo", "torchvision", "torchvision.models", "timm", "scipy", "matplotlib")
    print([name for name in slow if name in sys.modules], file=sys.stderr)
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_loads_nothing_slow(script: str) -> None:
    finished = python(RUN.format(script=script))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("usage: ")
    assert finished.stderr.strip() == "[]"


def test_parts_are_registered_with_detectron2s_models() -> None:
    code = "import dimaskdino, sys; from detectron2.modeling import META_ARCH_REGISTRY as r; print('DIMaskDINO' in r)"
    assert python(code).stdout.strip() == "True"


def test_function_runs_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_later.py").write_text("ready = True")
    monkeypatch.syspath_prepend(tmp_path)
    calls, finders = [], list(sys.meta_path)
    after_import("imported_later", lambda: calls.append(sys.modules["imported_later"].ready))
    import json  # noqa: F401  (another module calls nothing)

    assert calls == []
    import imported_later  # noqa: F401

    assert calls == [True]
    assert sys.meta_path == finders
    after_import("imported_later", lambda: calls.append("at once"))
    assert calls == [True, "at once"]
    del sys.modules["imported_later"]
