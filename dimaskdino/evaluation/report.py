"""Results as tables to read and as JSON to process."""

import json
import math
import os
from typing import Any

from tabulate import tabulate

from dimaskdino.structures.stages import Stage

TASKS = ("bbox", "segm")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TASK_NAMES = {"bbox": "box", "segm": "mask"}


def coco_table(results: dict[str, dict[str, float]]) -> str:
    """Box and mask AP (percent) by IoU threshold and object size."""
    rows = [[TASK_NAMES[task]] + [results[task][metric] for metric in METRICS] for task in TASKS]
    return tabulate(rows, headers=["", *METRICS], floatfmt=".1f", tablefmt="github")


def class_table(results: dict[str, dict[str, float]]) -> str:
    """Box and mask AP (percent) by class."""
    names = [key for key in results["bbox"] if key.startswith("AP-")]
    rows = [[name.removeprefix("AP-")] + [results[task][name] for task in TASKS] for name in names]
    return tabulate(rows, headers=["class", "box AP", "mask AP"], floatfmt=".1f", tablefmt="github")


def layer_table(rows: list[dict[str, Any]]) -> str:
    """Box AP, mask AP and box minus mask (percent) by stage.

    Args:
        rows: as :func:`dimaskdino.evaluation.layerwise.stage_row` makes them.
    """
    titles = [Stage.from_name(row["stage"]).title for row in rows]
    cells = [
        [row["stage"], title, row["box_AP"], row["mask_AP"], row["gap"]]
        for row, title in zip(rows, titles, strict=True)
    ]
    headers = ["stage", "after", "box AP", "mask AP", "box - mask"]
    return tabulate(cells, headers=headers, floatfmt=("", "", ".1f", ".1f", "+.1f"), tablefmt="github")


def write_results(results: Any, path: str) -> None:
    """Write nested results as JSON, what cannot be measured (nan) as null."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(_without_nan(results), file, indent=2)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
