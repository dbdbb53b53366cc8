"""One function over many items in several processes, with results in order."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# What draws a progress bar: called as no_progress, it passes on the items of an iterable of a length.
Progress = Callable[..., Iterable[Any]]


def no_progress(items: Iterable[Any], *, total: int) -> Iterable[Any]:
    """Pass on ``items`` and draw nothing."""
    return items


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, chunk: int = 8
) -> Iterator[Result]:
    """Apply ``function`` to every item in ``num_workers`` processes, each of which takes ``chunk`` items at a time.

    0 works in this one. Function, items and results must be picklable. Yields the results in the order of the items;
    closing the generator early cancels what has not begun.
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
