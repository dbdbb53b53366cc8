"""A registered dataset as the rules see it, and everything that is wrong with it."""

import difflib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data.catalog import Metadata

from dimaskdino.data.coco_file import annotations_by_image, category_names, column, read_coco
from dimaskdino.data.datasets import data_root
from dimaskdino.data.datasets.registration import is_coco_file, load_dataset, made_metadata, take_over
from dimaskdino.data.validation.report import Counts
from dimaskdino.data.validation.rules import Json, Level, Problem, Rules, has_mask
from dimaskdino.data.validation.screen import look
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import Size

Found = tuple[str, Problem]  # where, and what

PORTION = 5_000  # objects that are looked at together
UNLISTED = "image_id: not among the file's images"


@dataclass(frozen=True)
class Picture:
    """An image of a dataset."""

    path: str
    size: Size | None  # where the dataset gives it
    annotations: Sequence[Json]


@dataclass(frozen=True)
class Dataset:
    """A dataset to check."""

    name: str  # in detectron2's catalog
    source: str  # its annotation file, or "" for a function
    classes: dict[Any, str]  # category id -> class name, in the order of the class indices
    pictures: list[Picture]  # in the order in which they are loaded
    annotated: bool  # whether it has annotations at all
    listing: list[Found]  # what is wrong with its lists, apart from the objects

    def rules(self, *, with_masks: bool, scored: bool) -> Rules:
        """The rules for its annotations."""
        return Rules(categories=self.classes, with_masks=with_masks, scored=scored, in_file=bool(self.source))

    def has_masks(self) -> bool:
        """Whether any of its objects has a mask."""
        return any(has_mask(annotation) for picture in self.pictures for annotation in picture.annotations)

    def counts(self) -> Counts:
        """Its objects, without a look at what is wrong with them."""
        counts = Counts(self.classes)
        for picture in self.pictures:
            counts.add_image((annotation, ()) for annotation in picture.annotations)
        return counts

    def problems(self, rules: Rules, counts: Counts) -> Iterator[Found]:
        """Everything that is wrong with its lists and objects, and where; every object is added to ``counts``."""
        yield from self.listing
        for pictures in _portions(self.pictures):
            found = look([each.annotations for each in pictures], [each.size for each in pictures], rules)
            unclear = np.zeros(len(pictures), dtype=bool)  # images whose objects must all be compared
            unclear[found.of_image[~found.single]] = True
            sure = ~unclear[found.of_image]
            counts.add_kept(found.classes[sure], found.of_image[sure], found.kept[sure])
            for index in np.flatnonzero(np.bincount(found.of_image[~found.kept])).tolist():
                first, end = np.searchsorted(found.of_image, (index, index + 1))
                which = np.flatnonzero(~found.kept[first:end] | unclear[index]).tolist()
                count = counts.add_image if unclear[index] else counts.add_objects
                yield from _problems_of(pictures[index], which, found.fine[first:end], rules, count)
        for name in counts.crowd_alone():
            yield f"class {name!r}", Problem("class: all of its annotations are crowd regions", Level.NOTE)


def _problems_of(
    picture: Picture, which: Sequence[int], passed: np.ndarray, rules: Rules, count: Callable[..., object]
) -> Iterator[Found]:
    """What is wrong with some objects of an image; no rule objects to those that have ``passed``."""
    seen: dict[Any, Json] = {}
    judged: list[tuple[Json, Sequence[Problem]]] = []
    for index in which:
        annotation = picture.annotations[index]
        found = [] if passed[index] else rules.problems(annotation, picture.size)
        judged.append((annotation, found))
        if _is_repeated(annotation, seen):
            found.append(Problem("object: annotated more than once", Level.NOTE))
        if found:
            named = annotation.get("id", f"number {index}, counted from 0,")
            where = f"annotation {named} of {os.path.basename(picture.path)}"
            yield from ((where, problem) for problem in found)
    count(judged)


