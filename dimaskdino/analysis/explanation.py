"""What became of every object of a dataset, stage by stage, and the sums of it."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.analysis.missed import Limits, Outcome, Verdict, judge
from dimaskdino.analysis.stages import SeenStage, TrueObjects, selections_of
from dimaskdino.structures.stages import Stage

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}  # COCO's, px^2


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What became of an object."""

    image_id: Any  # of its image
    index: int  # of the object among those of the image
    label: int  # its class index
    area: float  # of its mask, or of its box, px^2
    # by the name of the stage, in the order of the stages; the last one is the model's result
    verdicts: Mapping[str, Verdict]
    # score for its class, box IoU and mask IoU (nan without masks) of the query of the last verdict
    nearest: tuple[float, float, float] | None

    @property
    def last(self) -> Verdict:
        """What became of it in the end."""
        return list(self.verdicts.values())[-1]


def explain_image(stages: Sequence[SeenStage], truth: TrueObjects, limits: Limits) -> list[Explained]:
    """Explain the objects of an image."""
    selections = [each.view for each in selections_of(stages)]
    by_stage = {
        each.stage.name: judge(
            each.view, truth.classes, limits, selections=selections if each.stage.is_refined else selections[:1]
        )
        for each in stages
    }
    areas = truth.boxes[:, 2:].prod(1) if truth.rles is None else mask_util.area(list(truth.rles))
    last = list(by_stage.values())[-1]
    return [
        Explained(
            image_id=truth.image_id,
            index=index,
            label=label,
            area=float(areas[index]),
            verdicts={name: verdicts[index] for name, verdicts in by_stage.items()},
            nearest=_nearest(stages[-1], last[index].query, index, label),
        )
        for index, label in enumerate(truth.classes)
    ]


def _nearest(stage: SeenStage, query: int | None, index: int, label: int) -> tuple[float, float, float] | None:
    if query is None:
        return None
    view = stage.view
    mask_iou = np.nan if view.mask_iou is None else float(view.mask_iou[query, index])
    return float(view.scores[query, label] * view.quality[query]), float(view.box_iou[query, index]), mask_iou


def by_stage(explained: Sequence[Explained]) -> dict[str, Counter[Outcome]]:
    """How often each outcome occurs, by the title of the stage."""
    names = explained[0].verdicts if explained else ()
    return {Stage.from_name(name).title: Counter(each.verdicts[name].outcome for each in explained) for name in names}


def by_class(explained: Iterable[Explained], names: Sequence[str]) -> dict[str, Counter[Outcome]]:
    """How often each outcome occurs in the end, by class name, for classes that occur."""
    counts: dict[int, Counter[Outcome]] = {}
    for each in explained:
        counts.setdefault(each.label, Counter())[each.last.outcome] += 1
    return {names[label]: counts[label] for label in sorted(counts)}


def by_size(explained: Sequence[Explained]) -> dict[str, Counter[Outcome]]:
    """How often each outcome occurs in the end, for COCO's size classes."""
    return {
        name: Counter(each.last.outcome for each in explained if low <= each.area < high)
        for name, (low, high) in SIZES.items()
    }


def outcome_table(counts: Mapping[str, Counter[Outcome]], first: str) -> tuple[list[list[Any]], list[str]]:
    """Rows and heads of a table: the name, of what is ``first``, the objects, and how many have which outcome."""
    rows = [[name, count.total(), *(count[outcome] for outcome in Outcome)] for name, count in counts.items()]
    return rows, [first, "objects", *(outcome.value for outcome in Outcome)]


def write_objects(explained: Sequence[Explained], names: Sequence[str], path: Path) -> None:
    """Write a CSV file with a row for each object: what became of it after every stage, and the nearest query."""
    stages = list(explained[0].verdicts) if explained else []
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        heads = ("image_id", "object", "class", "area", "outcome", "query", "score", "box_iou", "mask_iou")
        rows.writerow([*heads, *stages])
        for each in explained:
            numbers = [""] * 3 if each.nearest is None else [f"{value:.4f}" for value in each.nearest]
            own = [each.image_id, each.index, names[each.label], f"{each.area:.0f}", each.last.outcome.value]
            verdicts = [verdict.outcome.value for verdict in each.verdicts.values()]
            rows.writerow([*own, each.last.query, *numbers, *verdicts])  # None is an empty cell
