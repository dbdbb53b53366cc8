"""How fast a model is in an evaluation, and scoring beside the model."""

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
# Speed is measured in the batches up to this one; later ones are scored beside the model, which takes time from it.
LAST_MEASURED_BATCH = 305


class ForwardTimer:
    """Measures the seconds of a model's last forward pass, with the device synchronized before and after."""

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.device = device or next(self.model.parameters()).device
        self.seconds = 0.0

    def before(self, *_: Any) -> None:
        """Start the clock once the device has finished all earlier work."""
        self._wait()
        self._started = time.perf_counter()

    def after(self, *_: Any) -> None:
        """Stop the clock once the device has finished this pass."""
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        backend = getattr(torch, self.device.type)
        # A backend with a single device may take no argument.
        backend.synchronize(*([self.device] if backend.device_count() > 1 else []))


@contextmanager
def timed(model: nn.Module, device: torch.device | None = None) -> Iterator[ForwardTimer]:
    """Time every forward pass of ``model`` inside the block; see :class:`ForwardTimer`."""
    timer = ForwardTimer(model, device)
    with timer.model.register_forward_pre_hook(timer.before), timer.model.register_forward_hook(timer.after):
        yield timer


class SpeedEvaluator(DatasetEvaluator):
    """Writes ``speed.json``: images per second of the forward pass, and the device. It returns no scores.

    A forward pass goes from images in memory to results at the requested size: transfer to the device, network, boxes,
    and masks, without loading and scoring. Speed is images over seconds of the first 300 batches after five that do not
    count. With several processes it is the average of one process, not their sum.
    """

    def __init__(self, timer: ForwardTimer, output_dir: str) -> None:
        self._timer, self._output_dir = timer, output_dir
        self.reset()

    def reset(self) -> None:
        """Forget all passes."""
        self._batches: list[tuple[int, float]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Record the time of the pass that gave these outputs."""
        self._batches.append((len(inputs), self._timer.seconds))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Write the speed on the main process if there were enough batches. Returns an empty dict."""
        gathered = comm.gather(self._batches[NUM_WARMUP_BATCHES:LAST_MEASURED_BATCH])
        batches = [batch for of_process in gathered for batch in of_process]
        if not comm.is_main_process():
            return {}
        if not batches:
            needs = f"it needs more than {NUM_WARMUP_BATCHES} batches per process"
            logger.info("Inference speed is not measured: %s.", needs)
            return {}
        images, seconds = (sum(column) for column in zip(*batches, strict=True))
        speed = {
            "images_per_second": images / seconds,
            "device": device_name(self._timer.device),
            "images": images,
            "images_per_batch": max(count for count, _ in batches),
            "processes": len(gathered),
        }
        write_results(speed, os.path.join(self._output_dir, SPEED_FILE))
        logger.info("Inference speed: %.3g images per second per process on %s", images / seconds, speed["device"])
        return {}


def device_name(device: torch.device) -> str:
    """The name of a device; for a CPU with the number of threads in use."""
    backend = getattr(torch, device.type)
    if hasattr(backend, "get_device_name"):
        return backend.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} thread(s)"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class BackgroundEvaluator(DatasetEvaluator):
    """Runs another evaluator's ``process`` in a thread, one batch after the other; the ``first`` ones in place.

    A batch waits until the one before is done, so no more results are in memory than without the thread. What goes
    wrong in the thread is raised by the next call here. ``context`` is entered around ``process``; gradients are off
    there in any case, and autocast is not inherited.
    """

    def __init__(
        self,
        evaluator: DatasetEvaluator,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        first: int = 0,
    ) -> None:
        self._evaluator, self._context, self._first = evaluator, context, first
        self._running: Future[None] | None = None

    def reset(self) -> None:
        """Forget all predictions."""
        self._running, self._seen = None, 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Begin with a batch once the one before is done."""
        self._wait()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # each thread has its own
        self._running = self._thread.submit(self._process, inputs, outputs, device)
        self._seen += 1
        if self._seen <= self._first:
            self._wait()

    def evaluate(self) -> Any:
        """The scores of all batches."""
        self._wait()
        self._thread.shutdown()
        return self._evaluator.evaluate()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.no_grad(), self._context():
            self._evaluator.process(inputs, outputs)
