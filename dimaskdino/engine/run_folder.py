"""The folder of a run: what an earlier run left there, and the record of this one."""

import itertools
import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, JSONWriter

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
LAST_CHECKPOINT_FILE = "last_checkpoint"


class MetricsWriter(EventWriter):
    """detectron2's JSONWriter to ``folder``/metrics.json that opens it with the first record.

    A run that ends before that leaves no file, and the file of an earlier run can be moved until then.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        self._writer: JSONWriter | None = None

    def write(self) -> None:
        """Append what is new as lines of JSON."""
        if self._writer is None:
            self._writer = JSONWriter(str(self._path))
        self._writer.write()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def set_earlier_run_aside(folder: Path) -> None:
    """Make ``folder`` one in which a training starts anew, with a warning where it holds an earlier run.

    Without its last_checkpoint a later --resume cannot go on from the earlier run; its records get a name of their own.
    No record and no weights are deleted.
    """
    last, metrics = folder / LAST_CHECKPOINT_FILE, folder / METRICS_FILE
    if last.is_file():
        logger.warning(
            "%s holds an earlier run, and without --resume this one starts anew: last_checkpoint, which named %s, is "
            "removed; other files stay until this run writes files of the same names.",
            folder,
            last.read_text().strip(),
        )
        last.unlink()
    if metrics.is_file() and metrics.stat().st_size:
        moved = next(path for n in itertools.count(1) if not (path := folder / f"metrics.{n}.json").exists())
        metrics.rename(moved)
        logger.warning("The earlier records of %s are now %s.", metrics, moved.name)


def write_config(cfg: CfgNode, folder: Path) -> None:
    """Write the whole configuration to ``folder``/config.yaml; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    path.write_text(cfg.dump(), encoding="utf-8")
    logger.info("The whole configuration is in %s", path)
