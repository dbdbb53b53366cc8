"""The checkpoints in a run's folder: whether a file is whole, and which one a run goes on from."""

import logging
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dimaskdino.checkpoint.reading import read_weights
from dimaskdino.errors import CheckpointError

logger = logging.getLogger(__name__)

TAG_FILE = "last_checkpoint"
# What the trainer names its checkpoints; model_best.pth is a copy to use, not to go on from.
FINAL = "model_final.pth"
_DAMAGES = (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError)
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")


def damage(path: Path) -> str:
    """What is wrong with a checkpoint; "" if nothing is.

    Files in torch's format are ZIP archives with a CRC-32 of each part, which torch itself does not check.
    """
    try:
        if not path.is_file():
            return "does not exist"
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    return f"is damaged: the checksum of its part {part} is wrong"
        read_weights(path)
    except _DAMAGES as error:
        return f"is damaged or unreadable ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
    return ""


def tagged(folder: Path) -> str:
    """The name in last_checkpoint, "" if there is no such file; raises CheckpointError if it names no file here."""
    tag = folder / TAG_FILE
    try:
        name = tag.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{tag} is not valid UTF-8") from error
    if not name:
        raise CheckpointError(f"{tag} is empty")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise CheckpointError(f"{tag} names {name}, which is not in this folder")
    return name


def newest_good(folder: Path, run_id: str) -> Path | None:
    """The newest whole checkpoint of a run: the tagged one, else the one of the highest iteration.

    Each file that is passed over is logged with its damage. Runs of an earlier version have the ``run_id`` "".
    """
    name = ""
    try:
        if name := tagged(folder):
            if not (problem := damage(folder / name)):
                return folder / name
            logger.warning("%s, the last checkpoint, %s; it is passed over.", folder / name, problem)
    except CheckpointError as error:
        logger.warning("%s; the folder's checkpoints are searched.", error)
    if not run_id and not (folder / TAG_FILE).exists():
        return None  # Nothing says that the folder's checkpoints are of this run.
    found = list(_others(folder, name, run_id))
    path = max(found)[1] if found else None
    if path:
        logger.warning("The newest whole checkpoint is %s; it is used.", path)
    return path


def _others(folder: Path, but: str, run_id: str) -> Iterator[tuple[int, Path]]:
    """Iteration and path of each whole checkpoint of the run."""
    for path in sorted(folder.glob("model_*.pth")):
        if path.name == but or not (path.name == FINAL or _PERIODIC.fullmatch(path.name)):
            continue
        if problem := damage(path):
            logger.warning("%s %s; it is passed over.", path, problem)
            continue
        content = read_weights(path)
        if content.get("run_id", "") == run_id:
            yield int(content.get("iteration", -1)), path
