"""What a dataset holds and what is wrong with it, as tables to read."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from tabulate import tabulate


class Problem(NamedTuple):
    """One thing that is wrong: what kind of thing, and where, with its details."""

    kind: str
    where: str


def problem_table(problems: list[Problem]) -> str:
    """How often each kind of problem was met, the most frequent first, and where it was met first."""
    counts = Counter(problem.kind for problem in problems)
    first = {problem.kind: problem.where for problem in reversed(problems)}
    rows = [[kind, count, first[kind]] for kind, count in counts.most_common()]
    return tabulate(rows, headers=["problem", "count", "first"], tablefmt="github")


def count_table(coco: dict[str, Any]) -> str:
    """Objects, crowd regions, ignored regions and images with any of them, by class.

    Args:
        coco: a dataset in COCO's format; ignored regions are the crowd regions that also say ``"ignored": 1``. Images
            that annotations name and ``images`` does not list are not counted.
    """
    listed = {image["id"] for image in coco["images"]}
    kinds: dict[int, Counter[str]] = defaultdict(Counter)
    images: dict[int, set[int]] = defaultdict(set)
    for annotation in coco["annotations"]:
        label = annotation.get("category_id")
        kinds[label][region_kind(annotation)] += 1
        if annotation.get("image_id") in listed:
            images[label].add(annotation["image_id"])
    rows = [
        [category["name"], *(kinds[category["id"]][kind] for kind in _KINDS), len(images[category["id"]])]
        for category in sorted(coco["categories"], key=lambda category: category["id"])
    ]
    with_any = set().union(*images.values())
    rows.append(["all", *(sum(count[kind] for count in kinds.values()) for kind in _KINDS), len(with_any)])
    empty = sum(image["id"] not in with_any for image in coco["images"])
    table = tabulate(rows, headers=["class", *_KINDS, "images"], tablefmt="github")
    return f"{table}\n\n{len(coco['images'])} images, {empty} of them without any annotation"


_KINDS = ("objects", "crowd", "ignored")


def region_kind(annotation: dict[str, Any]) -> str:
    """Whether a COCO annotation is one of the ``objects``, a ``crowd`` region or an ``ignored`` region."""
    if annotation.get("ignored"):
        return "ignored"
    return "crowd" if annotation.get("iscrowd") else "objects"
