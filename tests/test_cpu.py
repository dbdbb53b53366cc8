"""Settings for the CPU: threads sleep while they wait, and freed memory is there for the next image."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dimaskdino.layers.ms_deform_attn_ops  # noqa: F401  (the compiled op)

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


# Page faults of tensors of 16 MiB (4,096 pages) that are made again and again, among small objects that stay.
TENSORS = """
import resource, torch
import dimaskdino._C
tensors, small = [torch.zeros(2**22) for _ in range(8)], []
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(24):
    tensors[turn % 8] = None
    small += [torch.zeros(1) for _ in range(20)]
    tensors[turn % 8] = torch.zeros(2**22)
assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors + small)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# CPU time of 40 short parallel sections with pauses between them, in which threads wait.
WAITING = """
import ctypes, sys, time
library = ctypes.CDLL({library!r})
{before}
for _ in range(40):
    library.GOMP_parallel(library.omp_get_thread_num, None, 2, 0)
    time.sleep(0.02)
print(time.process_time())
"""
# The package without its models, whose import takes seconds.
SET_UP = "import sys; sys.modules['dimaskdino.modeling'] = sys; import dimaskdino"


def printed(code: str, **environment: str) -> list[str]:
    ours = ("MALLOC", "TUNABLES", "OMP", "ONEDNN")
    clean = {name: value for name, value in os.environ.items() if not any(part in name for part in ours)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()


def test_freed_block_is_reused_without_page_faults() -> None:
    (by_default,) = printed(FAULTS)
    assert printed(KEEP.replace("()", "('cuda')")) == ["False"]
    kept, faults = printed(KEEP + FAULTS)
    assert kept == "True"
    assert int(faults) * 10 < int(by_default)


def test_freed_tensor_leaves_room_for_one_of_its_size() -> None:
    if not hasattr(torch.ops.dimaskdino, "use_whole_blocks"):
        pytest.skip("the compiled op is missing, or older")
    kept, faults = printed(KEEP + TENSORS)
    assert kept == "True"
    assert int(faults) < 2 * 4096  # without: all eight


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


def test_threads_sleep_although_openmp_was_loaded_before() -> None:
    folder = Path(importlib.util.find_spec("torch").origin).parent
    libraries = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
    if not libraries or os.cpu_count() == 1:
        pytest.skip("torch does not bring GNU's OpenMP, or there is one core")
    spinning, sleeping = (
        float(printed(WAITING.format(library=str(libraries[0]), before=before))[-1])
        for before in ("", f"sys.modules['torch'] = None; {SET_UP}")
    )
    assert sleeping * 3 < spinning


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["PASSIVE", "10000", "256", "16"]),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_THREAD_TIMEOUT": "20"}, ["ACTIVE", "None", "256", "20"]),
        ({"GOMP_SPINCOUNT": "100", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}, ["None", "100", "512", "16"]),
    ],
    ids=str,
)
def test_import_sets_up_libraries_before_torch(environment: dict[str, str], expected: list[str]) -> None:
    names = "'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'OPENBLAS_THREAD_TIMEOUT'"
    show = f"import os; [print(os.environ.get(name)) for name in ({names})]"
    assert printed(f"{SET_UP}; {show}; print('torch' in sys.modules)", **environment) == [*expected, "False"]
