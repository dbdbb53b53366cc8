"""Inference speed: images per second of the model alone, measured while it is evaluated."""

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dimaskdino.evaluation.report import write_results

logger = logging.getLogger(__name__)

SPEED_FILE = "speed.json"
# The first calls choose kernels and fill caches.
NUM_WARMUP_BATCHES = 5


class ForwardTimer:
    """Seconds of a model's last forward pass, the device idle at both ends.

    Args:
        model: that is timed between :meth:`start` and :meth:`stop`; without the wrapper of data-parallel training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.device = next(self.model.parameters()).device
        self.seconds = 0.0

    def before(self, *_: Any) -> None:
        """Start the clock when the device has done all earlier work."""
        self._wait()
        self._started = time.perf_counter()

    def after(self, *_: Any) -> None:
        """Stop the clock when the device has done this pass's work."""
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        backend = getattr(torch, self.device.type)
        # A backend that knows one device alone may take no argument.
        backend.synchronize(*([self.device] if backend.device_count() > 1 else []))


@contextmanager
def timed(model: nn.Module) -> Iterator[ForwardTimer]:
    """Time every forward pass of ``model`` inside the block."""
    timer = ForwardTimer(model)
    hooks = [
        timer.model.register_forward_pre_hook(timer.before),
        timer.model.register_forward_hook(timer.after),
    ]
    try:
        yield timer
    finally:
        for hook in hooks:
            hook.remove()


class SpeedEvaluator(DatasetEvaluator):
    """Writes ``speed.json``: images per second of the forward pass, and the device; it gives no scores.

    A forward pass is images in memory to results at the asked size: the transfer to the device, the network, boxes and
    masks. Loading and scoring are not in it. Speed is images over seconds of all batches but the first five; that of
    several processes is a process's average, not their sum.

    Args:
        timer: of the model that is evaluated.
        output_dir: where the file goes.
    """

    def __init__(self, timer: ForwardTimer, output_dir: str) -> None:
        self._timer, self._output_dir = timer, output_dir
        self.reset()

    def reset(self) -> None:
        """Forget all passes."""
        self._batches: list[tuple[int, float]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Note the time of the pass that these came from."""
        self._batches.append((len(inputs), self._timer.seconds))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Write the speed on the main process, if there were enough batches to tell; returns an empty dict."""
        gathered = comm.gather(self._batches[NUM_WARMUP_BATCHES:])
        batches = [batch for of_process in gathered for batch in of_process]
        if not comm.is_main_process():
            return {}
        if not batches:
            logger.info("Inference speed needs more than %d batches of a process: not measured.", NUM_WARMUP_BATCHES)
            return {}
        images = sum(count for count, _ in batches)
        seconds = sum(seconds for _, seconds in batches)
        speed = {
            "images_per_second": images / seconds,
            "device": device_name(self._timer.device),
            "images": images,
            "images_per_batch": max(count for count, _ in batches),
            "processes": len(gathered),
        }
        write_results(speed, os.path.join(self._output_dir, SPEED_FILE))
        logger.info("Inference speed: %.3g images per second and process on %s", images / seconds, speed["device"])
        return {}


def device_name(device: torch.device) -> str:
    """What a device is called, a CPU with the threads that it uses."""
    backend = getattr(torch, device.type)
    if hasattr(backend, "get_device_name"):
        return backend.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} thread(s)"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
