"""What a job has done so far, in files that survive being killed, and the results merged from them."""

import csv
import heapq
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pycocotools import mask as mask_util

from dimaskdino.errors import UserError
from dimaskdino.prediction.results import Classes

Record = dict[str, Any]
MERGED_FILES = RESULTS_FILE, IMAGES_FILE, CSV_FILE = "coco_results.json", "coco_images.json", "detections.csv"
CSV_COLUMNS = ("file", "frame", "class", "class_index", "score", "x0", "y0", "x1", "y1", "area", "track")


@dataclass(frozen=True)
class Share:
    """Which of a job's processes this is; it takes every ``count``-th input from the ``index``-th on."""

    index: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Share":
        """Read what torchrun and Slurm's job arrays say, together or alone.

        Raises:
            UserError: a variable is no number, or the numbers of the array leave it open which inputs a task takes.
        """

        def number(name: str, default: int) -> int:
            try:
                return int(environment.get(name, default))
            except ValueError:
                raise UserError(f"{name} is {environment[name]!r}, which is no whole number; unset it.") from None

        rank, world = number("RANK", 0), number("WORLD_SIZE", 1)
        if "SLURM_ARRAY_TASK_ID" not in environment:
            return cls(rank, world)
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        task, between = divmod(number("SLURM_ARRAY_TASK_ID", 0) - first, step)
        tasks = number("SLURM_ARRAY_TASK_COUNT", task + 1)
        if between or task >= tasks:
            raise UserError("The numbers of the job array are not evenly spaced; give a range, such as --array 0-31.")
        return cls(task * world + rank, tasks * world)


class Records:
    """The records of a job: one line of JSON for every input that is done, in ``parts/``.

    Every process writes a file of its own, after the input's other outputs; a later run reads all of them and goes on.

    A folder takes the results of one job alone; ``overwrite`` forgets what it holds.

    Raises:
        UserError: the folder holds the results of other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], share: Share, *, overwrite: bool = False) -> None:
        self.folder, self._share = folder, share
        self._parts = folder / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)
        if overwrite:
            if share.count > 1:
                raise UserError("--overwrite and several processes do not go together; remove the folder instead.")
            for path in (*self._parts.iterdir(), *(folder / name for name in ("settings.json", *MERGED_FILES))):
                path.unlink(missing_ok=True)
        self._check_settings(settings)
        self._file: TextIO | None = None

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        if not path.exists():
            own = path.with_name(f".settings.{os.getpid()}.{self._share.index}")
            own.write_text(text, encoding="utf-8")
            try:
                os.link(own, path)  # the first process wins, and nobody reads half a file
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(own, path)
            own.unlink(missing_ok=True)
        if path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{self.folder} holds the results of other inputs or settings ({path.name}); give another --output, or "
                "--overwrite."
            )

    def state(self) -> dict[int, bool]:
        """By the number of each input that was tried, in this run or an earlier one, whether it succeeded."""
        state: dict[int, bool] = {}
        for part in self._part_files():
            for record in _read(part):
                state[record["number"]] = state.get(record["number"], False) or "error" not in record
        return state

    def add(self, record: Record) -> None:
        """Note that an input is done."""
        if self._file is None:
            name = f"{self._share.index:05d}-of-{self._share.count:05d}"
            for attempt in itertools.count():
                try:
                    self._file = open(self._parts / f"{name}.{attempt:03d}.jsonl", "x", encoding="utf-8")  # noqa: SIM115
                    break
                except FileExistsError:
                    continue
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def merged(self) -> Iterator[Record]:
        """All records in the order of the inputs, one for each; a success counts more than a failure."""
        parts = [_read(part) for part in self._part_files()]
        ordered = heapq.merge(*parts, key=lambda record: record["number"])
        for _, same in itertools.groupby(ordered, key=lambda record: record["number"]):
            yield min(same, key=lambda record: "error" in record)

    def sizes(self) -> list[tuple[Path, int]]:
        """The files of records with their sizes, which grow with every record."""
        return [(part, part.stat().st_size) for part in self._part_files()]

    def _part_files(self) -> list[Path]:
        return sorted(self._parts.glob("*.jsonl"))


def _read(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # the last line of a process that was killed may be cut off
                yield json.loads(line)


def write_coco(records: Records, classes: Classes) -> None:
    """Write ``coco_results.json``, and ``coco_images.json`` with the images and categories that its ids mean."""
    folder = records.folder
    categories = [
        {"id": number, "name": name} for number, name in zip(classes.category_ids, classes.things, strict=True)
    ]
    with _whole(folder / RESULTS_FILE) as results, _whole(folder / IMAGES_FILE) as images:
        results.write("[")
        images.write(f'{{"categories": {json.dumps(categories)}, "images": [')
        first_image = first_result = ""
        for record in records.merged():
            if "results" not in record:
                continue
            entry = {"id": record["id"], "file_name": record["file"]}
            entry |= {"height": record["height"], "width": record["width"]}
            images.write(f"{first_image}\n{json.dumps(entry)}")
            first_image = ","
            for result in record["results"]:
                results.write(f"{first_result}\n{json.dumps(result)}")
                first_result = ","
        results.write("\n]\n")
        images.write("\n]}\n")


def write_csv(records: Records, classes: Classes) -> None:
    """Write ``detections.csv``: a row for each object of each image and frame."""
    index_of = {number: index for index, number in enumerate(classes.category_ids)}
    with _whole(records.folder / CSV_FILE) as file:
        rows = csv.writer(file)
        rows.writerow(CSV_COLUMNS)
        for record in records.merged():
            for frame, results in _frames(records.folder, record):
                for result in results:
                    rows.writerow(_row(record["file"], frame, result, classes.things, index_of[result["category_id"]]))


def _row(file: str, frame: int | str, result: Record, names: Sequence[str], index: int) -> list[Any]:
    x, y, width, height = result["bbox"]
    corners = [f"{value:.2f}" for value in (x, y, x + width, y + height)]
    track = result.get("track_id", "")
    area = int(mask_util.area(result["segmentation"])) if "segmentation" in result else ""
    return [file, frame, names[index], index, f"{result['score']:.4f}", *corners, area, track]


def _frames(folder: Path, record: Record) -> Iterator[tuple[int | str, list[Record]]]:
    """(frame, results) of a record; the frame of an image is ""."""
    if "results" in record:
        yield "", record["results"]
    elif "frames" in record:
        for line in _read(folder / record["frames"]):
            yield line["frame"], line["results"]


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """Write a file as a whole or not at all; two processes that write it at once do not mix."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:  # as files are named
        yield file
    os.replace(part, path)
