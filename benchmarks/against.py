"""The whole model against an earlier commit, which is built in a git worktree beside the checkout.

`python -m benchmarks.whole_model --against COMMIT` prints the table. Every measurement runs in a process of its own
(benchmarks/one_pass.py), the two commits in turn, so that what slows the machine down slows both.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from dimaskdino.errors import UserError

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
ROOT = Path(__file__).parents[1]
# What the compiled op is made of; where it is equal, this checkout's library is the commit's.
OP_SOURCES = ("dimaskdino/layers/csrc", "tools/build_op.py", "setup.py")


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        height: of the image, px.
        width: of the image, px.
        objects: of a training step; 0 for inference.
        precision: float32 or bfloat16.
    """

    height: int
    width: int
    objects: int = 0
    precision: str = "float32"

    @property
    def name(self) -> str:
        """In words."""
        what = f"training step, {self.objects} objects" if self.objects else "inference"
        return f"{what}, {self.height} x {self.width}, {self.precision}"


_SHAPES = ((512, 512), (800, 1216), (2048, 2048))
ROWS = {
    f"{kind}-{precision}": [Case(*size, objects, precision) for size, objects in cases]
    for precision in ("float32", "bfloat16")
    for kind, cases in (
        ("inference", [(size, 0) for size in _SHAPES]),
        ("training", [((512, 512), objects) for objects in (10, 100, 400)]),
    )
}


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A worktree of a commit with its compiled op, which goes when the block ends.

    Raises:
        UserError: there is no such commit, or it cannot be built.
    """
    known = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if known.returncode:
        raise UserError(f"--against {commit}: this repository has no such commit (in a shallow clone: git fetch).")
    _remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=f"dimaskdino-{os.getpid()}-") as folder:
        tree = Path(folder) / known.stdout.strip()[:12]
        added = _git("worktree", "add", "--detach", str(tree), known.stdout.strip())
        if added.returncode:
            raise UserError(f"--against {commit}: git worktree failed: {_last_line(added.stderr)}.")
        try:
            _add_op(tree, commit)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _remove_left_behind() -> None:
    """Remove the worktrees of runs that were killed; their folders name the process."""
    for line in _git("worktree", "list", "--porcelain").stdout.splitlines():
        tree = Path(line.removeprefix("worktree "))
        owner = re.match(r"dimaskdino-(\d+)-", tree.parent.name)
        if owner and not _is_running(int(owner[1])):
            _git("worktree", "remove", "--force", str(tree))
            shutil.rmtree(tree.parent, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _add_op(tree: Path, commit: str) -> None:
    libraries = sorted((ROOT / "dimaskdino").glob("_C*.so"))
    if libraries and _git("diff", "--quiet", commit, "--", *OP_SOURCES).returncode == 0:
        (tree / "dimaskdino" / libraries[0].name).write_bytes(libraries[0].read_bytes())
        return
    environment = os.environ | {"DIMASKDINO_BUILD_OP": "1", "FORCE_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if built.returncode:
        reason = _last_line(built.stderr or built.stdout)
        raise UserError(f"--against {commit}: its compiled op cannot be built here: {reason}.")


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1].rstrip(".")


def measure(tree: Path, case: Case, config_file: Path, options: Sequence[str]) -> dict[str, float]:
    """Seconds and peak bytes of one case with the package, and where it has it the configuration, of ``tree``."""
    own = tree / config_file.relative_to(ROOT) if config_file.is_relative_to(ROOT) else config_file
    command = [sys.executable, str(ROOT / "benchmarks" / "one_pass.py"), "--height", str(case.height)]
    command += ["--width", str(case.width), "--objects", str(case.objects), "--precision", case.precision]
    command += ["--config-file", str(own if own.is_file() else config_file), *options]
    # How threads wait is each commit's own choice; importing this one has set it for its children.
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment = inherited | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{case.name} failed with the package in {tree}: {_last_line(done.stderr)}.")
    return json.loads(done.stdout.splitlines()[-1])


def compare(tree: Path, case: Case, config_file: Path, options: Sequence[str], rounds: int) -> dict[str, str]:
    """The row of one case: how many times as fast, and what part of the memory, with the least and the most."""
    pairs = [[measure(each, case, config_file, options) for each in (tree, ROOT)] for _ in range(rounds)]
    speed = sorted(old["seconds"] / new["seconds"] for old, new in pairs)
    memory = statistics.median(new["peak"] / old["peak"] for old, new in pairs)
    peak = statistics.median(new["peak"] for _, new in pairs) / 2**30
    return {
        "": case.name,
        "times as fast": f"{statistics.median(speed):.2f} ({speed[0]:.2f} to {speed[-1]:.2f})",
        "times the memory": f"{memory:.2f}",
        "peak GiB": f"{peak:.1f}",
    }


def print_table(commit: str, groups: Sequence[str], config_file: Path, options: Sequence[str], rounds: int) -> None:
    """Measure and print, row by row as they come, then as a table.

    Args:
        commit: to compare with.
        groups: keys of :data:`ROWS`.
        config_file: of the model.
        options: of benchmarks/one_pass.py.
        rounds: processes of each commit, of which the median counts.

    Raises:
        UserError: the commit cannot be built, or a measurement fails.
    """
    with checkout(commit) as tree:
        rows = []
        for case in (case for group in groups for case in ROWS[group]):
            rows.append(compare(tree, case, config_file, options, rounds))
            print(*rows[-1].values(), sep="; ", file=sys.stderr, flush=True)
    print(f"against {commit}, median (least to most) of {rounds}:")
    print(tabulate(rows, headers="keys", tablefmt="github"))
