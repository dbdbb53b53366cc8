"""What a dataset holds and what is wrong with it, as tables."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from dimaskdino.data.coco_file import Json
from dimaskdino.data.validation.rules import Level, Problem

KEPT = "kept"
_GROUPS = 3  # side by side, for datasets of many classes
_MOST_ROWS = 24
_WIDEST_CELL = 240


class Finding(NamedTuple):
    """One row of a list of problems: what kind of thing is wrong, and where, with its details."""

    kind: str
    where: str


class Counts:
    """Objects by class and by what becomes of them in training: kept, or left out and why.

    Args:
        classes: category id -> class name.
    """

    def __init__(self, classes: Mapping[Any, str]) -> None:
        self.classes = classes
        self.outcomes: dict[Any, Counter[str]] = defaultdict(Counter)
        self.images: Counter[Any] = Counter()
        self.images_with_any = 0
        self._last_image: dict[Any, object] = {}

    def add(self, annotation: Json, problems: Iterable[Problem], image: object) -> None:
        """Count an object; those of an image come one after the other."""
        label = annotation.get("category_id")
        if isinstance(label, list | dict):
            return
        self.outcomes[label][_outcome(annotation, problems)] += 1
        if self._last_image.get(label) is not image:
            self._last_image[label] = image
            self.images[label] += 1
        if self._last_image.get(self) is not image:
            self._last_image[self] = image
            self.images_with_any += 1

    def total(self) -> "Counter[str]":
        """Objects of all classes by outcome."""
        return sum(self.outcomes.values(), Counter())

    def lost(self) -> tuple[int, int]:
        """How many objects, crowd and ignored regions aside, training drops, and how many there are."""
        total = self.total()
        objects = total.total() - total["crowd"] - total["ignored"]
        return objects - total[KEPT], objects

    def lost_classes(self) -> list[str]:
        """Classes that have objects and lose all of them, crowd and ignored regions aside."""
        return [
            name
            for key, name in self.classes.items()
            if not self.outcomes[key][KEPT] and self.outcomes[key].keys() - {KEPT, "crowd", "ignored"}
        ]

    def table(self) -> str:
        """One row a class: objects by outcome, and images with any."""
        total = self.total()
        kinds = [KEPT, *sorted(total.keys() - {KEPT})]
        headers = ["class", *kinds, "images"]
        rows = [
            [name, *(self.outcomes[key][kind] for kind in kinds), self.images[key]]
            for key, name in self.classes.items()
        ]
        rows.append(["all", *(total[kind] for kind in kinds), self.images_with_any])
        if len(rows) > _MOST_ROWS:
            length = -(-len(rows) // _GROUPS)
            rows += [[""] * len(headers)] * (length * _GROUPS - len(rows))
            rows = [sum((rows[index + length * group] for group in range(_GROUPS)), []) for index in range(length)]
            headers = headers * _GROUPS
        return tabulate(rows, headers=headers, tablefmt="github")


def _outcome(annotation: Json, problems: Iterable[Problem]) -> str:
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
    """How often each kind of problem occurs, the most frequent first, and where it occurs first.

    Args:
        findings: kind and place of each.
    """
    counts = Counter(kind for kind, _ in findings)
    first = dict(reversed(findings))
    rows = [[kind, count, textwrap.shorten(first[kind], _WIDEST_CELL)] for kind, count in counts.most_common()]
    return tabulate(rows, headers=["problem", "count", "first"], tablefmt="github")
