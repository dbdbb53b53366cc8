"""The batches of a training: which images, in which order, and the random numbers of each.

Everything is a function of the run's seed and of counters. So an interrupted run goes on with the batches that it would
have had, whatever the number of loader workers, and an iteration has the same images on another number of processes.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset, Sampler

from dimaskdino.data.orders import make_order
from dimaskdino.data.shared import PackedEntries
from dimaskdino.errors import DatasetError
from dimaskdino.seeds import SAMPLE, seeded

# The place of a sample in the endless order of the run, and the index of its image.
Draw = tuple[int, int]

_MAX_TRIES = 1000


def endless_order(cfg: CfgNode, entries: Sequence[dict[str, Any]], seed: int) -> Iterable[int]:
    """Indices of ``entries`` as DATALOADER.{SAMPLER_TRAIN, NEGATIVE_SHARE} draw them, for all processes together."""
    return make_order(cfg, entries, seed)


class BatchSampler(Sampler[list[Draw]]):
    """The batches of one process: its share of the batches of all processes.

    Args:
        order: indices of images for all processes together.
        batch_size: images of a batch of all processes, a multiple of ``num_processes``.
        group_of: for each image, the group that it shares a batch with; empty for no groups.
        group_size: images that come together from one group. Where it is the share of a process, as detectron2 groups
            them, no process has images of two groups in a batch.
        first: batches of all processes that were drawn before.
        rank: of this process.
        num_processes: processes of the job.
    """

    def __init__(
        self,
        order: Iterable[int],
        *,
        batch_size: int,
        group_of: Sequence[Any] = (),
        group_size: int = 1,
        first: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self._order, self._group_of, self._group_size = order, group_of, group_size
        self._batch_size, self._first = batch_size, first
        share = batch_size // num_processes
        self._share = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[Draw]]:
        draws: Iterator[Draw] = enumerate(self._order)
        if self._group_of:
            draws = self._grouped(draws)
        draws = itertools.islice(draws, self._first * self._batch_size, None)
        while len(batch := list(itertools.islice(draws, self._batch_size))) == self._batch_size:
            yield batch[self._share]

    def _grouped(self, draws: Iterator[Draw]) -> Iterator[Draw]:
        """The same draws, as soon as there are ``group_size`` of a group."""
        waiting: dict[Any, list[Draw]] = {}
        for draw in draws:
            group = waiting.setdefault(self._group_of[draw[1]], [])
            group.append(draw)
            if len(group) == self._group_size:
                yield from group
                group.clear()


class Samples(Dataset):
    """Mapped images by :data:`Draw`; the place of a draw alone decides on the mapper's random numbers.

    Args:
        entries: the dataset.
        mapper: maps an entry to the model's input; where it returns None, another image is drawn.
        seed: of the run.
    """

    def __init__(self, entries: Sequence[Any], mapper: Callable[[dict[str, Any]], Any], seed: int) -> None:
        self._entries = entries if isinstance(entries, PackedEntries) else PackedEntries(entries)
        self._mapper = PicklableWrapper(mapper)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, draw: Draw) -> Any:
        place, index = draw
        with seeded(self._seed, SAMPLE, place):
            for _ in range(_MAX_TRIES):
                if (mapped := self._mapper(self._entries[index])) is not None:
                    return self._pasted(mapped)
                index = random.randrange(len(self))
        raise DatasetError(f"The mapper returned None for {_MAX_TRIES} images; check INPUT.DATASET_MAPPER_NAME.")

    def _pasted(self, mapped: Any) -> Any:
        """With objects of another image where the mapper has a copy-paste."""
        paste = getattr(self._mapper, "copy_paste", None)
        if paste is None or np.random.random() >= paste.prob:
            return mapped
        other = self._mapper(self._entries[random.randrange(len(self))])
        return mapped if other is None else paste(mapped, other)
