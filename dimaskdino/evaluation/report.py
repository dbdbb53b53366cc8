"""Scores as files and tables, and by stage."""

import csv
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from dimaskdino.structures.stages import Stage

logger = logging.getLogger(__name__)

Results = Mapping[str, Mapping[str, float]]

# What results hold by task, and what the task is called in tables.
TASK_NAMES = {"bbox": "box", "segm": "mask"}
# The metric of the table by stage for the other tasks.
_SEGMENTATION = {"panoptic_seg": "PQ", "sem_seg": "mIoU"}
_GAP = "gap"


def coco_table(results: Results) -> str:
    """AP (percent) by IoU threshold and object size, a row for each of boxes and masks that was scored."""
    tasks = _tasks(results)
    metrics = [key for key in results[tasks[0]] if not key.startswith("AP-")]
    rows = [[TASK_NAMES[task]] + [results[task][metric] for metric in metrics] for task in tasks]
    return _table(rows, ["", *metrics])


def class_table(results: Results) -> str:
    """AP (percent) by class, a column for each of boxes and masks that was scored."""
    tasks = _tasks(results)
    names = [key for key in results[tasks[0]] if key.startswith("AP-")]
    rows = [[name.removeprefix("AP-")] + [results[task][name] for task in tasks] for name in names]
    return _table(rows, ["class", *(f"{TASK_NAMES[task]} AP" for task in tasks)])


def panoptic_table(scores: Mapping[str, float]) -> str:
    """PQ, SQ and RQ (percent) of all classes, of things, and of stuff, then of each class."""
    metrics = ("PQ", "SQ", "RQ")
    rows = [
        [group, *(scores[f"{metric}{ending}"] for metric in metrics)]
        for group, ending in (("all", ""), ("things", "_th"), ("stuff", "_st"))
    ]
    names = [key.removeprefix("PQ-") for key in scores if key.startswith("PQ-")]
    of_classes = [[name, *(scores[f"{metric}-{name}"] for metric in metrics)] for name in names]
    return f"{_table(rows, ['', *metrics])}\n\n{_table(of_classes, ['class', *metrics])}"


def semantic_table(scores: Mapping[str, float]) -> str:
    """Mean and frequency-weighted IoU, mean and pixel accuracy (percent), then IoU and accuracy of each class."""
    metrics = [key for key in scores if "-" not in key]
    names = [key.removeprefix("IoU-") for key in scores if key.startswith("IoU-")]
    of_classes = [[name, scores[f"IoU-{name}"], scores[f"ACC-{name}"]] for name in names]
    means = _table([[scores[metric] for metric in metrics]], metrics)
    return f"{means}\n\n{_table(of_classes, ['class', 'IoU', 'accuracy'])}"


def stage_row(stage: str, results: Results) -> dict[str, Any]:
    """One stage's line of the table, as far as scored (box AP, mask AP, their difference, PQ, mIoU), and all scores."""
    row = {f"{TASK_NAMES[task]}_AP": results[task]["AP"] for task in _tasks(results)}
    if len(row) == len(TASK_NAMES):
        row[_GAP] = row["box_AP"] - row["mask_AP"]
    row |= {metric: results[task][metric] for task, metric in _SEGMENTATION.items() if task in results}
    return {"stage": stage, **row, **results}


def stage_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of the table by stage that ``rows`` have: ``box_AP``, ``mask_AP``, ``gap``, ``PQ``, and ``mIoU``."""
    known = [*(f"{name}_AP" for name in TASK_NAMES.values()), _GAP, *_SEGMENTATION.values()]
    return [column for column in known if any(column in row for row in rows)]


def layer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """AP (percent) of boxes and masks by stage, and box minus mask where both were scored; PQ and mIoU likewise."""
    columns = stage_columns(rows)
    cells = [[row["stage"], Stage.from_name(row["stage"]).title, *map(row.get, columns)] for row in rows]
    heads = ["stage", "after", *("box - mask" if column == _GAP else column.replace("_", " ") for column in columns)]
    formats = ("", "", *("+.1f" if column == _GAP else ".1f" for column in columns))
    return _table(cells, heads, formats)


def run_table(rows: Mapping[str, Results]) -> str:
    """AP, AP50 and AP75 (percent) of boxes and masks, a row for each run by its name."""
    tasks = [task for task in TASK_NAMES if any(task in results for results in rows.values())]
    columns = [(task, metric) for task in tasks for metric in ("AP", "AP50", "AP75")]
    cells = [[name, *(results.get(task, {}).get(metric) for task, metric in columns)] for name, results in rows.items()]
    return _table(cells, ["", *(f"{TASK_NAMES[task]} {metric}" for task, metric in columns)])


def write_results(results: Any, path: str) -> None:
    """Write nested results as JSON, with null for what cannot be measured (nan)."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(_without_nan(results), file, indent=2)


def _table(rows: Sequence[Sequence[Any]], heads: Sequence[str], formats: str | Sequence[str] = ".1f") -> str:
    """A table in which a dash stands for what cannot be measured: nan here, and null in JSON."""
    cells = [[None if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows]
    return tabulate(cells, headers=heads, floatfmt=formats, missingval="–", tablefmt="github")


def _tasks(results: Results) -> list[str]:
    return [task for task in TASK_NAMES if task in results]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class LayerwiseEvaluator(DatasetEvaluator):
    """Evaluates the final results and those of every stage in the model's ``layers`` in one pass over the images.

    Writes ``layers.json`` and ``layers.csv`` next to the final stage's results. Each stage gets an evaluator from
    ``for_stage`` of the final one, read by ``score``.
    """

    def __init__(self, *, final: Any, output_dir: str) -> None:
        self._final, self._output_dir = final, output_dir
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._final.reset()
        self._stages: dict[str, Any] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add a batch: the results of every image, and those of its ``layers`` (stage name to results)."""
        self._final.process(inputs, outputs)
        for image, output in zip(inputs, outputs, strict=True):
            for name, results in output["layers"].items():
                self._stage(name).process([image], [results])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The final stage's scores by task, and ``layers``: those of every stage in percent; empty on other processes.

        These are ``<stage>/box_AP``, ``mask_AP`` and ``gap`` (box minus mask), ``PQ``, and ``mIoU``, as far as scored.
        """
        results = self._final.evaluate()
        # In the model's order; a process that got no image knows none of them.
        names = dict.fromkeys(itertools.chain.from_iterable(comm.all_gather(list(self._stages))))
        rows = [stage_row(name, scores) for name in names if (scores := self._stage(name).score())]
        if not comm.is_main_process():
            return {}
        self._write(rows)
        logger.info("Scores by stage:\n%s", layer_table(rows))
        results["layers"] = {f"{row['stage']}/{key}": row[key] for row in rows for key in stage_columns([row])}
        return results

    def _stage(self, name: str) -> Any:
        if name not in self._stages:
            self._stages[name] = self._final.for_stage(name)
        return self._stages[name]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_results(rows, os.path.join(self._output_dir, "layers.json"))
        with open(os.path.join(self._output_dir, "layers.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, ["stage", *stage_columns(rows)], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
