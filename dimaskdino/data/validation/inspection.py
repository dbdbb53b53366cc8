"""The inspection behind tools/check_dataset.py: every image and every object of a dataset."""

from dataclasses import dataclass, replace
from functools import partial

from dimaskdino.data.images import Header, size_problem
from dimaskdino.data.parallel import Progress, no_progress, parallel_map
from dimaskdino.data.readers import PilReader, Reader
from dimaskdino.data.rle import Size
from dimaskdino.data.validation.dataset import Dataset, open_dataset
from dimaskdino.data.validation.files import exif_note
from dimaskdino.data.validation.report import Counts, Finding
from dimaskdino.errors import DatasetError


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

    A dataset without any mask is inspected for a model without masks.

    Args:
        name: of the dataset in detectron2's catalog.
        apply_exif: read photos as INPUT.APPLY_EXIF says.
        reader: reads the images; None means PIL.
        num_workers: processes that read images; 0 reads in this one.
        progress: passes the inspected images on and may draw a bar.

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
