"""Settings for the CPU: memory that a process frees is there for the next image."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")

CPU = Path(__file__).parents[1] / "dimaskdino" / "cpu.py"
# Fewest page faults of a block of 256 MiB that is allocated again and again.
FAULTS = """
import ctypes, resource
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ctypes.create_string_buffer(256 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))
"""
# Without the package, whose import takes seconds.
KEEP = f"import runpy; print(runpy.run_path({str(CPU)!r})['keep_freed_memory']())\n"


def printed(code: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "TUNABLES" not in name}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()


def test_freed_block_is_reused_without_page_faults() -> None:
    (by_default,) = printed(FAULTS)
    kept, faults = printed(KEEP + FAULTS)
    assert kept == "True"
    assert int(faults) * 10 < int(by_default)


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"MALLOC_MMAP_MAX_": "65536"}, "False"),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, "False"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, "True"),
    ],
    ids=str,
)
def test_settings_of_the_user_win(choice: dict[str, str], kept: str) -> None:
    assert printed(KEEP, **choice) == [kept]
