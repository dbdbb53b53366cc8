"""Labels of other formats as objects of images, and splits that keep the classes in proportion."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.data.coco_file import Json, coco_content
from dimaskdino.data.images import read_header
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import coco_shape

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# How far outside the image a coordinate may lie to be cut: programs round, and people draw to the edge.
SLACK = 0.01


@dataclass(frozen=True)
class LabeledObject:
    """An object of an image, in pixels."""

    label: str  # name of its class
    where: str  # file and line, for messages
    box: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1; None to take that of the mask
    polygons: Sequence[Sequence[float]] = ()  # parts, each [x, y, x, y, ...]
    mask: np.ndarray | None = None  # (H, W) bool of the image, which may have holes; instead of polygons
    extra: Json = field(default_factory=dict)  # further keys of the annotation

    def __post_init__(self) -> None:
        if not self.label.strip():
            raise ValueError("an object without the name of a class")


@dataclass(frozen=True)
class LabeledImage:
    """An image and its objects; without any it is background."""

    file_name: str  # relative to the folder of images, with slashes
    size: tuple[int, int]  # (height, width)
    objects: list[LabeledObject]  # in the order of the label file


Labels = tuple[list[LabeledImage], list[str]]  # images, and the names of their classes


@dataclass
class Problems:
    """What cannot be used: an error at the end, or, with ``skip``, left out and counted."""

    skip: bool = False  # leave it out
    found: list[str] = field(default_factory=list)  # file and line, and what is wrong
    notes: Counter[str] = field(default_factory=Counter)  # what was put right, and how often

    def add(self, where: str, problem: str) -> None:
        """Remember one."""
        self.found.append(f"{where}: {problem}")

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Record the message of a ValueError in the block, and go on after it."""
        try:
            yield
        except ValueError as error:
            self.add(where, str(error))

    def leave_out(self, objects: Sequence[LabeledObject], since: int) -> bool:
        """Whether an image lost all of its objects to the problems after the first ``since``: it is no background."""
        lost = not objects and len(self.found) > since
        self.notes["images left out, as none of their objects can be used"] += lost
        return lost

    def filled(self, image: LabeledImage, objects: Iterable[LabeledObject], where: str = "") -> list[LabeledImage]:
        """The image with objects that are made as they are asked for; nothing if :meth:`leave_out` says so."""
        since, filled = len(self.found), replace(image, objects=[])
        with self.at(where):
            filled.objects.extend(objects)
        return [] if self.leave_out(filled.objects, since) else [filled]

    def check(self) -> None:
        """Raise DatasetError, naming the first, unless they are skipped."""
        if self.found and not self.skip:
            more = f" And {len(self.found) - 1} more problems." if len(self.found) > 1 else ""
            raise DatasetError(f"{self.found[0]}.{more} Correct the files, or leave these out with --skip-bad.")


class Images:
    """The image files below a folder, by path and by name; with ``apply_exif``, sizes are those of upright photos."""

    def __init__(self, root: Path, *, apply_exif: bool = True) -> None:
        if not root.is_dir():
            raise DatasetError(f"The folder of images {root} does not exist; give it with --images.")
        self.root, self.apply_exif = root, apply_exif
        paths = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        self.paths = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
        self._by_name: dict[str, list[Path]] = {}
        self._labels_of: dict[Path, str] = {}
        for path in self.paths:
            for name in {path.name, path.stem, path.relative_to(root).as_posix()}:
                self._by_name.setdefault(name, []).append(path)

    def find(self, name: str) -> Path:
        """The image that a label file calls ``name``, a path or file name; raises ValueError for none or several."""
        plain = name.replace("\\", "/")
        for candidate in (plain, plain.rpartition("/")[2], Path(plain).stem):
            found = self._by_name.get(candidate, [])
            if len(found) == 1:
                return found[0]
            if len(found) > 1:
                raise ValueError(f"{len(found)} images below {self.root} have the name {candidate}")
        raise ValueError(f"image {name} is not below {self.root}")

    def read(self, path: Path, problems: Problems, where: str = "") -> LabeledImage | None:
        """An image of the file's size, without objects; None and a problem if it cannot be, or was already, read."""
        if path in self._labels_of:
            problems.add(where, f"image {path} has labels in {self._labels_of[path]} already; join them")
            return None
        self._labels_of[path] = where
        try:
            size = read_header(str(path), any_depth=True).size(apply_exif=self.apply_exif)
        except DatasetError as error:
            problems.add(str(path), f"it cannot be read as an image ({error.__cause__ or error})")
            return None
        return LabeledImage(path.relative_to(self.root).as_posix(), size, [])


def check_inside(points: np.ndarray, size: tuple[int, int], problems: Problems) -> np.ndarray:
    """Points (n, 2) px, cut to the image where they lie a hair outside; raises ValueError for other points outside."""
    limits = np.array([size[1], size[0]], dtype=float)
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is not a finite number")
    if (points < -SLACK * limits).any() or (points > (1 + SLACK) * limits).any():
        worst = points[np.argmax(np.maximum(-points, points - limits).max(1))]
        raise ValueError(f"({worst[0]:g}, {worst[1]:g}) lies outside the image of {size[1]}x{size[0]} px")
    cut = points.clip(0, limits)
    problems.notes["coordinates a hair outside the image, cut"] += int((cut != points).any(1).sum())
    return cut


def check_names(classes: Sequence[str]) -> None:
    """Raise DatasetError if two classes have one name, by which objects would be joined."""
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise DatasetError(f"Two classes have the name {twice[0]!r}; give each another name.")


