"""What two modules do, whether they need each other, and how much of a difference is due to the choice of images."""

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, variance

from detectron2.data import MetadataCatalog
from scipy import stats
from tabulate import tabulate

from dimaskdino.data.datasets import register_all
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.coco import CocoEvaluator
from dimaskdino.evaluation.segmentation import register_things
from dimaskdino.reproduction.runs import Run
from dimaskdino.reproduction.tables import DATASET_NAMES, Table, metric_name

logger = logging.getLogger(__name__)

Interval = tuple[float, float]
_TASKS = {"bbox/AP": "bbox", "segm/AP": "segm"}
CONFIDENCE = 0.95
NOT_THERE = "–"


def ap_interval(first: Run, other: Run, metric: str) -> Interval | None:
    """The 95% interval of AP of ``other`` minus AP of ``first``, in percent, over the images of the test set.

    None for another metric than box or mask AP, or where predictions or the dataset are not on this machine.
    """
    files = [run.folder / "inference" / "coco_instances_results.json" for run in (first, other)]
    if metric not in _TASKS or not all(file.is_file() for file in files):
        return None
    try:
        before, after = (json.loads(file.read_bytes()) for file in files)
        return _evaluator(other).ap_difference(before, after, _TASKS[metric])
    except DatasetError as error:
        logger.warning("No interval of %s: %s", other.name, error)
        return None


def _evaluator(run: Run) -> CocoEvaluator:
    cfg = run.cfg.clone()
    cfg.OUTPUT_DIR = str(run.folder)
    register_all(cfg=cfg)
    name = cfg.DATASETS.TEST[0]
    if MetadataCatalog.get(name).get("evaluator_type") == "coco_panoptic_seg":
        name, _ = register_things(name)
    return CocoEvaluator(dataset_name=name, output_dir=str(run.folder / "inference"))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One effect on one metric."""

    name: str  # "DI", "BATO", or "DI x BATO"
    metric: str  # of the table
    ours: float | None  # in points; None where a run is missing
    margin: float | None  # half of the 95% interval over seeds; None with one seed a row
    # of the paper's numbers, which have no interval, on its smallest dataset if it has none on ours
    paper: float | None


def effects(table: Table, dataset: str, runs: Mapping[str, Sequence[Run]]) -> list[Effect]:
    """The effects on each metric: of the first module, of the second one, and their interaction.

    A main effect is what a module adds on average over the other one being off and on. The interaction is what the
    first one adds beside the second one, minus what it adds alone.

    The table has four rows whose labels are "yes" or "no" for each of two modules.
    """
    found = []
    for column, metric in enumerate(table.metrics):
        cells: list[list[float]] = []
        for row in table.rows:
            values = [run.results(table)[column] for run in runs[row.experiment]]
            cells.append([value for value in values if value is not None])
        of_paper = [row.paper.get(_paper_dataset(table, dataset)) for row in table.rows]
        papers = [[values[column]] if values and values[column] is not None else [] for values in of_paper]
        for name, weights in _contrasts(table).items():
            ours, margin = contrast(cells, weights)
            paper, _ = contrast(papers, weights)  # type: ignore[arg-type]
            found.append(Effect(name=name, metric=metric, ours=ours, margin=margin, paper=paper))
    return found


def _paper_dataset(table: Table, dataset: str) -> str:
    return dataset if table.has_paper_values(dataset) else table.reference_dataset


def _contrasts(table: Table) -> dict[str, list[float]]:
    signs = [[1 if label == "yes" else -1 for label in row.labels] for row in table.rows]
    first, second = table.label_names
    return {
        first: [one / 2 for one, _ in signs],
        second: [other / 2 for _, other in signs],
        f"{first} x {second}": [float(one * other) for one, other in signs],
    }


def contrast(cells: Sequence[Sequence[float]], weights: Sequence[float]) -> tuple[float | None, float | None]:
    """A weighted sum of the means of cells, and half of its 95% interval.

    Returns:
        The sum, None if a cell is empty; and by Student's t with the variance within the cells pooled, None if no cell
        has two measurements.
    """
    if not all(cells):
        return None, None
    value = sum(weight * mean(cell) for weight, cell in zip(weights, cells, strict=True))
    freedom = sum(len(cell) - 1 for cell in cells)
    if not freedom:
        return value, None
    pooled = sum((len(cell) - 1) * variance(cell) for cell in cells if len(cell) > 1) / freedom
    error = math.sqrt(pooled * sum(weight**2 / len(cell) for weight, cell in zip(weights, cells, strict=True)))
    return value, float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error


def effects_markdown(table: Table, dataset: str, found: Sequence[Effect]) -> str:
    """The effects with what they mean."""
    body = [
        [effect.name, metric_name(effect.metric), _signed(effect.ours), _interval(effect), _signed(effect.paper)]
        for effect in found
    ]
    source = _paper_dataset(table, dataset)
    paper = "paper" if source == dataset else f"paper, {DATASET_NAMES[source]}"
    first, second = table.label_names
    meaning = (
        f"In points. A main effect is what a module adds on average over the other one being off and on; {first} x "
        f"{second} is what {first} adds beside {second}, minus what it adds alone. The interval is over seeds "
        "(--seeds); one that holds 0 shows no effect."
    )
    heads = ["effect", "on", "ours", "95% interval", paper]
    text = tabulate(body, headers=heads, tablefmt="github", disable_numparse=True)
    return f"### {table.heading(dataset)}\n\n{meaning}\n\n{text}\n"


def effects_csv(table: Table, dataset: str, found: Sequence[Effect]) -> str:
    """The effects with a line for each; cells without a number are empty."""
    lines = [["table", "dataset", "effect", "on", "ours", "margin", "paper"]]
    for effect in found:
        numbers = ["" if value is None else f"{value:.2f}" for value in (effect.ours, effect.margin, effect.paper)]
        lines.append([table.name, dataset, effect.name, metric_name(effect.metric), *numbers])
    return csv_text(lines)


def csv_text(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _signed(value: float | None) -> str:
    return NOT_THERE if value is None else f"{value:+.2f}"


def _interval(effect: Effect) -> str:
    if effect.ours is None or effect.margin is None:
        return NOT_THERE
    return f"[{effect.ours - effect.margin:+.2f}, {effect.ours + effect.margin:+.2f}]"
