"""The rules for panoptic and semantic datasets: which truth a job needs, and whether the label maps can be used."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from dimaskdino.data.coco_file import Json
from dimaskdino.data.datasets.registration import is_coco_file, load_dataset
from dimaskdino.data.images import size_problem
from dimaskdino.data.label_maps import VOID, read_segments, read_semantic
from dimaskdino.data.parallel import Progress, no_progress, parallel_map
from dimaskdino.data.readers import Reader, image_reader
from dimaskdino.data.validation.files import check_files_exist, spread_first
from dimaskdino.data.validation.report import Finding, list_all, saying_how_to_list_all
from dimaskdino.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

# Label maps that the check at the start reads in any case, evenly spread over a dataset.
LEAST_LABEL_MAPS = 100
# What the mappers of this package make objects from.
_TRUTH_OF_MAPPERS = {
    "coco_instance_lsj": ("instance",),
    "coco_instance_detr": ("instance",),
    "coco_detection_detr": ("instance",),
    "coco_panoptic_lsj": ("panoptic",),
    "mask_former_semantic": ("semantic", "panoptic"),
}


def mapping_truth_of(cfg: CfgNode, name: str) -> CfgNode:
    """The configuration with a mapper that reads the labels of dataset ``name``: its own one where that does."""
    truth = truth_of(name)
    cfg = cfg.clone()
    cfg.defrost()
    if truth not in _TRUTH_OF_MAPPERS.get(cfg.INPUT.DATASET_MAPPER_NAME, (truth,)):
        cfg.INPUT.DATASET_MAPPER_NAME = _mapper_of(truth)
    return cfg


def _mapper_of(truth: str) -> str:
    return next(known for known, kinds in _TRUTH_OF_MAPPERS.items() if truth in kinds)


def truth_of(name: str) -> str:
    """What a registered dataset holds: "instance", "semantic", or "panoptic"."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("truth") is not None or is_coco_file(name):
        return metadata.get("truth", "instance")
    first = next(iter(load_dataset(name)), {})
    if "segments_info" in first:
        return "panoptic"
    return "semantic" if "sem_seg_file_name" in first and "annotations" not in first else "instance"


def class_names(name: str) -> list[str]:
    """The classes of a panoptic or semantic dataset by label."""
    names = MetadataCatalog.get(name).get("stuff_classes")
    if names is None:
        raise DatasetError(f"Dataset {name} has no class names; set stuff_classes in its metadata.")
    twice = next((each for index, each in enumerate(names) if each in names[:index]), None)
    if twice is not None:  # scores go by names
        raise DatasetError(f"Dataset {name} has the class name {twice!r} more than once; give each class its own.")
    return list(names)


def check_truth(cfg: CfgNode, name: str, *, trained: bool, tested: bool, with_masks: bool) -> None:
    """Refuse a dataset without the labels that the mapper trains on, or that any of the results could be scored by.

    Raises:
        ConfigError: naming the dataset, what it holds, and the keys.
    """
    truth, mapper, test = truth_of(name), cfg.INPUT.DATASET_MAPPER_NAME, cfg.MODEL.MaskDINO.TEST
    needed = _TRUTH_OF_MAPPERS.get(mapper, (truth,))
    if not with_masks and truth != "instance" and (tested or truth not in needed):
        raise ConfigError(
            f"Dataset {name} has {truth} labels, but this model (MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE}) finds boxes alone; choose a dataset of objects, or a model with masks."
        )
    if trained and truth not in needed:
        raise ConfigError(
            f"INPUT.DATASET_MAPPER_NAME {mapper} trains on {' or '.join(needed)} labels, but dataset {name} has "
            f"{truth} labels; set it to {_mapper_of(truth)}, or choose another DATASETS.TRAIN."
        )
    things = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    if tested and truth == "panoptic" and things is None:
        raise DatasetError(
            f"Dataset {name} does not say which classes are things; set thing_dataset_id_to_contiguous_id in its "
            "metadata."
        )
    no_things = truth == "panoptic" and not things
    kinds = {
        "INSTANCE_ON": ("instance",) if no_things else ("instance", "panoptic"),
        "SEMANTIC_ON": ("semantic", "panoptic"),
        "PANOPTIC_ON": ("panoptic",),
    }
    if tested and not any(test[key] and truth in scored for key, scored in kinds.items()):
        on = [key for key in kinds if test[key]]
        others = [key for key, scored in kinds.items() if truth in scored]
        raise ConfigError(
            f"The results of MODEL.MaskDINO.TEST.{' and '.join(on)} cannot be scored on dataset {name}, which has "
            f"{truth} labels{' without things' * no_things}; set {' or '.join(others)}, or choose another "
            "DATASETS.TEST."
        )
    _check_things(cfg, name)
    if tested and no_things and test.INSTANCE_ON:
        logger.info("Dataset %s has no things: instances (MODEL.MaskDINO.TEST.INSTANCE_ON) are not scored on it.", name)


