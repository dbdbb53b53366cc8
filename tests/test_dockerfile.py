"""The Dockerfile runs the Makefile's targets; `make docker-check` runs its RUN lines in a copy, without Docker."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documentation import REPOSITORY, copy_repository

LINES = (REPOSITORY / "Dockerfile").read_text().splitlines()
IGNORED = (REPOSITORY / ".dockerignore").read_text().split()
APT = r"apt-get update && apt-get install -y --no-install-recommends ([\w+. -]+) && rm -rf /var/lib/apt/lists/\*"
PREDICT = (
    "tools/predict.py docs/images/demo.png --config-file configs/demo/dimaskdino_shapes.yaml "
    "--weights tools/demo_model.pth --device cpu --output output/docker_check"
)


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def run_targets() -> list[str]:
    """The make targets of the RUN lines after the first."""
    return [line.removeprefix("make ") for line in instructions("RUN")[1:]]


def test_apt_comes_first_and_every_other_run_is_a_make_target() -> None:
    first, *others = instructions("RUN")
    assert re.fullmatch(APT, first)
    assert all(line.startswith("make ") for line in others)
    makefile = (REPOSITORY / "Makefile").read_text()
    known = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)[1].split()
    assert run_targets()
    assert set(run_targets()) <= set(known)


def test_cuda_is_a_build_argument_that_the_build_of_the_op_reads() -> None:
    arguments = dict(line.split("=", 1) for line in instructions("ARG"))
    assert arguments["FORCE_CUDA"] == "0"
    builder = (REPOSITORY / "tools" / "build_op.py").read_text()
    assert all(f'environ.get("{name}"' in builder for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"))


def test_image_holds_what_git_holds_and_nothing_built() -> None:
    tracked = [
        *("Makefile", "setup.py", "requirements.txt", "README.md", "dimaskdino", "configs", "tools", "docs", "tests"),
        *("datasets/README.md", "train_net.py"),
    ]
    assert not [name for name in tracked if name in IGNORED or f"{name}/" in IGNORED]
    git_ignored = [line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().split() if line[0] == "/"]
    assert set(git_ignored) <= set(IGNORED)
    assert {".git", "**/*.so", "**/__pycache__"} <= set(IGNORED)


def environment() -> dict[str, str]:
    """That of a RUN line: the defaults of the arguments, and what the network of this machine needs."""
    kept = re.compile(r"PIP_.*|UV_.*|.*_proxy|.*_CERT.*|CC|CXX|LANG", re.IGNORECASE)
    arguments = dict(line.split("=", 1) for line in instructions("ARG") if not line.startswith(("BASE", "PIP_")))
    plain = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": os.environ["HOME"]}
    network = {name: value for name, value in os.environ.items() if kept.fullmatch(name)}
    return plain | network | {name: value.strip('"') for name, value in arguments.items()}


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.timeout(3600)
def test_run_lines_install_what_predicts(tmp_path: Path) -> None:
    """In a copy of what git tracks. Of the first line, only that the packages exist: the rest needs root."""
    packages = re.fullmatch(APT, instructions("RUN")[0])[1].split()
    if shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "--simulate", "-q", "--no-install-recommends", *packages], check=True)
    copy = tmp_path / "dimaskdino"
    copy_repository(copy)
    try:
        for target in run_targets():
            subprocess.run(["make", target], cwd=copy, env=environment(), check=True)
        python = copy / ".venv" / "bin" / "python"
        subprocess.run([python, *shlex.split(PREDICT)], cwd=copy, env=environment(), check=True)
        compiled = "from dimaskdino.layers.ms_deform_attn_ops import MISSING as m; assert m is None, m"
        subprocess.run([python, "-c", compiled], cwd=copy, env=environment(), check=True)
        assert list((copy / "output" / "docker_check").rglob("*.json"))
    finally:
        shutil.rmtree(copy / ".venv", ignore_errors=True)  # gigabytes
