"""`python -m benchmarks.whole_model --against COMMIT`: commits that cannot be compared with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import against
from dimaskdino.errors import UserError


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Path:
    """A repository whose only commit has a setup.py that fails."""
    folder = tmp_path / "repository"
    (folder / "dimaskdino").mkdir(parents=True)
    (folder / "dimaskdino" / "__init__.py").touch()
    (folder / "setup.py").write_text("raise SystemExit('no compiler')\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    monkeypatch.setattr(against, "ROOT", folder)
    return folder


def test_an_unknown_commit_is_one_line(repository):
    with pytest.raises(UserError, match=r"^--against nothing: [^\n]+$"), against.checkout("nothing"):
        pass


def test_commit_that_cannot_be_built_is_one_line(repository):
    with pytest.raises(UserError, match=r"^--against HEAD: [^\n]*no compiler[^\n]*$"), against.checkout("HEAD"):
        pass
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1


def test_worktrees_of_killed_runs_are_removed(repository, tmp_path):
    (repository / "dimaskdino" / "_C.so").touch()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running = (tmp_path / f"dimaskdino-{process}-x" / "tree" for process in (ended.pid, os.getpid()))
    for tree in (left, running):
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), "HEAD"], cwd=repository, check=True)
    with against.checkout("HEAD"):
        assert not left.parent.exists()
        assert running.is_dir()
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert str(left) not in listed


def test_a_commit_with_the_same_op_takes_its_library(repository):
    (repository / "dimaskdino" / "_C.so").write_bytes(b"library")
    with against.checkout("HEAD") as tree:
        assert (tree / "dimaskdino" / "_C.so").read_bytes() == b"library"
        assert tree != repository
    assert not tree.exists()


def test_rows_are_those_of_the_table():
    names = [case.name for cases in against.ROWS.values() for case in cases]
    assert len(names) == 12
    assert "inference, 800 x 1216, bfloat16" in names
    assert "training step, 400 objects, 512 x 512, float32" in names