def checked(images: Sequence[LabeledImage], problems: Problems) -> list[LabeledImage]:
    """Images whose objects lie inside and cover something; others are problems."""
    kept = []
    for image in images:
        kept += problems.filled(image, _sound(image, problems))
    problems.notes["images without objects (background)"] += sum(not image.objects for image in kept)
    return kept


def _sound(image: LabeledImage, problems: Problems) -> Iterator[LabeledObject]:
    for each in image.objects:
        with problems.at(each.where):
            yield _checked(each, image.size, problems)


def of_classes(images: Sequence[LabeledImage], classes: Sequence[str], problems: Problems) -> Labels:
    """Images and ``classes``, or those that occur; objects of others are problems."""
    if not classes:
        return list(images), sorted({each.label for image in images for each in image.objects})

    def known(objects: Sequence[LabeledObject]) -> Iterator[LabeledObject]:
        for each in objects:
            if each.label in classes:
                yield each
            else:
                problems.add(each.where, f"class {each.label!r} is unknown; there are {', '.join(classes)}")

    return [kept for image in images for kept in problems.filled(image, known(image.objects))], list(classes)


def _checked(item: LabeledObject, size: tuple[int, int], problems: Problems) -> LabeledObject:
    if item.mask is not None:
        if item.mask.shape != size:
            raise ValueError(f"the mask has {item.mask.shape[::-1]} px, the image {size[::-1]} (width, height)")
        if not item.mask.any():
            raise ValueError("the mask is empty")
        return item
    polygons = []
    for polygon in item.polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers; it needs at least three points, two numbers each")
        polygons.append(check_inside(np.reshape(polygon, (-1, 2)).astype(float), size, problems).ravel().tolist())
    if polygons and all(np.linalg.matrix_rank(np.diff(np.reshape(each, (-1, 2)), axis=0)) < 2 for each in polygons):
        raise ValueError("the polygon covers nothing: its points lie on a line")
    box = item.box
    if box is not None:
        left, top, right, bottom = check_inside(np.reshape(box, (2, 2)).astype(float), size, problems).ravel().tolist()
        if not (left < right and top < bottom):
            raise ValueError(f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) covers nothing")
        box = (left, top, right, bottom)
    elif not polygons:
        raise ValueError("neither a box nor a mask")
    return replace(item, box=box, polygons=polygons)


def to_coco(images: Sequence[LabeledImage], classes: Sequence[str]) -> Json:
    """A COCO file's content; ids count from 1 in the order of ``classes`` and ``images``."""
    numbers = {name: number for number, name in enumerate(classes, start=1)}

    def annotation(each: LabeledObject, size: tuple[int, int]) -> Json:
        return {"category_id": numbers[each.label], **_shape(each, size), "iscrowd": 0, **each.extra}

    pairs = (
        (
            {"file_name": image.file_name, "height": image.size[0], "width": image.size[1]},
            [annotation(each, image.size) for each in image.objects],
        )
        for image in images
    )
    return coco_content(pairs, classes)


def _shape(item: LabeledObject, size: tuple[int, int]) -> Json:
    if item.mask is not None:
        return coco_shape(mask_util.encode(np.asfortranarray(item.mask, dtype=np.uint8)))
    box = item.box or box_around(np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in item.polygons]))
    left, top, right, bottom = box
    shape: Json = {"bbox": [_rounded(v) for v in (left, top, right - left, bottom - top)]}
    if not item.polygons:
        return {**shape, "area": _rounded((right - left) * (bottom - top))}
    polygons = [[_rounded(value) for value in polygon] for polygon in item.polygons]
    rle = mask_util.merge(mask_util.frPyObjects(polygons, *size))
    return {**shape, "area": int(mask_util.area(rle)), "segmentation": polygons}


def box_around(points: np.ndarray) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of points (n, 2)."""
    left, top = points.min(0)
    right, bottom = points.max(0)
    return float(left), float(top), float(right), float(bottom)


def _rounded(value: float) -> float:
    return round(float(value), 3)


def read_text(path: Path) -> str:
    """The text of a label file, in UTF-8 with or without a byte order mark; raises ValueError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("is not valid UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def stratified(images: Sequence[LabeledImage], shares: Sequence[float], seed: int) -> list[list[LabeledImage]]:
    """Divide images so that each part has its share of the objects of every class, and of the images without any.

    The images of the rarest class that is left are dealt out first, each to the part that lacks most of that class,
    then most images. The ``shares`` sum up to 1; each part keeps the order of ``images``.

    Source: Sechidis et al., "On the Stratification of Multi-Label Data" (2011).
    """
    labels = [Counter(each.label for each in image.objects) or Counter([""]) for image in images]
    total: Counter[str] = sum(labels, Counter())
    lacks = [{label: share * count for label, count in total.items()} for share in shares]
    room = [share * len(images) for share in shares]
    parts: list[list[int]] = [[] for _ in shares]
    left = set(range(len(images)))
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    while left:
        remaining: Counter[str] = sum((labels[index] for index in left), Counter())
        rarest = min(remaining, key=lambda label: (remaining[label], label))
        for index in [index for index in order if index in left and rarest in labels[index]]:
            part = max(range(len(parts)), key=lambda which: (lacks[which][rarest], room[which], -which))
            parts[part].append(index)
            left.discard(index)
            room[part] -= 1
            for label, count in labels[index].items():
                lacks[part][label] -= count
    return [[images[index] for index in sorted(part)] for part in parts]
