"""Where the records of a run go (metrics.json, TensorBoard, ..., or your own), and what a resumed run reads there."""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter, get_event_storage
from detectron2.utils.registry import Registry

from dimaskdino.checkpoint import replacing
from dimaskdino.config import flatten
from dimaskdino.errors import ConfigError, check_choice, check_range

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
WINDOW = 20  # iterations whose median metrics.json and the console show
# Keys that may differ between the parts of a run and change nothing of it.
FREE_KEYS = ("OUTPUT_DIR", "VIS_PERIOD", "LOG.WRITERS", "LOG.PROJECT", "LOG.NAME", "LOG.PICTURES")
NEEDED = "metrics_json"
# Writers whose packages, of the same names, are not installed with this one.
EXTRAS = ("wandb", "mlflow")
_LONGEST_PARAMETER = 500  # characters, of MLflow


def recent_scalars(storage: EventStorage) -> dict[str, Any]:
    """The last values of each scalar with their iterations, and whether its records are medians."""
    hints = storage.smoothing_hints()
    return {
        name: {"values": [(float(value), int(at)) for value, at in history.values()[-WINDOW:]], "smooth": hints[name]}
        for name, history in storage.histories().items()
    }


def restore_scalars(storage: EventStorage, scalars: dict[str, Any]) -> None:
    """Put :func:`recent_scalars` into a new storage, whose iteration stays as it is.

    The time of an iteration is left out: the first ones do not measure it, and a record would take the old value.
    """
    now = storage.iter
    for name, recent in scalars.items():
        if name == "time":
            continue
        for value, at in recent["values"]:
            storage.iter = at
            storage.put_scalar(name, value, smoothing_hint=recent["smooth"])
    storage.iter = now


def last_record(path: Path) -> int:
    """The last iteration in a metrics.json; -1 if there is none."""
    return max((record["iteration"] for _, record in records(path)), default=-1)


def record_of(path: Path, iteration: int) -> dict[str, float]:
    """What a metrics.json holds of one iteration."""
    found = [record for _, record in records(path) if record["iteration"] == iteration]
    return {key: value for record in found for key, value in record.items()}


def cut_records(path: Path, last: int) -> None:
    """Remove the records after iteration ``last`` from a metrics.json, and lines that are not whole."""
    if not path.is_file():
        return
    kept = [f"{line}\n" for line, record in records(path) if record["iteration"] <= last]
    if (text := "".join(kept)) != path.read_text(encoding="utf-8", errors="replace"):
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
        logger.info("Removed the records after iteration %d from %s.", last, path)


