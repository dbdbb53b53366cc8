"""BDD100K instance segmentation (bdd100k_ins_seg_train and _val), and where its images and official labels lie."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from dimaskdino.data.datasets.registration import SPLITS, is_registered_at, register_coco_format
from dimaskdino.errors import DatasetError

# In the order of the category ids 1 to 8 of bitmasks and of the COCO file.
CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
SOURCES = ("bitmasks", "rles", "polygons")
IMAGE_SUFFIXES = (".jpg", ".png")
Frame = dict[str, Any]
Finding = tuple[str, str]  # what kind of thing was left out or strange, and where


def annotation_file(folder: Path, split: str) -> Path:
    """Where datasets/prepare_bdd100k.py puts the COCO JSON of a split inside the folder ``bdd100k``."""
    return folder / "annotations" / f"bdd100k_ins_seg_{split}.json"


def image_folder(folder: Path, split: str) -> Path:
    """Where the images of a split lie inside the folder ``bdd100k``."""
    return folder / "images" / "10k" / split


def register_bdd100k(root: Path) -> None:
    """Register bdd100k_ins_seg_train and bdd100k_ins_seg_val under ``root``, the folder that holds ``bdd100k/``."""
    folder = root / "bdd100k"
    for split in SPLITS:
        name, json_file = f"bdd100k_ins_seg_{split}", annotation_file(folder, split)
        if not is_registered_at(name, json_file):
            register_coco_format(
                name,
                json_file,
                image_folder(folder, split),
                list(CLASSES),
                partial(_check_prepared, name, json_file, root),
                thing_dataset_id_to_contiguous_id={index + 1: index for index in range(len(CLASSES))},
            )


def _check_prepared(name: str, json_file: Path, root: Path) -> None:
    if not json_file.is_file():
        raise DatasetError(
            f"Dataset {name}: annotation file {json_file} does not exist; make it with `python "
            f"datasets/prepare_bdd100k.py --root {root}`, or set DETECTRON2_DATASETS (now {root}) to the folder that "
            "holds bdd100k/ (layout: datasets/README.md)."
        )


class Task(NamedTuple):
    """One image to convert."""

    image: str  # its path
    labels: str | Frame  # path of its bitmask, or its Scalabel frame
    key: str  # changes with the image and its labels


def find_tasks(folder: Path, split: str, source: str) -> tuple[list[Task], list[Finding]]:
    """Every image of a split that has labels, by name; and the images and labels that lack the other or occur twice.

    Raises:
        DatasetError: if a folder or label file is missing or malformed.
    """
    images = image_folder(folder, split)
    _require(images.is_dir(), "Image folder", images)
    problems: list[Finding] = []
    image_of = _images(images, problems)
    labels_of = _bitmasks(folder, split) if source == "bitmasks" else _frames(folder, split, source, problems)
    for stem in sorted(image_of.keys() - labels_of.keys()):
        problems.append((f"image left out: it has no labels in {source}", image_of[stem].name))
    for stem in sorted(labels_of.keys() - image_of.keys()):
        problems.append(("labels left out: there is no such image", stem))
    stems = sorted(image_of.keys() & labels_of.keys())
    return [_task(image_of[stem], labels_of[stem]) for stem in stems], problems


def _task(image: Path, labels: str | Frame) -> Task:
    files, frame = [image], 0
    if isinstance(labels, str):
        files.append(Path(labels))
    else:
        frame = crc32(json.dumps(labels, sort_keys=True).encode())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Task(str(image), labels, f"{stats} {frame}")


def _images(folder: Path, problems: list[Finding]) -> dict[str, Path]:
    """Images by stem, as labels name them; of several with one stem, the first by name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and found.setdefault(path.stem, path) is not path:
            problems.append(("image left out: another one differs only in the suffix", path.name))
    return found


def _bitmasks(folder: Path, split: str) -> dict[str, str]:
    bitmasks = folder / "labels" / "ins_seg" / "bitmasks" / split
    _require(bitmasks.is_dir(), "Bitmask folder", bitmasks)
    return {path.stem: str(path) for path in bitmasks.glob("*.png")}


def _frames(folder: Path, split: str, source: str, problems: list[Finding]) -> dict[str, Frame]:
    path = folder / "labels" / "ins_seg" / source / f"ins_seg_{split}.json"
    _require(path.is_file(), "Label file", path)
    try:
        content = json.loads(path.read_bytes())
        frames: dict[str, Frame] = {}
        for frame in content["frames"] if isinstance(content, dict) else content:
            _check_labels(frame)
            if frames.setdefault(Path(frame["name"]).stem, frame) is not frame:
                problems.append(("labels left out: their image is listed again", frame["name"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"Label file {path} is not in Scalabel's format ({type(error).__name__}: {error}); it needs frames with a "
            "name and labels: unpack the official file again."
        ) from error
    return frames


def _check_labels(frame: Frame) -> None:
    for label in frame.get("labels") or ():
        if not isinstance(label, dict) or not isinstance(label.get("category", ""), str):
            raise TypeError(f"a label of {frame['name']} is {label!r:.60}")
        for key, kind in (("attributes", dict), ("poly2d", list)):
            if label.get(key) and not isinstance(label[key], kind):
                raise TypeError(f"{key} of a label of {frame['name']} is {label[key]!r:.60}")


def _require(found: bool, kind: str, path: Path) -> None:
    if not found:
        raise DatasetError(
            f"{kind} {path} does not exist; the layout is in datasets/README.md, and --source {{{','.join(SOURCES)}}} "
            "chooses among the official labels."
        )
