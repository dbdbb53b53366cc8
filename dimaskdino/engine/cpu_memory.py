"""How the C library hands out memory, for models that run on the CPU."""

import ctypes
import os
import sys

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
# Environment variables, and parts of GLIBC_TUNABLES, that set the same.
ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_max", "glibc.malloc.mmap_threshold")


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, for the next image.

    glibc asks the system for every block of more than 32 MiB, as feature maps are, and gives it back when it is freed,
    so that the system clears the same pages for every layer of every image. The process then keeps as much as it needed
    at most. What the user has set of this by environment variables (MALLOC_MMAP_MAX_, GLIBC_TUNABLES, ...) stays.

    Returns:
        Whether that was set: not where the user chose otherwise, and not without glibc.

    Source: mallopt(3). Measured in benchmarks/RESULTS.md.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in ENVIRONMENT) or any(name in tunables for name in TUNABLES)
    if chosen or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(MMAP_MAX, 0) and library.mallopt(TRIM_THRESHOLD, -1))
