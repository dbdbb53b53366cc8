"""YOLO's label files: a line for each object, a class number and a box or a polygon in parts of the image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from dimaskdino.data.conversion.labels import Images, LabeledObject, Labels, Problems, box_around, read_text
from dimaskdino.errors import DatasetError


def class_names(source: Path) -> list[str]:
    """The names in data.yaml or classes.txt, by class number; raises DatasetError if neither has a list of them."""
    for path in sorted([*source.glob("*.yaml"), *source.glob("*.yml")]):
        try:
            content = yaml.safe_load(read_text(path))
        except (ValueError, yaml.YAMLError) as error:
            raise DatasetError(f"{path} cannot be read ({' '.join(str(error).split())}).") from error
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict):
            names = [names.get(number) for number in range(len(names))]
        if isinstance(names, list) and all(isinstance(name, str | int) for name in names):
            return [str(name) for name in names]
    path = source / "classes.txt"
    if path.is_file():
        try:
            names = [line.strip() for line in read_text(path).rstrip().splitlines()]
        except ValueError as error:
            raise DatasetError(f"{path} {error}; save it again.") from error
        if "" in names:
            raise DatasetError(f"{path}, line {names.index('') + 1} is empty, but lines count classes; name the class.")
        return names
    raise DatasetError(
        f"{source} has neither a data.yaml with names nor a classes.txt; add one, or give the names with --classes."
    )


def read_yolo(source: Path, images: Images, classes: Sequence[str], problems: Problems) -> Labels:
    """Every image below the folder of images, with the objects of its label file.

    The file has the image's name with the ending .txt. It lies where "labels" stands for "images" in the path, beside
    the image, or in ``source`` or its folder "labels". An image without a file, or with an empty one, is background.
    """
    names = list(classes) or class_names(source)
    found = []
    used: dict[Path, Path] = {}  # label file -> its image
    for path in images.paths:
        file = next((each for each in _candidates(path, source, images.root) if each.is_file()), None)
        if file is None:
            problems.notes["images without a label file"] += 1
        elif file in used:
            problems.add(str(file), f"it is the label file of {used[file]} and of {path}; rename one of them")
            continue
        else:
            used[file] = path
        if image := images.read(path, problems):
            found.extend(problems.filled(image, _objects(file, image.size, names, problems) if file else ()))
    if not used:
        raise DatasetError(f"None of the {len(images.paths)} images below {images.root} has a label file .txt.")
    beside = {file for folder in {each.parent for each in used} for file in folder.glob("*.txt")}
    problems.notes["label files without an image"] += sum(each.name != "classes.txt" for each in beside - {*used})
    return found, names


def _candidates(image: Path, source: Path, root: Path) -> list[Path]:
    relative = image.relative_to(root).with_suffix(".txt")
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return [Path(*parts), image.with_suffix(".txt"), source / "labels" / relative, source / relative]


def _objects(file: Path, size: tuple[int, int], names: list[str], problems: Problems) -> Iterator[LabeledObject]:
    with problems.at(str(file)):
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            where = f"{file}, line {number}"
            with problems.at(where):
                if line.strip():
                    yield _object(line.split(), where, size, names, problems)


def _object(words: list[str], where: str, size: tuple[int, int], names: list[str], problems: Problems) -> LabeledObject:
    try:
        index, numbers = float(words[0]), np.array([float(word) for word in words[1:]])
    except ValueError:
        raise ValueError(f"{' '.join(words):.60} is not a row of numbers") from None
    if not index.is_integer() or not 0 <= index < len(names):
        raise ValueError(f"class {words[0]} is unknown; there are {len(names)}, 0 to {len(names) - 1}")
    scale = np.array(size[::-1], dtype=float)
    if len(numbers) == 5:
        problems.notes["scores after a box, left out"] += 1
        numbers = numbers[:4]
    if len(numbers) == 4:
        center, extent = numbers[:2] * scale, numbers[2:] * scale
        if (extent < 0).any():
            raise ValueError("its width or height is negative")
        return LabeledObject(names[int(index)], where, box_around(np.stack((center - extent / 2, center + extent / 2))))
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers after the class; a box has 4, a polygon at least 3 pairs")
    return LabeledObject(names[int(index)], where, polygons=[(numbers.reshape(-1, 2) * scale).ravel().tolist()])
