"""Memory that a process on the CPU frees is there for the next image."""

import os
import subprocess
import sys

import pytest

from dimaskdino.engine import argument_parser

engine_setup = sys.modules["dimaskdino.engine.setup"]  # the package has a function of this name
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")

# Page faults of a block of 256 MiB that is taken again and again, at the best.
FAULTS = """
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))
"""
KEEP = "from dimaskdino.engine import keep_freed_memory\nprint(keep_freed_memory())\n"


def printed(code: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "TUNABLES" not in name}
    clean.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()


def test_a_block_that_was_freed_is_not_taken_from_the_system_again() -> None:
    (by_default,) = printed(FAULTS)
    kept, faults = printed(KEEP + FAULTS)
    assert kept == "True"
    assert int(faults) * 10 < int(by_default)


@pytest.mark.parametrize(
    "choice",
    [{"MALLOC_MMAP_MAX_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
    ids=lambda choice: next(iter(choice)),
)
def test_what_the_user_has_set_stays(choice: dict[str, str]) -> None:
    assert printed(KEEP, **choice) == ["False"]


def test_a_choice_about_something_else_changes_nothing() -> None:
    assert printed(KEEP, GLIBC_TUNABLES="glibc.malloc.arena_max=2") == ["True"]


def test_the_command_line_keeps_memory_on_the_cpu_and_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(engine_setup, "keep_freed_memory", lambda: kept.append("kept"))
    for later in ("_prepare_run", "_check_datasets_once"):
        monkeypatch.setattr(engine_setup, later, lambda *_, **__: None)
    for num_gpus, expected in ((1, []), (0, ["kept"])):
        args = argument_parser().parse_args(["--num-gpus", str(num_gpus)])
        engine_setup.setup(args)
        assert kept == expected


def test_onednn_keeps_fewer_sizes_unless_told_otherwise() -> None:
    code = "import os, dimaskdino\nprint(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    assert printed(code) == ["256"]
    assert printed(code, ONEDNN_PRIMITIVE_CACHE_CAPACITY="512") == ["512"]
