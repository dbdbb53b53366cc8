"""Label maps: a PNG for each image, whose values are classes or objects."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from dimaskdino.data.conversion.labels import Images, LabeledImage, LabeledObject, Labels, Problems
from dimaskdino.data.label_maps import labels_present, read_label_map
from dimaskdino.errors import DatasetError


def read_masks(
    source: Path, images: Images, classes: Sequence[str], problems: Problems, *, instances: bool = False
) -> Labels:
    """The images with the label maps of the same names below ``source``; holes and several parts are kept.

    Value 0 is background, 255 is left out. With values that are classes, each connected region of class number v
    (the v-th of ``classes``, counted from 1) is an object. With ``instances``, each value is an object, however many
    parts it has: of the only class, or, where there are several, of class number v // 1000, as in Cityscapes.

    An image without a map is background.
    """
    if not classes:
        raise DatasetError("Label maps hold numbers alone; give the names of the classes 1, 2, ... with --classes.")
    files = {path.relative_to(source).with_suffix("").as_posix(): path for path in sorted(source.rglob("*.png"))}
    found: list[LabeledImage] = []
    used: dict[Path, Path] = {}  # map -> its image
    for path in images.paths:
        image = images.read(path, problems)
        if image is None:
            continue
        objects: Iterable[LabeledObject] = ()
        name = path.relative_to(images.root).with_suffix("").as_posix()
        file = files.get(name) or files.get(path.stem)
        if file is None or file == path:
            problems.notes["images without a label map"] += 1
        elif file in used:
            problems.add(str(file), f"it is the label map of {used[file]} and of {path}; put it in a folder as theirs")
            continue
        else:
            used[file] = path
            objects = _objects(file, image.size, list(classes), instances=instances)
        found += problems.filled(image, objects, str(file))
    if not used:
        raise DatasetError(f"None of the {len(images.paths)} images below {images.root} has a label map in {source}.")
    problems.notes["label maps without an image"] += len({*files.values()} - {*used, *images.paths})
    return found, list(classes)


def _objects(file: Path, size: tuple[int, int], names: list[str], *, instances: bool) -> Iterator[LabeledObject]:
    values = read_label_map(str(file), size)
    for value in labels_present(values):
        if value == 0 or (value == 255 and not instances):
            continue
        number = (1 if len(names) == 1 else value // 1000) if instances else value
        if not 1 <= number <= len(names):
            raise ValueError(f"value {value} is of class {number}, which is unknown; there are {len(names)}, from 1 on")
        where = f"{file}, value {value}"
        for mask in [values == value] if instances else _regions(values == value):
            yield LabeledObject(names[number - 1], where, mask=mask)


def _regions(mask: np.ndarray) -> Iterator[np.ndarray]:
    count, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return (numbers == number for number in range(1, count))
