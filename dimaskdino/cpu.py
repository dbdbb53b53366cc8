"""Memory of models that run on the CPU."""

import ctypes
import os
import sys

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
# Environment variables, and parts of GLIBC_TUNABLES, that set the same.
ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_max", "glibc.malloc.mmap_threshold")


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, for the next image.

    glibc asks the system for every block of more than 32 MiB, such as feature maps, and returns it when it is freed, so
    the system clears the same pages for every layer of every image. With this setting, the process holds on to the most
    memory that it has needed. Environment variables that the user has set (MALLOC_MMAP_MAX_, GLIBC_TUNABLES, ...) win.

    Returns:
        Whether the setting was made: not if the user chose otherwise, and not without glibc.

    Source: mallopt(3). benchmarks/RESULTS.md has the measurements.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in ENVIRONMENT) or any(name in tunables for name in TUNABLES)
    if chosen or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(MMAP_MAX, 0) and library.mallopt(TRIM_THRESHOLD, -1))
