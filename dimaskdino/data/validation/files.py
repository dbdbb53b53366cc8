"""The image files of a dataset: whether they exist, what EXIF does to them, and the inspection of every one."""

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from detectron2.data import MetadataCatalog

from dimaskdino.data.images import Header, backslash_hint, size_problem
from dimaskdino.data.parallel import Progress, no_progress, parallel_map
from dimaskdino.data.readers import PilReader, Reader
from dimaskdino.data.validation.dataset import Dataset, Picture, open_dataset
from dimaskdino.data.validation.report import Counts, Finding
from dimaskdino.data.validation.rules import TOLERANCE_PX, Rules
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import Size

# The check at the start looks into some files of a dataset in any case, and into others until these seconds are over;
# tools/check_dataset.py looks into all.
MOST_SECONDS = 2.0

Item = TypeVar("Item")


def exif_note(turned: Sequence[tuple[Picture, Header]], rules: Rules) -> str:
    """What EXIF does to photos that have an orientation, and which way of reading them fits their labels."""
    if not turned:
        return ""
    fits = [_fitting_frame(*each, rules) for each in turned]
    advice = {
        "stored": "fit only the pixels as stored (INPUT.APPLY_EXIF False)",
        "upright": "fit only the upright photo (INPUT.APPLY_EXIF True)",
        "both": "fit both, so look at tools/check_dataset.py --draw 20, with --no-exif for the pixels as stored",
        "neither": "fit neither the pixels as stored nor the upright photo",
    }
    parts = [f"the labels of {fits.count(kind)} {text}" for kind, text in advice.items() if kind in fits]
    same_size = sum(header.orientation < 5 for _, header in turned)
    return (
        f"{len(turned)} images have an EXIF orientation (first {turned[0][0].path}), {same_size} of them one that "
        "mirrors the photo or turns it upside down, which its size does not show. INPUT.APPLY_EXIF True reads upright "
        f"photos, False the pixels as stored; {'; '.join(parts)}."
    )


def _fitting_frame(picture: Picture, header: Header, rules: Rules) -> str:
    """Which frame the labels of a photo lie in: stored, upright, both or neither."""
    extents = [extent for each in picture.annotations if (extent := rules.extent(each, header.stored))]
    fits = []
    for name, turned in (("stored", False), ("upright", True)):
        height, width = header.size(apply_exif=turned)
        if all(each[2] <= width + TOLERANCE_PX and each[3] <= height + TOLERANCE_PX for each in extents):
            fits.append(name)
    return fits[0] if len(fits) == 1 else "both" if fits else "neither"


def evenly_spread(number: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``number`` things, from the first to the last."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).astype(int)).tolist()


def spread_first(items: Sequence[Item], least: int) -> Iterator[Item]:
    """``least`` items spread evenly over all, then the others until the time is up."""
    start = time.monotonic()
    spread = evenly_spread(len(items), least)
    yield from (items[index] for index in spread)
    for index in sorted({*range(len(items))} - {*spread}):
        if time.monotonic() > start + MOST_SECONDS:
            return
        yield items[index]


def check_files_exist(dataset: str, paths: Collection[str], kind: str = "images") -> None:
    """Find missing files, but not those of other storage (``s3://...``), before a job that takes hours meets them.

    Folders are listed, which on network file systems takes a small part of the time of a request for every file.

    Raises:
        DatasetError: with the number of files that are missing, and the first; ``kind`` says what they are.
    """
    local = [path for path in paths if "://" not in path]
    listed = {file for folder in {os.path.dirname(path) for path in local} for file in _files_in(folder)}
    # A file system may accept other spellings of a listed name, for example with letters of the other case.
    missing = [path for path in local if path not in listed and not os.path.isfile(path)]
    if missing:
        folder = MetadataCatalog.get(dataset).get("keys", {}).get(kind, "the folder")
        raise DatasetError(
            f"{len(missing)} of {len(paths)} {kind} of dataset {dataset} do not exist, the first of them {missing[0]}; "
            f"{backslash_hint(missing[0])}check {folder}, whether it was unpacked completely, and the file "
            "names in the annotations."
        )


def _files_in(folder: str) -> list[str]:
    """Paths of the files and links of a folder, without a look at each of them."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            return [each.path for each in entries if each.is_symlink() or each.is_file(follow_symlinks=False)]
    except OSError:
        return []


@dataclass(frozen=True)
class Inspection:
    """A dataset and what is wrong with it."""

    dataset: Dataset
    counts: Counts  # its objects
    findings: list[Finding]
    exif: str  # what EXIF does to its photos, and which way of reading them fits the labels; "" if no photo has it


def inspect_dataset(
    name: str,
    *,
    apply_exif: bool = True,
    reader: Reader | None = None,
    num_workers: int = 0,
    progress: Progress = no_progress,
) -> Inspection:
    """Inspect a registered dataset, as strictly as training and evaluation of a model with masks together need.

    A dataset without any mask is inspected for a model without masks. Images are read by ``reader``, by default PIL, in
    ``num_workers`` processes, by default this one.

    Raises:
        DatasetError: if it is not registered, lacks its files, lists no image or is not in COCO's format at all.
    """
    dataset = open_dataset(name, tested=True)
    reader = reader or PilReader("RGB", apply_exif=apply_exif)
    check = partial(_inspect_file, reader=reader, apply_exif=apply_exif)
    units = [(each.path, each.size) for each in dataset.pictures]
    read = list(progress(parallel_map(check, units, num_workers=num_workers), total=len(units)))
    findings = [finding for found, _ in read for finding in found]
    headers = [header for _, header in read]
    sized = [
        each if each.size or not header else replace(each, size=header.size(apply_exif=apply_exif))
        for each, header in zip(dataset.pictures, headers, strict=True)
    ]
    dataset = replace(dataset, pictures=sized)
    counts = Counts(dataset.classes)
    rules = dataset.rules(with_masks=dataset.has_masks(), scored=True)
    for where, problem in dataset.problems(rules, counts):
        details = "; ".join(filter(None, (problem.detail, problem.remedy)))
        findings.append(Finding(problem.kind, where + (f": {details}" if details else "")))
    turned = [(each, header) for each, header in zip(sized, headers, strict=True) if header and header.orientation != 1]
    return Inspection(dataset, counts, findings, exif_note(turned, rules))


def _inspect_file(
    unit: tuple[str, Size | None], reader: Reader, apply_exif: bool
) -> tuple[list[Finding], Header | None]:
    """Decode one image and compare its size with the listed one."""
    path, listed = unit
    try:
        reader.read(path)
        header = reader.header(path)
    except DatasetError as error:
        return [Finding("image cannot be used", str(error))], None
    problem = size_problem(header, listed, apply_exif=apply_exif) if listed else ""
    return [Finding("image has another size than listed", f"{path}: {problem}")] if problem else [], header
