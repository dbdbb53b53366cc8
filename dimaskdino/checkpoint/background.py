"""Writing checkpoints beside the training (SOLVER.CHECKPOINT_ASYNC): from a copy, in a thread, one at a time."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class BackgroundWriter:
    """Does one piece of work at a time beside the caller, who learns of an error at the next one, or when waiting."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Start ``work`` once the one before is done.

        Raises:
            Exception: what the one before raised; ``work`` is then not started.
        """
        self.wait()
        # No daemon: the interpreter does not leave before it is done.
        self._thread = threading.Thread(target=self._do, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work that was started; raises what it raised, once."""
        if self._thread:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 (the caller's thread raises it)
            self._error = error


def copied(content: Any, done: dict[Any, Tensor] | None = None) -> Any:
    """Nested mappings and lists with all tensors copied to the CPU; what was one memory stays one.

    Args:
        content: as above.
        done: the copies so far.
    """
    done = {} if done is None else done
    if isinstance(content, dict):
        return {key: copied(value, done) for key, value in content.items()}
    if isinstance(content, list):
        return [copied(value, done) for value in content]
    if not isinstance(content, Tensor):
        return content
    place = (content.device, content.data_ptr(), content.dtype, content.shape, content.stride())
    if not content.numel() or place not in done:
        done[place] = content.detach().to("cpu", copy=True)
    return done[place]
