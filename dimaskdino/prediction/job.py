"""A job: every input is read, predicted and written, whatever becomes of the others."""

import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from tqdm import tqdm

from dimaskdino.errors import UserError, file_errors_in_one_line
from dimaskdino.prediction.inputs import Source
from dimaskdino.prediction.outputs import Outputs
from dimaskdino.prediction.records import Records
from dimaskdino.prediction.results import Prediction
from dimaskdino.prediction.video import Frames, Tracker, VideoWriter

logger = logging.getLogger(__name__)

Read = Callable[[str], Any]
Predict = Callable[[Sequence[Any], Sequence[str]], list[Prediction]]
In = TypeVar("In")
Out = TypeVar("Out")

_THREADS = 2
_TURN_S = 0.0005  # a tenth of Python's own
_AHEAD = 4  # inputs that are read, or results that wait to be written, for each of a batch


@dataclass(kw_only=True)
class Job:
    """Predicts inputs and writes what is found."""

    read: Read  # the path of an image to what ``predict`` takes
    predict: Predict  # images that were read, or frames (H, W, 3) RGB, and their sources to predictions
    outputs: Outputs  # writes the files of an image
    records: Records  # what is done
    batch_size: int = 1  # images that go through the model together
    pictures: bool = True  # draw videos
    by_instance: bool = False  # a color for each object in videos
    track_score: float | None = None  # track the objects of videos that score at least this; None does not track
    image_ids: Mapping[str, Any] = field(default_factory=dict)  # by path or its end; others get larger numbers
    max_frames: int | None = None  # of a camera or video; None is all
    failed: list[str] = field(default_factory=list)  # what could not be predicted, and why

    def run(self, sources: Sequence[Source]) -> None:
        """Predict all inputs in their order, with a progress bar; bad ones are noted in :attr:`failed`."""
        with tqdm(total=len(sources), unit="image", smoothing=0.05, disable=None) as progress:
            for kind, some in itertools.groupby(sources, key=lambda source: source.kind):
                if kind == "image":
                    self._images(some, progress)
                else:
                    for source in some:
                        self._video(source)
                        progress.update()
        self.records.close()

    def _images(self, sources: Iterable[Source], progress: tqdm) -> None:
        with quick_turns(), ThreadPoolExecutor(_THREADS) as readers, ThreadPoolExecutor(_THREADS) as writers:
            read = ahead(readers, self._read, sources, _AHEAD * self.batch_size)
            written = ahead(writers, self._write, self._predicted(read), _AHEAD * self.batch_size)
            for record in written:
                self._note(record)
                progress.update()

    def _read(self, source: Source) -> tuple[Source, Any]:
        try:
            return source, self.read(source.path)
        except UserError as error:
            return source, error

    def _predicted(self, read: Iterator[tuple[Source, Any]]) -> Iterator[tuple[Source, Prediction | UserError]]:
        while batch := list(itertools.islice(read, self.batch_size)):
            good = [(source, image) for source, image in batch if not isinstance(image, UserError)]
            found = iter(
                self.predict([image for _, image in good], [source.path for source, _ in good]) if good else ()
            )
            for source, image in batch:
                yield source, image if isinstance(image, UserError) else next(found)

    def _write(self, item: tuple[Source, Prediction | UserError]) -> dict[str, Any]:
        source, found = item
        if isinstance(found, UserError):
            return {"number": source.number, "error": str(found), "file": source.path}
        with file_errors_in_one_line():
            return self.outputs.write(source, found, self._image_id(source))

    def _image_id(self, source: Source) -> Any:
        """The id that is known; others must not take an id of another image."""
        known = known_id(source.path, self.image_ids)
        return self._largest + source.number + 1 if known is None else known

    @cached_property
    def _largest(self) -> int:
        return max((each for each in self.image_ids.values() if isinstance(each, int)), default=0)

    def _note(self, record: dict[str, Any]) -> None:
        self.records.add(record)
        if "error" in record:
            self.failed.append(record["error"])
            logger.error("%s", record["error"])

    def _video(self, source: Source) -> None:
        try:
            frames = Frames(source, self.max_frames)
        except UserError as error:
            self._note({"number": source.number, "error": str(error), "file": source.path})
            return
        tracker = None if self.track_score is None else Tracker(frames.rate, self.track_score)
        progress = tqdm(total=frames.count, unit="frame", desc=source.name, leave=False, disable=None)
        count = 0
        with file_errors_in_one_line(), progress:
            with VideoWriter(self.outputs, source, frames.rate, pictures=self.pictures) as writer:
                for found in self._frames(frames, source):
                    writer.add(count, found, tracker.update(found) if tracker else None, self.by_instance)
                    count += 1
                    progress.update()
            path = writer.frames.relative_to(self.outputs.folder).as_posix()
        record = {"number": source.number, "file": source.path, "frames": path, "count": count, "rate": frames.rate}
        self._note(record | ({"error": frames.missing} if frames.missing else {}))

    def _frames(self, frames: Frames, source: Source) -> Iterator[Prediction]:
        try:
            iterator = iter(frames)
            while batch := list(itertools.islice(iterator, self.batch_size)):
                yield from self.predict(batch, [source.path] * len(batch))
        except KeyboardInterrupt:
            if source.kind != "camera":  # this is how one ends a camera
                raise


def known_id(path: str, ids: Mapping[str, Any]) -> Any:
    """The id of the longest end of a path that has one; None if none has."""
    parts = path.replace("\\", "/").split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((ids[end] for end in ends if end in ids), None)


@contextmanager
def quick_turns() -> Iterator[None]:
    """Let threads that draw hand the interpreter back soon: the model asks for it after each of its operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def ahead(pool: ThreadPoolExecutor, work: Callable[[In], Out], items: Iterable[In], count: int) -> Iterator[Out]:
    """The results of ``work`` in the order of the items, at most ``count`` of them begun before they are asked for."""
    begun: deque[Future[Out]] = deque()
    for item in items:
        begun.append(pool.submit(work, item))
        if len(begun) > count:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
