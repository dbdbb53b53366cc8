"""Label maps: the class, or the segment, of each pixel of an image."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.errors import DatasetError

Json = dict[str, Any]
VOID = 0  # the id of pixels without a segment, as COCO defines it


def read_label_map(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a map of classes, (H, W) int32: an image with one channel of 8 or 16 bits, or the indices of a palette.

    Raises:
        DatasetError: if it is missing, cannot be read, has several channels, or another size than (height, width).
    """
    return _read(path, size, ("1", "L", "P", "I", "I;16", "I;16B"), "one channel with the class number of each pixel")


def read_segment_ids(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a panoptic PNG in COCO's form, (H, W) int32: R + 256 G + 65536 B; see :func:`read_label_map`."""
    channels = _read(path, size, ("RGB",), "three channels (RGB) that encode segment ids, as COCO defines them")
    return channels @ np.array([1, 256, 256 * 256], dtype=np.int32)


def _read(path: str, size: tuple[int, int] | None, modes: Sequence[str], wanted: str) -> np.ndarray:
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            mode, pixels = image.mode, np.array(image)
    except FileNotFoundError as error:
        raise DatasetError(f"Label map {path} does not exist; check the dataset's folder of labels.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"Cannot read label map {path} ({error}); replace the file.") from error
    if mode not in modes:
        raise DatasetError(f"Label map {path} is an image of PIL's mode {mode}; it needs {wanted}.")
    if size is not None and pixels.shape[:2] != tuple(size):
        raise DatasetError(
            f"Label map {path} is {pixels.shape[1]}x{pixels.shape[0]} (width x height), but its image is "
            f"{size[1]}x{size[0]}; replace one of them."
        )
    return pixels.astype(np.int32)


def labels_present(labels: np.ndarray) -> list[int]:
    """The different values of a map, in order."""
    return _runs(np.sort(_runs(labels)[0]))[0].tolist()  # np.unique takes ten times as long


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and length of each run of equal values, row by row; maps have few of them."""
    flat = values.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    return flat[starts], np.diff(starts, append=len(flat))


def check_labels(labels: np.ndarray, *, num_classes: int, ignore: int, path: str) -> None:
    """Refuse labels that are neither a class nor ignored; DatasetError names file, label, and what may be meant."""
    wrong = [label for label in labels_present(labels) if label != ignore and not 0 <= label < num_classes]
    if wrong:
        shifted = wrong == [num_classes]
        hint = "subtract 1 from every label, so that the first class is 0" if shifted else "correct the labels"
        raise DatasetError(
            f"Label map {path} has the label {wrong[0]}{' and others' if wrong[1:] else ''}, but there are "
            f"{num_classes} classes, numbered from 0, and {ignore} is ignored (MODEL.SEM_SEG_HEAD.IGNORE_VALUE); "
            f"{hint}, or set MODEL.SEM_SEG_HEAD.NUM_CLASSES."
        )


def check_segments(ids: np.ndarray, segments: Sequence[Json], path: str) -> None:
    """Refuse pixels whose segment id the JSON does not list; DatasetError names the file and the id."""
    unlisted = set(labels_present(ids)) - {segment["id"] for segment in segments} - {VOID}
    if unlisted:
        raise DatasetError(
            f"Panoptic PNG {path} has pixels of the segment id {min(unlisted)}, which its segments_info does not list "
            f"({len(unlisted)} such ids); export both again."
        )


def read_semantic(entry: Json, *, num_classes: int, ignore: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """The class of each pixel of an image, (H, W) int32 in [0, num_classes) or ``ignore``; ``size`` is (height, width).

    It is from the map of classes (``sem_seg_file_name``), or from the panoptic PNG (``pan_seg_file_name`` and
    ``segments_info``), of which crowd regions are ignored as well. Raises DatasetError for a map that cannot be used.
    """
    if "sem_seg_file_name" in entry:
        labels = read_label_map(entry["sem_seg_file_name"], size)
        check_labels(labels, num_classes=num_classes, ignore=ignore, path=entry["sem_seg_file_name"])
        return labels
    ids = read_segments(entry, size)
    kept = [segment for segment in entry["segments_info"] if not segment.get("iscrowd")]
    return relabel(ids, {segment["id"]: segment["category_id"] for segment in kept}, ignore)


def read_segments(entry: Json, size: tuple[int, int] | None = None) -> np.ndarray:
    """The segment id of each pixel of an image, (H, W) int32; every id but 0 is listed in its ``segments_info``."""
    ids = read_segment_ids(entry["pan_seg_file_name"], size)
    check_segments(ids, entry["segments_info"], entry["pan_seg_file_name"])
    return ids


def relabel(ids: np.ndarray, labels: dict[int, int], other: int) -> np.ndarray:
    """Replace every id by its label, and those without one by ``other``; (H, W) int32."""
    values, lengths = _runs(ids)
    found = np.array([labels.get(key, other) for key in values.tolist()], dtype=np.int32)
    return np.repeat(found, lengths).reshape(ids.shape)


def semantic_annotations(labels: np.ndarray, ignore: int) -> list[Json]:
    """One object per class that an image shows: its number, and its pixels as an RLE."""
    masks = _masks(labels)
    return [{"category_id": k, "segmentation": masks(k)} for k in labels_present(labels) if k != ignore]


def panoptic_annotations(ids: np.ndarray, segments: Sequence[Json]) -> list[Json]:
    """The segments of an image as objects with RLEs; a segment without pixels has an empty one."""
    masks = _masks(ids)
    return [
        {"category_id": each["category_id"], "iscrowd": each.get("iscrowd", 0), "segmentation": masks(each["id"])}
        for each in segments
    ]


def labeled_objects(entry: Json, *, num_classes: int, ignore: int) -> Sequence[Json]:
    """The annotations of an image of any dataset: the segments of a panoptic one, each class of a semantic one."""
    if "segments_info" in entry:
        return panoptic_annotations(read_segments(entry), entry["segments_info"])
    if "sem_seg_file_name" in entry and "annotations" not in entry:
        return semantic_annotations(read_semantic(entry, num_classes=num_classes, ignore=ignore), ignore)
    return entry.get("annotations", [])


def _masks(values: np.ndarray) -> Callable[[int], Json]:
    by_column = np.asfortranarray(values)
    return lambda value: mask_util.encode((by_column == value).view(np.uint8))
