"""Making label maps from others: in several processes, resumable, and checked."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dimaskdino.command_line import at_least
from dimaskdino.data.label_maps import check_segments, read_label_map, read_segment_ids, relabel
from dimaskdino.data.parallel import parallel_map
from dimaskdino.errors import DatasetError

IGNORED = 255
_AGAIN = "make it again with --force"
NUM_ADE20K = 150
# The label ids of the 19 classes that Cityscapes evaluates, in the order of their train ids.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Conversion(NamedTuple):
    """One label map to make: what it is made of, where it goes, and how: ``source`` to (H, W) labels."""

    source: Path
    target: Path
    convert: Callable[[Path], np.ndarray]


def convert_and_report(conversions: Sequence[Conversion], args: argparse.Namespace) -> str:
    """Make what is missing, and check that what is there can be read and has the size of its source.

    A file appears once it is whole, so that a second run continues where the first one ended. Returns how many were
    made, in words.

    Raises:
        DatasetError: there is nothing to convert, or a source or an earlier target cannot be used.
    """
    if not conversions:
        raise DatasetError("There is no label map to convert; check --root (layouts: datasets/README.md).")
    for folder in {each.target.parent for each in conversions}:
        folder.mkdir(parents=True, exist_ok=True)
    work = partial(_make_or_check, force=args.force)
    results = parallel_map(work, conversions, num_workers=args.workers)
    made = sum(tqdm(results, total=len(conversions), unit="map"))
    return f"{made} label maps made, {len(conversions) - made} were there already"


def _make_or_check(conversion: Conversion, *, force: bool) -> bool:
    """Make a label map, or check the one that is there; returns whether it was made."""
    if force or not conversion.target.is_file():
        _make(conversion)
        return True
    sizes = [_size(path, advice) for path, advice in ((conversion.source, ""), (conversion.target, _AGAIN))]
    if sizes[0] != sizes[1]:
        raise DatasetError(f"{conversion.target} has another size than {conversion.source}; {_AGAIN}.")
    return False


def _make(conversion: Conversion) -> None:
    labels = conversion.convert(conversion.source)
    part = conversion.target.with_name(f".{conversion.target.name}.{os.getpid()}.part")
    try:
        Image.fromarray(labels.astype(np.uint8)).save(part, format="PNG")
        part.replace(conversion.target)
    finally:
        part.unlink(missing_ok=True)


def _size(path: Path, advice: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise DatasetError(f"Label map {path} cannot be read ({error}); {advice or 'replace the file'}.") from error


def parse_args(description: str | None, root: Path, splits: Sequence[str]) -> argparse.Namespace:
    """The command line that the datasets/prepare_*.py for label maps share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", type=Path, default=root, help="the folder of all datasets")
    parser.add_argument("--splits", nargs="+", choices=splits, default=list(splits), help="what to convert")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that convert, beside this one")
    parser.add_argument("--force", action="store_true", help="convert again what is there already")
    return parser.parse_args()


def label_files(folder: Path, ending: str) -> list[Path]:
    """The files of a folder and its subfolders with an ending, in order; raises DatasetError if there are none."""
    files = sorted(folder.rglob(f"*{ending}"))
    if not files:
        raise DatasetError(f"{folder} holds no file *{ending}; check --root (layouts: datasets/README.md).")
    return files


def shift_ade20k(path: Path) -> np.ndarray:
    """Labels 0 to 149, and 255 for no class, from ADE20K's 1 to 150 and 0; raises DatasetError for others."""
    labels = read_label_map(str(path))
    if labels.max() > NUM_ADE20K:
        raise DatasetError(f"Label map {path} has the label {labels.max()}; ADE20K's end at {NUM_ADE20K}.")
    return np.where(labels == 0, IGNORED, labels - 1)


def cityscapes_train_ids(path: Path) -> np.ndarray:
    """Labels 0 to 18 of the classes that Cityscapes evaluates, and 255 for all others, from its label ids."""
    return relabel(read_label_map(str(path)), {label: index for index, label in enumerate(CITYSCAPES_IDS)}, IGNORED)


def classes_of_segments(path: Path, *, segments: Sequence[dict[str, Any]], classes: Mapping[int, int]) -> np.ndarray:
    """Classes, by category id, of a panoptic PNG's segments; 255 for pixels of no segment and for crowd regions.

    Raises:
        DatasetError: the PNG has a segment that is not listed, or cannot be read, or a segment has another category.
    """
    ids = read_segment_ids(str(path))
    check_segments(ids, segments, str(path))
    unknown = sorted({each["category_id"] for each in segments} - classes.keys())
    if unknown:
        raise DatasetError(f"A segment of {path} has the category id {unknown[0]}, which COCO panoptic does not have.")
    kept = {each["id"]: classes[each["category_id"]] for each in segments if not each.get("iscrowd")}
    return relabel(ids, kept, IGNORED)