def _portions(pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """Pictures in lists that are small beside a dataset, and large enough to be looked at together."""
    ends = itertools.accumulate(len(each.annotations) for each in pictures)
    for _, portion in itertools.groupby(zip(ends, pictures, strict=True), key=lambda each: each[0] // PORTION):
        yield [picture for _, picture in portion]


def _is_repeated(annotation: Json, seen: dict[Any, Json]) -> bool:
    """Whether an earlier object of the image has the same class, box and mask; adds this one to ``seen``."""
    try:
        earlier = seen.setdefault((annotation.get("category_id"), tuple(annotation.get("bbox") or ())), annotation)
    except (TypeError, ValueError):  # malformed, or an array
        return False
    return earlier is not annotation and repr(earlier.get("segmentation")) == repr(annotation.get("segmentation"))


def open_dataset(name: str, *, tested: bool) -> Dataset:
    """Read a registered dataset, after making it where it is made on first use.

    If it is ``tested``, its images need ids.

    Raises:
        DatasetError: if it is not registered, or its files are missing or cannot be read.
    """
    metadata = find_dataset(name)
    if is_coco_file(name):
        return open_file(name, metadata.json_file, metadata.image_root, metadata.get("thing_classes"))
    entries = load_dataset(name)
    if not entries:
        raise DatasetError(f"Dataset {name} is empty; check the function that it is registered with.")
    names = metadata.get("thing_classes")
    if names is None:
        raise DatasetError(f"Dataset {name} has no class names; set thing_classes in its metadata.")
    for position, entry in enumerate(entries):
        _check_entry(entry, f"Image number {position}, counted from 0, of dataset {name}")
    pictures = [Picture(entry["file_name"], _size_of(entry), entry.get("annotations", [])) for entry in entries]
    annotated = any("annotations" in entry for entry in entries)
    listing = list(_id_problems(entries)) if tested else []
    return Dataset(name, "", dict(enumerate(names)), pictures, annotated, listing)


def open_file(name: str, json_file: str, image_root: str, registered: list[str] | None = None) -> Dataset:
    """Read a dataset in COCO's format; ``registered`` are the class names that it should have."""
    coco = read_coco(json_file)
    pictures = [
        Picture(os.path.join(image_root, image["file_name"]), (image["height"], image["width"]), annotations)
        for image, annotations in annotations_by_image(coco)
    ]
    listing = list(listing_problems(coco, json_file, None if registered is None else list(registered)))
    return Dataset(name, json_file, category_names(coco), pictures, "annotations" in coco, listing)


def find_dataset(name: str) -> Metadata:
    """The metadata of a registered dataset whose files exist; makes what is made on first use.

    Raises:
        DatasetError: if it is not registered, or its annotation file or image folder is missing.
    """
    registered = DatasetCatalog.list()
    if name not in registered:
        closest = difflib.get_close_matches(name, registered, n=1, cutoff=0)[0]
        raise DatasetError(f"Dataset {name} is not registered; did you mean {closest}?")
    take_over(name)
    metadata = made_metadata(name)
    if is_coco_file(name):
        json_file, image_root = Path(metadata.json_file), Path(metadata.image_root)
        missing = "" if image_root.is_dir() else f"image folder {image_root}"
        missing = missing if json_file.is_file() else f"annotation file {json_file}"
        if missing:
            root, hint = data_root(), "correct the paths that the dataset is registered with."
            if json_file.is_relative_to(root) and image_root.is_relative_to(root):
                hint = (
                    f"set DETECTRON2_DATASETS (now {root}) to the folder that holds {json_file.relative_to(root)} and "
                    f"{image_root.relative_to(root)}/ (layouts: datasets/README.md)."
                )
            raise DatasetError(f"Dataset {name}: {missing} does not exist; {hint}")
    return metadata


def _check_entry(entry: Json, where: str) -> None:
    """Refuse an image of a function that no other check could read."""
    if not isinstance(entry.get("file_name"), str):
        raise DatasetError(f"{where} has the file_name {entry.get('file_name')!r:.40}; give its path as text.")
    where = f"{where} ({entry['file_name']})"
    for key in ("height", "width"):
        value = entry.get(key, 1)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise DatasetError(f"{where} has the {key} {value!r:.40}; give it in whole pixels.")
    annotations = entry.get("annotations", [])
    if not (isinstance(annotations, list) and all(isinstance(annotation, dict) for annotation in annotations)):
        raise DatasetError(f"{where} has annotations that are not a list of dictionaries; leave the key out for none.")


def _size_of(entry: Json) -> Size | None:
    return (int(entry["height"]), int(entry["width"])) if entry.keys() >= {"height", "width"} else None


def _id_problems(entries: list[Json]) -> Iterator[Found]:
    """Images of a function that evaluation could not tell apart or scale; training needs neither ids nor sizes."""
    first: dict[Any, str] = {}
    for entry in entries:
        value = entry.get("image_id")
        where, detail = entry["file_name"], f"{value!r:.40}"
        if not isinstance(value, int | str):
            yield where, Problem("image_id: not a number or text", Level.REFUSED, detail, "give each image one")
        elif (other := first.setdefault(value, where)) != where:
            both = f"{other} and {where}"
            yield both, Problem("image_id: used more than once", Level.REFUSED, detail, "give each its own")
        if _size_of(entry) is None:
            remedy = "give height and width, which evaluation needs"
            yield where, Problem("size: missing", Level.REFUSED, "", remedy)


def listing_problems(coco: Json, path: str, registered: list[str] | None) -> Iterator[Found]:
    """What is wrong with the lists of a COCO file, registered with these classes if any, apart from its objects."""
    for key in ("id", "name"):
        for value, first, _ in _repeated(coco["categories"], key):
            problem = Problem(f"category {key}: used more than once", Level.REFUSED, "", "give each category its own")
            yield f"category {key} {value!r}, first of {first['name']!r}", problem
    names = [category["name"] for category in sorted(coco["categories"], key=lambda category: category["id"])]
    if registered is not None and names != registered:
        yield os.path.basename(path), _class_problem(names, registered)
    for value, first, second in _repeated(coco["images"], "id"):
        remedy = "number the images anew, as after merging files, or labels land on other images"
        both = f"{first['file_name']} and {second['file_name']}"
        yield f"image id {value!r} of {both}", Problem("image id: used more than once", Level.REFUSED, "", remedy)
    for value, _, _ in _repeated(coco["images"], "file_name", os.path.normpath):
        yield value, Problem("image file_name: listed more than once", Level.NOTE)
    annotations = coco.get("annotations", [])
    # COCO 2014's minival files list some annotations twice, which detectron2 lets pass.
    level = Level.NOTE if "minival" in path else Level.REFUSED
    for value, _, _ in _repeated(annotations, "id"):
        problem = Problem("annotation id: used more than once", level, "", "number the annotations anew")
        yield f"annotation {value}", problem
    yield from _unlisted(annotations, {image["id"] for image in coco["images"]})


def _unlisted(annotations: Sequence[Json], images: set[Any]) -> Iterator[Found]:
    """Annotations of images that the file does not list."""
    as_text, ids = None, column(annotations, "id")
    for index, image_id in enumerate(column(annotations, "image_id").tolist()):
        if image_id in images:
            continue
        as_text = {str(value) for value in images} if as_text is None else as_text
        where = f"annotation {ids[index]} of image id {image_id!r:.40}"
        if str(image_id) in as_text:
            remedy = "write ids of images and image_id both as numbers or both as text"
            yield where, Problem("image_id: the id is of another type", Level.REFUSED, f"{image_id!r:.40}", remedy)
        else:
            yield where, Problem(UNLISTED, Level.NOTE)


def _class_problem(names: list[str], registered: list[str]) -> Problem:
    index = next((i for i, pair in enumerate(zip(names, registered, strict=False)) if len({*pair}) > 1), None)
    if index is None:
        detail = f"{len(names)} categories, registered with {len(registered)} classes"
    else:
        detail = f"class {index} is {names[index]!r:.40}, registered as {registered[index]!r:.40}"
    remedy = "register this file under a name of its own"
    return Problem("categories: not the registered classes", Level.REFUSED, detail, remedy)


def _repeated(
    entries: Sequence[Json], key: str, plain: Callable[[Any], Any] | None = None
) -> Iterator[tuple[Any, Json, Json]]:
    """Every value of ``key``, or what ``plain`` makes of it, that occurs again, with its first and its next entry."""
    values = column(entries, key)
    values = values if plain is None else np.fromiter(map(plain, values), dtype=object)
    if len({*values}) == len(values) if values.dtype == object else np.diff(np.sort(values)).all():
        return
    first: dict[Any, Json] = {}
    again: dict[Any, Json] = {}
    for value, entry in zip(values.tolist(), entries, strict=True):
        if first.setdefault(value, entry) is not entry:
            again.setdefault(value, entry)
    yield from ((value, first[value], entry) for value, entry in again.items())
