"""Time, memory and the hardware's limits, on the CPU and on a GPU."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Work = Callable[[], object]
Name = TypeVar("Name")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Work, device: torch.device) -> float:
    """Of one run, by the GPU's own clock on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU waits until the work is queued; otherwise Python is measured, whose calls take as long as small kernels.
    torch.cuda._sleep(10_000_000)
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1e3


def side_by_side(works: dict[Name, Work], device: torch.device, *, rounds: int) -> dict[Name, float]:
    """Median seconds of each work; every round runs each of them once, so that what disturbs one disturbs all.

    Running in turn also leaves little of one's data in the caches for the next run of it.
    """
    start = time.perf_counter()
    warm_up = 0.5 if device.type == "cuda" else 0.0  # until the clock is up
    while True:
        for work in works.values():
            work()
            work()
        synchronize(device)
        if time.perf_counter() - start >= warm_up:
            break
    times: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds_of(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """The most memory that one run needs on top of what there was; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system and is counted anew
        Path("/proc/self/clear_refs").write_text("5")  # sets the process's peak to what it has now
    except (OSError, AttributeError):
        return None
    before = memory_bytes()
    work()
    return max(0, memory_bytes(peak=True) - before)


def memory_bytes(*, peak: bool = False) -> int:
    """Of this process, now or at most so far; 0 where the system does not tell."""
    field = "VmHWM" if peak else "VmRSS"
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(2**27 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    seconds = side_by_side({"copy": lambda: target.copy_(source)}, device, rounds=9)["copy"]
    return 2 * source.numel() * source.element_size() / seconds


def load_bandwidth(device: torch.device) -> float | None:
    """Bytes per second that the first caches can deliver by their make; None where that is not known.

    CPU: two vector loads a cycle and thread at the clock that the system names. GPU: 128 bytes a cycle and
    multiprocessor at its highest clock.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.multi_processor_count * 128 * properties.clock_rate * 1e3
    widths = {"avx512": 64, "avx2": 32, "portable": 16}
    try:
        clocks = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
        width = widths[torch.ops.dimaskdino.cpu_capability()]
    except (OSError, AttributeError):
        return None
    return 2 * width * float(clocks[0]) * 1e6 * torch.get_num_threads() if clocks else None