def _check_things(cfg: CfgNode, name: str) -> None:
    """Refuse a panoptic dataset of the same classes as the job's first one, but with other things among them."""
    listed = dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    panoptic = [each for each in listed if MetadataCatalog.get(each).get("truth") == "panoptic"]
    if name not in panoptic or class_names(first := panoptic[0]) != class_names(name):
        return
    things = {
        each: {*MetadataCatalog.get(each).get("thing_dataset_id_to_contiguous_id", {}).values()}
        for each in (first, name)
    }
    for index in things[name] ^ things[first]:
        kinds = [f"{'a thing' if index in things[each] else 'stuff'} in {each}" for each in (first, name)]
        raise DatasetError(
            f"The class {class_names(name)[index]!r} is {' and '.join(kinds)}; give isthing the same value in both."
        )


def check_class_count(cfg: CfgNode, name: str, number: int, fitting: str) -> None:
    """Refuse another number of classes than the model's; ``fitting`` is a dataset with that many, "" for none yet."""
    wanted = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if number != wanted:
        remedy = f"give it the {wanted} of dataset {fitting}, in their order" if fitting else f"set it to {number}"
        raise DatasetError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {wanted}, but dataset {name} has {number} classes; {remedy}."
        )


def check_segmentation(cfg: CfgNode, name: str, *, trained: bool, fitting: str = "") -> tuple[list[Json], list[str]]:
    """Check the label maps of a dataset, as far as it takes seconds; returns its images and its class names.

    Raises:
        DatasetError: another number of classes than the model's, files that are missing, or a label map of another size
            than its image or with labels that are not listed; names used twice; no pixel with a class to train on.
    """
    entries, names = load_dataset(name), class_names(name)
    num_classes, ignore = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    check_class_count(cfg, name, len(names), fitting)
    if 0 <= ignore < num_classes:
        logger.warning(
            "Dataset %s: MODEL.SEM_SEG_HEAD.IGNORE_VALUE is %d, the label of the class %r, so that its pixels are "
            "ignored in semantic segmentation; set it to the label of no class unless that is meant.",
            *(name, ignore, names[ignore]),
        )
    reader = image_reader(cfg)
    check_files_exist(name, [reader.file(entry["file_name"]) for entry in entries])
    check_files_exist(name, [label_file(entry) for entry in entries], kind="label maps")
    options: Json = {"num_classes": num_classes, "ignore": ignore, "apply_exif": cfg.INPUT.APPLY_EXIF, "reader": reader}
    number, labeled = 0, False
    with saying_how_to_list_all(name):
        for entry in spread_first(entries, LEAST_LABEL_MAPS):
            labels = check_labels_of(entry, **options)
            labeled |= bool((labels != (VOID if "segments_info" in entry else ignore)).any())
            number += 1
    if trained and not labeled and number == len(entries):
        raise DatasetError(
            f"Dataset {name}: no pixel of its {len(entries)} label maps has a class, so there is nothing to train on; "
            f"correct them ({label_file(entries[0])} is the first), or MODEL.SEM_SEG_HEAD.IGNORE_VALUE (now {ignore})."
        )
    ignored = f"pixels of label {ignore} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE)"
    if "segments_info" in entries[0]:
        ignored = f"pixels of no segment (id {VOID}) and crowd regions"
    logger.info("Dataset %s: %d images, %d classes; %s are ignored.", name, len(entries), len(names), ignored)
    rest = "" if number == len(entries) else f"; {list_all(name)}"
    logger.info("Dataset %s: read the label maps of %d of %d images%s", name, number, len(entries), rest)
    return entries, names


