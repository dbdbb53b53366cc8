"""Makes the COCO JSON of a BDD100K split: in parallel, resumable, and always the same bytes."""

import json
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dimaskdino.data.coco_file import Json, coco_content
from dimaskdino.data.datasets.bdd100k import CLASSES, Finding, Task, annotation_file, find_tasks
from dimaskdino.data.datasets.bdd100k_labels import labels_of_bitmask, labels_of_frame
from dimaskdino.data.parallel import Progress, no_progress, parallel_map
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import Size

logger = logging.getLogger(__name__)

CONVERSION_VERSION = 1  # raise when the annotations of an image change: journals of older versions are then ignored
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def convert_split(
    folder: Path, split: str, source: str, *, num_workers: int = 0, progress: Progress = no_progress
) -> tuple[Json, list[Finding]]:
    """Convert a split, and write its annotation file; returns that, and everything that was left out or strange.

    Converted images are kept in a journal beside the annotation file until that is written, so that an interrupted run
    resumes; an image whose files have changed since is converted again. The bytes do not depend on ``num_workers``.

    Raises:
        DatasetError: if files or folders are missing, a JSON is malformed, or no image is left.
    """
    tasks, problems = find_tasks(folder, split, source)
    output = annotation_file(folder, split)
    output.parent.mkdir(exist_ok=True)
    journal = _Journal(output.with_name(f"{output.name}.part"), f"version {CONVERSION_VERSION} of {source}")
    to_do = [task for task in tasks if task.key not in journal.records]
    if len(to_do) < len(tasks):
        logger.info("%s: resuming after %d of %d images", output.name, len(tasks) - len(to_do), len(tasks))
    with journal:
        for record in progress(parallel_map(convert_image, to_do, num_workers=num_workers), total=len(to_do)):
            journal.add(record)
    records = [journal.records[task.key] for task in tasks]
    problems += [(kind, record["file_name"]) for record in records for kind in record["problems"]]
    coco = _assemble(records, split, source)
    if not coco["images"]:
        kinds = ", ".join(dict.fromkeys(kind for kind, _ in problems)) or "the folders are empty"
        raise DatasetError(f"No image of {split} in {folder} could be converted from {source}: {kinds}.")
    _write_whole(output, json.dumps(coco, separators=(",", ":")))
    journal.path.unlink()
    return coco, problems


def convert_image(task: Task) -> Json:
    """``key``, ``file_name``, ``problems``, and, unless it is left out, ``size`` and ``annotations`` of an image."""
    record: Json = {"key": task.key, "file_name": Path(task.image).name}
    try:
        size = _image_size(task.image)
        if isinstance(task.labels, str):
            labels = labels_of_bitmask(_read_bitmask(task.labels, size))
        else:
            labels = labels_of_frame(task.labels, size)
    except _UnusableError as error:
        return {**record, "problems": [f"image left out: {error}"]}
    return {**record, "problems": labels.problems, "size": size, "annotations": labels.annotations}


class _UnusableError(Exception):
    """Why an image cannot be converted."""


def _image_size(path: str) -> Size:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except UNREADABLE:
        raise _UnusableError("it cannot be read") from None


def _read_bitmask(path: str, size: Size) -> np.ndarray:
    try:
        with Image.open(path) as image:
            bitmask = np.asarray(image)
    except UNREADABLE:
        raise _UnusableError("its bitmask cannot be read") from None
    if bitmask.dtype != np.uint8 or bitmask.shape[2:] != (4,):
        raise _UnusableError("its bitmask is not RGBA with 8 bits a channel")
    if bitmask.shape[:2] != size:
        raise _UnusableError("its bitmask has another size")
    return bitmask


class _Journal:
    """Converted images by key, in a file of one JSON a line, the first of which is what the others depend on."""

    def __init__(self, path: Path, depends_on: str) -> None:
        self.path = path
        self._header = json.dumps(depends_on)
        self.records = {record["key"]: record for record in self._read()}

    def _read(self) -> list[Json]:
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        header, *lines = text.split("\n")
        if header != self._header:
            return []
        # After the last end of a line comes nothing, or what an interrupted run was writing.
        records = [record for line in lines[:-1] if (record := _record(line)) is not None]
        if damaged := len(lines[:-1]) - len(records):
            logger.warning("%s: %d lines are damaged; their images are converted again", self.path, damaged)
        return records

    def __enter__(self) -> None:
        """Write the intact lines to a new file, and continue in it."""
        lines = [self._header, *(json.dumps(record) for record in self.records.values())]
        _write_whole(self.path, "".join(f"{line}\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Json) -> None:
        """Keep a converted image; the next run tries again one that could not be read."""
        self.records[record["key"]] = record
        if "annotations" in record:
            self._file.write(f"{json.dumps(record)}\n")
            self._file.flush()


def _record(line: str) -> Json | None:
    """The converted image that a journal's line holds, or None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and record.keys() >= {"key", "file_name", "problems", "size", "annotations"}
    return record if whole else None


def _write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _assemble(records: list[Json], split: str, source: str) -> Json:
    pairs = (
        ({"file_name": record["file_name"], "width": record["size"][1], "height": record["size"][0]}, annotations)
        for record in records
        if (annotations := record.get("annotations")) is not None
    )
    info = {"description": f"BDD100K instance segmentation, {split}", "source": source}
    return coco_content(pairs, CLASSES, info=info)
