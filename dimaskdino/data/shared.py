"""What one process of a machine reads, and the others share."""

import itertools
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
from detectron2.utils import comm

from dimaskdino.compat import knows_local_processes

Result = TypeVar("Result")


def is_first_of_machine() -> bool:
    """Whether this process reads what its machine shares; where processes cannot share, each reads for itself."""
    return not _shares() or comm.get_local_rank() == 0


def once_a_machine(make: Callable[[], Result]) -> Result:
    """What ``make`` gives in the first process of each machine, in all processes of the machine.

    All processes of the job call this. If ``make`` fails, its process ends, and with it the job.
    """
    made = make() if is_first_of_machine() else None
    if not _shares():
        return made  # type: ignore[return-value]
    return comm.all_gather(made)[comm.get_rank() - comm.get_local_rank()]  # those of a machine follow each other


def _shares() -> bool:
    return sys.platform == "linux" and comm.get_world_size() > 1 and knows_local_processes()


class PackedEntries(Sequence[Any]):
    """The images of a dataset, each unpacked when it is asked for.

    Their pickles lie behind each other in memory that belongs to no named file: it ends with the last process that maps
    it, however that ends. They need a fraction of the entries' memory, and no process has a copy of its own.
    """

    def __init__(self, entries: Sequence[Any]) -> None:
        self._file: BinaryIO | None = None
        try:
            self._file = os.fdopen(os.memfd_create("dimaskdino"), "w+b")
            self._ends = _ends(map(self._file.write, map(_packed, entries)))
            self._file.flush()
            self._map(self._file)
        except (AttributeError, OSError):  # another system than Linux, or a limit on the size of files
            pickles = [_packed(entry) for entry in entries]
            self._file, self._ends, self._bytes = None, _ends(map(len, pickles)), memoryview(b"".join(pickles))

    @classmethod
    def once_a_machine(cls, make: Callable[[], Sequence[Any]]) -> "PackedEntries":
        """Entries that the first process of each machine makes and the others map; all processes call this."""
        packed = cls(make()) if is_first_of_machine() else cls.__new__(cls)
        if not _shares():
            return packed
        path, ends = once_a_machine(lambda: (packed._path, packed._ends))
        if not is_first_of_machine():
            try:
                packed._file, packed._ends = open(path, "rb"), ends  # noqa: SIM115 (as long as this lives)
                packed._map(packed._file)
            except OSError:  # there is none, or the system hides processes from each other
                packed = cls(make())
        comm.synchronize()  # until all have opened it
        return packed

    @property
    def _path(self) -> str:
        """Where other processes find the file; "" if there is none."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}" if self._file else ""

    def _map(self, file: BinaryIO) -> None:
        """Entries are read from the file's pages, which the system keeps once."""
        empty = self._ends[-1] == 0  # which cannot be mapped
        self._bytes = memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return pickle.loads(self._bytes[self._ends[place] : self._ends[place + 1]])

    def __reduce__(self) -> tuple[Any, ...]:
        """For loader workers that are not forked."""
        return PackedEntries, (list(self),)


def _packed(entry: Any) -> bytes:
    return pickle.dumps(entry, protocol=pickle.HIGHEST_PROTOCOL)


def _ends(lengths: Iterable[int]) -> np.ndarray:
    """Where each entry ends, after a 0."""
    return np.fromiter(itertools.accumulate(lengths, initial=0), dtype=np.int64)
