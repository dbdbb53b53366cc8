"""Scoring beside the model: a thread processes the results of a batch while the model computes the next one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator


class BackgroundEvaluator(DatasetEvaluator):
    """Runs another evaluator's ``process`` in a thread, one batch after the other.

    A batch waits until the one before is done, so no more results are in memory than without the thread. What goes
    wrong in the thread is raised by the next call here.

    Args:
        evaluator: what scores.
        context: entered around its ``process``; gradients are off there in any case, and autocast is not inherited.
        first: batch from which the thread is used; those before are scored in place, and leave the model alone.
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
