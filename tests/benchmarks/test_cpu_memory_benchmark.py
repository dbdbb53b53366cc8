"""The benchmark of memory on the CPU: its table, and that a process that fails ends it."""

import sys
from pathlib import Path

import pytest

from benchmarks import cpu_memory

DEMO = str(Path(__file__).parents[2] / "configs" / "demo" / "dimaskdino_shapes.yaml")
ARGUMENTS = ["--config-file", DEMO, "--sizes", "64", "--train-sizes", "--many-sizes", "64", "--rounds", "1"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # its processes are modules of the repository
    monkeypatch.setattr(sys, "argv", ["cpu_memory", *ARGUMENTS])
    for name in ("MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def test_the_command_prints_a_row_for_each_pass_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    cpu_memory.main()
    lines = capsys.readouterr().out.splitlines()[3:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows] == [["inference", "64"], ["many sizes", "64"]]
    assert all(float(row[2].removesuffix("x")) > 0 and min(int(row[3]), int(row[4])) > 100 for row in rows)


def test_a_choice_of_the_user_ends_it_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    with pytest.raises(SystemExit, match="environment variables choose how it keeps memory"):
        cpu_memory.main()
