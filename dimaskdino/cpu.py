"""Threads and memory of models that run on the CPU. Needs no torch, so that it can act before torch is loaded."""

import ctypes
import logging
import os
import sys
import threading
from pathlib import Path

from dimaskdino.after_import import after_import

logger = logging.getLogger(__name__)

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
# Environment variables, and parts of GLIBC_TUNABLES, that set the same.
ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_max", "glibc.malloc.mmap_threshold")

# How often a waiting thread of GNU's OpenMP looks for work before it sleeps: about a tenth of a millisecond.
SPINS = "10000"
# For how many cycles, as a power of two, threads of NumPy's products do so: if unset, for about a tenth of a second.
NUMPY_SPINS = "16"


def keep_freed_memory(device: str = "cpu") -> bool:
    """Make this process keep the memory that it frees, for the next image, where its model is on the CPU.

    glibc asks the system for every block of more than 32 MiB, such as feature maps, and returns it when it is freed, so
    the system clears the same pages for every layer of every image. With this setting, the process holds on to the most
    memory that it has needed. For that to be little more than what is in use, tensors then come from the compiled op's
    allocator (``csrc/cpu/allocator.cpp``). Environment variables that the user has set (``MALLOC_MMAP_MAX_``,
    ``GLIBC_TUNABLES``, ...) win.

    Returns:
        Whether the setting was made. It is not for another device, without glibc, or where the user chose otherwise.

    Source: mallopt(3). benchmarks/RESULTS.md has the measurements.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in ENVIRONMENT) or any(name in tunables for name in TUNABLES)
    if device != "cpu" or chosen or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    kept = bool(library.mallopt(MMAP_MAX, 0) and library.mallopt(TRIM_THRESHOLD, -1))
    if kept:
        after_import("dimaskdino._C", _use_whole_blocks)
    return kept


def _use_whole_blocks() -> None:
    ops = sys.modules["torch"].ops.dimaskdino
    if hasattr(ops, "use_whole_blocks"):  # not in a library that was built before it was added
        ops.use_whole_blocks()


def set_up_libraries() -> None:
    """Set up OpenMP, oneDNN, and OpenBLAS for this package; importing it calls this. What the user has set stays."""
    # oneDNN keeps the last 1,024 convolutions and products that it compiled, each for one size, with their buffers:
    # gigabytes if images have many sizes. A training step with images of one size compiles fewer than 256.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", NUMPY_SPINS)
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        _wait_passively()


def _wait_passively() -> None:
    """Make threads of OpenMP sleep after a short spin, instead of spinning, while they wait for each other.

    On busy cores, threads that spin take the time that the others need: an image takes 20 to 60 times as long. Threads
    that sleep at once are woken for each of the thousands of small layers, which costs a small model two fifths of its
    time. OpenMP reads both variables when torch loads it. If torch is loaded already, a team of idle threads has much
    the same effect: GNU's OpenMP hardly spins while it has more threads than there are cores.

    Source: ``do_spin`` in libgomp's config/linux/wait.h. benchmarks/RESULTS.md has the measurements.
    """
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = SPINS
    if "torch" in sys.modules and not _start_idle_teams():
        logger.warning(
            "torch was imported before dimaskdino, so its threads may spin while they wait, which is slow on busy "
            "cores. Import dimaskdino first, or set the environment variable OMP_WAIT_POLICY to PASSIVE."
        )


def _start_idle_teams() -> bool:
    """Start an idle team in each GNU OpenMP library of this process; returns whether there is one."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    libraries = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    for path in libraries:
        started = threading.Event()
        threading.Thread(target=_hold_idle_team, args=(ctypes.CDLL(path), started), daemon=True).start()
        started.wait()
    return bool(libraries)


def _hold_idle_team(library: ctypes.CDLL, started: threading.Event) -> None:
    """Run a function that does nothing in more threads than there are cores; they sleep as long as this thread does."""
    try:
        library.GOMP_parallel(library.omp_get_thread_num, None, (os.cpu_count() or 1) + 1, 0)
    finally:
        started.set()
    threading.Event().wait()
