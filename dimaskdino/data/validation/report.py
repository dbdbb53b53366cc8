"""What a dataset holds and what is wrong with it, as tables."""

import contextlib
import textwrap
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from dimaskdino.data.coco_file import Json
from dimaskdino.data.validation.rules import Level, Problem
from dimaskdino.errors import DatasetError

KEPT = "kept"
_GROUPS = 3  # side by side, for datasets of many classes
_MOST_ROWS = 24
_WIDEST_CELL = 240


class Finding(NamedTuple):
    """One row of a list of problems: what kind of thing is wrong, and where, with its details."""

    kind: str
    where: str


def list_all(name: str) -> str:
    """How to list everything that is wrong with a dataset."""
    flags = "--import and --config-file as here, and keys after --keys"
    return f"`python tools/check_dataset.py {name}` lists all (with {flags})."


@contextlib.contextmanager
def saying_how_to_list_all(name: str) -> Iterator[None]:
    """Add :func:`list_all` to an error of the dataset."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{error} {list_all(name)}") from None


class Counts:
    """Objects by class and by what becomes of them in training: kept, or left out and why."""

    def __init__(self, classes: Mapping[Any, str]) -> None:
        self.classes = classes  # name by category id
        self.objects: Counter[tuple[Any, str]] = Counter()  # by category id and outcome
        self.images: Counter[Any] = Counter()  # by category id
        self.images_with_any = 0

    def add_image(self, annotations: Iterable[tuple[Json, Sequence[Problem]]]) -> None:
        """Count the objects of an image, each with its problems."""
        labels = self.add_objects(annotations)
        self.images.update(labels)
        self.images_with_any += bool(labels)

    def add_objects(self, annotations: Iterable[tuple[Json, Sequence[Problem]]]) -> set[Any]:
        """Count objects, but not their images; returns their category ids."""
        labels = set()
        for annotation, problems in annotations:
            label = annotation.get("category_id")
            if not isinstance(label, Hashable):
                continue
            labels.add(label)
            self.objects[label, _outcome(annotation, problems)] += 1
        return labels

    def add_kept(self, classes: np.ndarray, images: np.ndarray, kept: np.ndarray) -> None:
        """Count those objects that are kept, and all of their images, by the numbers (n,) of classes and images."""
        keys = [*self.classes]
        pairs = np.sort(images * len(keys) + classes)
        one_each = pairs[np.diff(pairs, prepend=-1) > 0] % len(keys)
        numbers, having = (np.bincount(each, minlength=len(keys)) for each in (classes[kept], one_each))
        self.objects += Counter({(key, KEPT): number for key, number in zip(keys, numbers.tolist(), strict=True)})
        self.images += Counter(dict(zip(keys, having.tolist(), strict=True)))
        self.images_with_any += len(np.flatnonzero(np.bincount(images)))

    def total(self) -> "Counter[str]":
        """Objects of all classes by outcome."""
        total = Counter[str]()
        for (_, outcome), number in self.objects.items():
            total[outcome] += number
        return total

    def lost(self) -> tuple[int, int]:
        """How many objects, crowd and ignored regions aside, training drops, and how many there are."""
        total = self.total()
        objects = total.total() - total["crowd"] - total["ignored"]
        return objects - total[KEPT], objects

    def lost_classes(self) -> list[str]:
        """Classes that have objects and lose all of them, crowd and ignored regions aside."""
        lost = self.total().keys() - {KEPT, "crowd", "ignored"}
        return [
            name
            for key, name in self.classes.items()
            if not self.objects[key, KEPT] and any(label == key and outcome in lost for label, outcome in self.objects)
        ]

    def crowd_alone(self) -> list[str]:
        """Classes that have crowd or ignored regions, and nothing else."""
        objects = {label for label, outcome in self.objects if outcome not in ("crowd", "ignored")}
        return [name for key, name in self.classes.items() if self.images[key] and key not in objects]

    def table(self) -> str:
        """One row a class: objects by outcome, and images with any."""
        total = self.total()
        kinds = [KEPT, *sorted(total.keys() - {KEPT})]
        headers = ["class", *kinds, "images"]
        rows = [
            [name, *(self.objects[key, kind] for kind in kinds), self.images[key]] for key, name in self.classes.items()
        ]
        rows.append(["all", *(total[kind] for kind in kinds), self.images_with_any])
        if len(rows) > _MOST_ROWS:
            length = -(-len(rows) // _GROUPS)
            rows += [[""] * len(headers)] * (length * _GROUPS - len(rows))
            rows = [sum((rows[index + length * group] for group in range(_GROUPS)), []) for index in range(length)]
            headers = headers * _GROUPS
        return tabulate(rows, headers=headers, tablefmt="github")


def _outcome(annotation: Json, problems: Iterable[Problem]) -> str:
    if not (problems or annotation.get("iscrowd") or annotation.get("ignored")):
        return KEPT
    kind = region_kind(annotation)
    if kind != "objects":
        return kind
    dropped = next((problem.kind for problem in problems if problem.level is not Level.NOTE), None)
    return KEPT if dropped is None else dropped.split(": ")[-1]


def region_kind(annotation: Json) -> str:
    """Whether an annotation is one of the ``objects``, a ``crowd`` region or an ``ignored`` region."""
    if annotation.get("ignored"):
        return "ignored"
    return "crowd" if annotation.get("iscrowd") else "objects"


def problem_table(findings: Sequence[tuple[str, str]]) -> str:
    """How often each kind of problem (kind, place) occurs, the most frequent first, and where it occurs first."""
    counts = Counter(kind for kind, _ in findings)
    first = dict(reversed(findings))
    rows = [[kind, count, textwrap.shorten(first[kind], _WIDEST_CELL)] for kind, count in counts.most_common()]
    return tabulate(rows, headers=["problem", "count", "first"], tablefmt="github")
