"""Work in other processes: one function over many items, with results in order, and one beside this process."""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress(Protocol):
    """What draws a progress bar: passes on the items of an iterable, whose number it gets."""

    def __call__(self, items: Iterable[Any], *, total: int) -> Iterable[Any]:
        """Pass on ``items``, one after the other."""


def no_progress(items: Iterable[Any], *, total: int) -> Iterable[Any]:
    """Pass on ``items`` and draw nothing."""
    return items


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, chunk: int = 8
) -> Iterator[Result]:
    """Apply ``function`` to every item.

    Args:
        function: what the processes run; it, the items and the results must be picklable.
        items: read at once if there are workers.
        num_workers: processes to start; 0 works in this one.
        chunk: items that a process takes at a time.

    Yields:
        The results, in the order of the items. Closing the generator early cancels what has not begun.
    """
    if not num_workers:
        yield from map(function, items)
        return
    # Forking would copy locks that threads of numeric libraries hold.
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
    try:
        yield from pool.map(function, items, chunksize=chunk)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def in_background(function: Callable[[], Result], *, worth_it: bool) -> Iterator[Callable[[], Result]]:
    """Run a function in a copy of this process, where the system can fork, while the block goes on.

    Args:
        function: what it does; it must not compute with torch. Its result must be picklable.
        worth_it: otherwise it runs in this process when its result is asked for.

    Yields:
        What waits for the result, and raises what the function raised.
    """
    if not worth_it or sys.platform != "linux":
        yield function
        return
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(function, sender), daemon=True)
    process.start()
    sender.close()

    def result() -> Result:
        try:
            made, error = receiver.recv()
        except EOFError:  # it was killed
            return function()
        if error is not None:
            raise error
        return made

    try:
        yield result
    finally:
        process.kill()
        process.join()


def _send_result(function: Callable[[], Result], sender: Connection) -> None:
    try:
        sender.send((function(), None))
    except Exception as error:  # noqa: BLE001 (it is raised where the result is asked for)
        sender.send((None, error))
