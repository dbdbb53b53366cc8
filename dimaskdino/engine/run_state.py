"""What a resumed run needs beyond weights and optimizer to go on as if it had not been interrupted."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.events import EventStorage, JSONWriter

from dimaskdino.checkpoint import replacing
from dimaskdino.config import flatten

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
WINDOW = 20  # iterations whose median metrics.json and the console show
# Keys that may differ between the parts of a run and change nothing of it.
FREE_KEYS = ("OUTPUT_DIR", "VIS_PERIOD", "LOG.WRITERS", "LOG.PROJECT", "LOG.NAME", "LOG.PICTURES")


def recent_scalars(storage: EventStorage) -> dict[str, Any]:
    """The last values of each scalar with their iterations, and whether its records are medians."""
    hints = storage.smoothing_hints()
    return {
        name: {"values": [(float(value), int(at)) for value, at in history.values()[-WINDOW:]], "smooth": hints[name]}
        for name, history in storage.histories().items()
    }


def restore_scalars(storage: EventStorage, scalars: dict[str, Any]) -> None:
    """Put :func:`recent_scalars` into a new storage, whose iteration stays as it is.

    Not the time of an iteration, which is not measured in the first ones: a record would hold it as one of its own.
    """
    now = storage.iter
    for name, recent in scalars.items():
        if name == "time":
            continue
        for value, at in recent["values"]:
            storage.iter = at
            storage.put_scalar(name, value, smoothing_hint=recent["smooth"])
    storage.iter = now


class MetricsFile(JSONWriter):
    """detectron2's metrics.json, except that it does not repeat what the file already holds."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), WINDOW)
        self._last_write = last_record(path)


def last_record(path: Path) -> int:
    """The last iteration in a metrics.json; -1 if there is none."""
    return max((iteration for _, iteration in records(path)), default=-1)


def record_of(path: Path, iteration: int) -> dict[str, float]:
    """What a metrics.json holds of one iteration."""
    return {key: value for line, at in records(path) if at == iteration for key, value in json.loads(line).items()}


def cut_records(path: Path, last: int) -> None:
    """Remove the records after iteration ``last`` from a metrics.json, and lines that are not whole."""
    if not path.is_file():
        return
    kept = [f"{line}\n" for line, iteration in records(path) if iteration <= last]
    if (text := "".join(kept)) != path.read_text(encoding="utf-8", errors="replace"):
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
        logger.info("Removed the records after iteration %d from %s.", last, path)


def records(path: Path) -> Iterator[tuple[str, int]]:
    """The readable lines of a metrics.json with their iterations."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            yield line, int(json.loads(line)["iteration"])
        except (ValueError, TypeError, KeyError):
            continue


def changed_settings(before: str, now: str) -> list[str]:
    """The keys whose values differ between two dumps of a configuration, each as "KEY: old -> new"."""
    old, new = (dict(flatten(yaml.safe_load(dump))) for dump in (before, now))
    keys = [key for key in sorted({*old, *new}) if key not in FREE_KEYS and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}" for key in keys]