def label_file(entry: Json) -> str:
    """Path of the label map of an image."""
    return entry["pan_seg_file_name"] if "segments_info" in entry else entry["sem_seg_file_name"]


def check_labels_of(entry: Json, *, num_classes: int, ignore: int, apply_exif: bool, reader: Reader) -> np.ndarray:
    """The segment ids, or labels, of an image's label map; raises DatasetError if it or the image cannot be used."""
    header = reader.header(entry["file_name"])
    size, other = header.size(apply_exif=apply_exif), header.size(apply_exif=not apply_exif)
    listed = entry.get("height", size[0]), entry.get("width", size[1])
    if problem := size_problem(header, listed, apply_exif=apply_exif):
        raise DatasetError(f"Image {entry['file_name']} is {problem}.")
    of_classes = partial(read_semantic, num_classes=num_classes, ignore=ignore)
    read: Callable[..., np.ndarray] = read_segments if "segments_info" in entry else of_classes
    try:
        return read(entry, size=size)
    except DatasetError as error:
        hint = ""
        with contextlib.suppress(DatasetError):
            if read(entry, size=other).shape != size:
                frame = "as stored" if apply_exif else "turned upright"
                hint = f" It fits the photo {frame}: set INPUT.APPLY_EXIF {not apply_exif} if it was drawn on that."
        raise DatasetError(f"{error}{hint}") from None


def inspect_segmentation(
    name: str, *, ignore: int, apply_exif: bool, reader: Reader, num_workers: int = 0, progress: Progress = no_progress
) -> tuple[list[Json], "dict[str, list[int]]", list[Finding]]:
    """Read every image and label map of a panoptic or semantic dataset, in ``num_workers`` processes or in this one.

    Returns:
        The images; for each class its pixels, its segments (or images with it, in a semantic dataset), and its images;
        and what is wrong.
    """
    entries, names = load_dataset(name), class_names(name)
    check = partial(_inspect, num_classes=len(names), ignore=ignore, apply_exif=apply_exif, reader=reader)
    counts = {label: [0, 0, 0] for label in names}
    findings: list[Finding] = []
    for found, present in progress(parallel_map(check, entries, num_workers=num_workers), total=len(entries)):
        findings += found
        for index, numbers in present.items():
            counts[names[index]] = [a + b for a, b in zip(counts[names[index]], (*numbers, 1), strict=True)]
    return entries, counts, findings


def _inspect(entry: Json, *, ignore: int, **options: Any) -> tuple[list[Finding], dict[int, tuple[int, int]]]:
    """What is wrong with one label map, and the pixels and segments of each of its classes."""
    try:
        labels = check_labels_of(entry, ignore=ignore, **options)
    except DatasetError as error:
        return [Finding("label map cannot be used", str(error))], {}
    pixels = dict(zip(*(each.tolist() for each in np.unique(labels, return_counts=True)), strict=True))
    if "segments_info" not in entry:
        return [], {label: (number, 1) for label, number in pixels.items() if label != ignore}
    present: dict[int, tuple[int, int]] = {}
    for segment in entry["segments_info"]:
        area, number = present.get(segment["category_id"], (0, 0))
        present[segment["category_id"]] = (area + pixels.get(segment["id"], 0), number + 1)
    return list(_segment_findings(entry, entry["segments_info"], pixels)), present


def _segment_findings(entry: Json, segments: Sequence[Json], pixels: dict[int, int]) -> Iterator[Finding]:
    path = entry["pan_seg_file_name"]
    for segment in segments:
        if segment["id"] not in pixels:
            yield Finding("segment without a pixel", f"segment {segment['id']} of {path}")
        elif "area" in segment and segment["area"] != pixels[segment["id"]]:
            area = f"{segment['area']} listed, {pixels[segment['id']]} in the PNG"
            yield Finding("segment of another area than listed", f"segment {segment['id']} of {path}: {area}")
    if not segments:
        yield Finding("image without a segment", path)