def records(path: Path, holding: str = "", *, last_bytes: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Complete lines of a metrics.json that contain ``holding``, and their records; or of its ``last_bytes`` alone."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - last_bytes, 0) if last_bytes else 0)
        lines = file.read().decode(errors="replace").splitlines()
    for line in lines:
        if holding in line:
            try:
                record = json.loads(line)
                yield line, record | {"iteration": int(record["iteration"])}
            except (ValueError, TypeError, KeyError):
                continue


def changed_settings(before: str, now: str) -> list[str]:
    """The keys whose values differ between two dumps of a configuration, each as "KEY: old -> new"."""
    old, new = (dict(flatten(yaml.safe_load(dump))) for dump in (before, now))
    keys = [key for key in sorted({*old, *new}) if key not in FREE_KEYS and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}" for key in keys]


WRITER_REGISTRY = Registry("WRITER")
WRITER_REGISTRY.__doc__ = """
Builders of writers by LOG.WRITERS. Each is called as ``builder(cfg, start_iter)`` at the first record, on the main
process, and returns a :class:`detectron2.utils.events.EventWriter`; ``start_iter`` is 0 unless the run was resumed.
"""


class OnFirstRecord(EventWriter):
    """A writer that opens its file with the first record, so that a run that fails before leaves no empty file."""

    def __init__(self, build: Callable[..., EventWriter], cfg: CfgNode, start_iter: Callable[[], int]) -> None:
        self._open = lambda: build(cfg, start_iter())
        self._writer: EventWriter | None = None

    def write(self) -> None:
        """Write the new records."""
        if self._writer is None and get_event_storage().latest():
            self._writer = self._open()
        if self._writer is not None:
            self._writer.write()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class Tracker(EventWriter):
    """Passes on new scalars, medians as in metrics.json, and pictures (H, W, 3) uint8 RGB; each with its iteration."""

    def __init__(
        self,
        *,
        log_scalars: Callable[[dict[str, float], int], object],
        log_picture: Callable[[str, np.ndarray, int], object],
        close: Callable[[], object],
    ) -> None:
        self._log_scalars, self._log_picture, self._close = log_scalars, log_picture, close
        self._last = -1

    def write(self) -> None:
        """Pass on what came since the last call; the storage keeps the pictures."""
        storage = get_event_storage()
        new: dict[int, dict[str, float]] = {}
        for name, (value, at) in storage.latest_with_smoothing_hint(WINDOW).items():
            if at > self._last:
                new.setdefault(int(at), {})[name] = float(value)
        for at in sorted(new):
            self._log_scalars(new[at], at)
        self._last = max(new, default=self._last)
        for name, picture, at in storage._vis_data:
            self._log_picture(name, np.asarray(picture).transpose(1, 2, 0), int(at))

    def close(self) -> None:
        """End the run."""
        self._close()


@WRITER_REGISTRY.register()
def metrics_json(cfg: CfgNode, start_iter: int) -> EventWriter:
    """One line of JSON for each record, which a resumed run continues."""
    path = Path(cfg.OUTPUT_DIR) / METRICS_FILE
    writer = JSONWriter(str(path), WINDOW)
    writer._last_write = last_record(path)  # it does not repeat what the file holds
    return writer


@WRITER_REGISTRY.register()
def tensorboard(cfg: CfgNode, start_iter: int) -> EventWriter:
    """Events with scalars and pictures; TensorBoard hides earlier events from the start of a resumed run on."""
    return TensorboardXWriter(str(cfg.OUTPUT_DIR), purge_step=start_iter or None)


@WRITER_REGISTRY.register()
def wandb(cfg: CfgNode, start_iter: int) -> EventWriter:
    """Weights & Biases; its own variables choose account, server and mode (WANDB_MODE=offline needs no network)."""
    import wandb as library

    id_file = Path(cfg.OUTPUT_DIR) / "wandb_run_id"
    run = library.init(
        project=cfg.LOG.PROJECT,
        name=_run_name(cfg),
        dir=str(id_file.parent),
        config=dict(flatten(cfg)),
        id=_earlier_id(id_file, start_iter),
        resume="allow",
    )
    id_file.write_text(run.id, encoding="utf-8")
    return Tracker(
        log_scalars=lambda values, at: run.log(values, step=at),
        log_picture=lambda name, picture, at: run.log({name: library.Image(picture)}, step=at),
        close=run.finish,
    )


@WRITER_REGISTRY.register()
def mlflow(cfg: CfgNode, start_iter: int) -> EventWriter:
    """MLflow, at MLFLOW_TRACKING_URI, else in OUTPUT_DIR."""
    import mlflow as library

    folder = Path(cfg.OUTPUT_DIR)
    if "MLFLOW_TRACKING_URI" not in os.environ:
        library.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        if library.get_experiment_by_name(cfg.LOG.PROJECT) is None:
            pictures = (folder / "mlartifacts").resolve().as_uri()
            library.create_experiment(cfg.LOG.PROJECT, artifact_location=pictures)
    library.set_experiment(cfg.LOG.PROJECT)
    id_file = folder / "mlflow_run_id"
    earlier = _earlier_id(id_file, start_iter)
    run = library.start_run(run_id=earlier, run_name=_run_name(cfg))
    id_file.write_text(run.info.run_id, encoding="utf-8")
    if earlier is None:  # MLflow refuses another value for a parameter.
        library.log_params({key: str(value)[:_LONGEST_PARAMETER] for key, value in flatten(cfg)})
    return Tracker(
        log_scalars=lambda values, at: library.log_metrics({_plain(name): x for name, x in values.items()}, step=at),
        log_picture=lambda name, picture, at: library.log_image(picture, artifact_file=f"{_plain(name)}/{at:07d}.png"),
        close=library.end_run,
    )


def build_writers(cfg: CfgNode, start_iter: Callable[[], int]) -> list[EventWriter]:
    """The writers of LOG.WRITERS, each of which opens its files with the first record.

    TensorBoard's is the last: it removes the pictures from the storage. ``start_iter`` is asked when a writer opens.
    """
    names = sorted(cfg.LOG.WRITERS, key=lambda name: name == "tensorboard")
    return [OnFirstRecord(WRITER_REGISTRY.get(name), cfg, start_iter) for name in names]


def check_writers(cfg: CfgNode) -> None:
    """Check the keys of LOG, before data is read; raises ConfigError."""
    check_range("LOG.PICTURES", cfg.LOG.PICTURES, 0)
    names = list(cfg.LOG.WRITERS)
    known = sorted(name for name, _ in WRITER_REGISTRY)
    for name in names:
        check_choice("An entry of LOG.WRITERS", name, known)
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise ConfigError(f"LOG.WRITERS names {name!r}, which needs a package: pip install 'dimaskdino[{name}]'.")
    if NEEDED not in names:
        raise ConfigError(f"LOG.WRITERS is {names}; {NEEDED} must be among them, since --resume reads its records.")


def _run_name(cfg: CfgNode) -> str:
    return cfg.LOG.NAME or Path(cfg.OUTPUT_DIR).resolve().name


def _earlier_id(file: Path, start_iter: int) -> str | None:
    """The id of the run that is resumed; None for a new one."""
    return file.read_text(encoding="utf-8").strip() if start_iter and file.is_file() else None


def _plain(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", name)
