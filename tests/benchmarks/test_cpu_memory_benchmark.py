"""The benchmark of memory on the CPU: its table, and that a process that fails ends it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cpu_memory

DEMO = str(Path(__file__).parents[2] / "configs" / "demo" / "dimaskdino_shapes.yaml")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # its processes are modules of the repository
    monkeypatch.setattr(sys, "argv", ["cpu_memory", "--config-file", DEMO])
    for name in ("MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def test_table_shows_medians_of_both_ways(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {False: iter([(4.0, 300), (2.0, 700), (3.0, 310)]), True: iter([(1.5, 200), (9.0, 210), (0.5, 100)])}

    def measured(kind: str, size: int, config_file: str, *, ours: bool) -> dict[str, float]:
        assert (kind, size, config_file) == ("many sizes", 64, DEMO)
        return dict(zip(("seconds", "mebibytes"), next(found[ours]), strict=True))

    monkeypatch.setattr(cpu_memory, "in_process", measured)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--sizes", "--train-sizes", "--many-sizes", "64", "--rounds", "3"])
    cpu_memory.main()
    (row,) = capsys.readouterr().out.splitlines()[3:]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["many sizes", "64", "2.00x", "310", "200"]


def test_process_measures_a_model() -> None:
    found = cpu_memory.in_process("inference", 64, DEMO, ours=True)
    assert 0 < found["seconds"] < 60
    assert found["mebibytes"] > 100


def test_many_sizes_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "SIZES", 2)
    monkeypatch.setattr(cpu_memory, "time", SimpleNamespace(perf_counter=iter(range(0, 100, 5)).__next__))
    assert cpu_memory.measure("many sizes", 64, DEMO)["seconds"] == 10


def test_process_refuses_where_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kind", "inference", "--size", "64", "--ours"])
    with pytest.raises(SystemExit, match="environment variables choose how it keeps memory"):
        cpu_memory.main()


def test_failure_of_a_process_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="no memory left")
    monkeypatch.setattr(cpu_memory, "subprocess", SimpleNamespace(run=lambda *args, **options: failed))
    with pytest.raises(SystemExit, match="no memory left"):
        cpu_memory.main()
