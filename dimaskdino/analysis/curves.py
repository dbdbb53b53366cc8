"""Losses and scores of runs over their iterations, with the range over seeds, as a picture."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dimaskdino.config import flatten
from dimaskdino.engine.run_folder import CONFIG_FILE
from dimaskdino.engine.writers import FREE_KEYS, METRICS_FILE, records
from dimaskdino.errors import UserError
from dimaskdino.structures import is_final_loss

# Shown unless other metrics are asked for: scores, and the losses of the last stage and of the validation.
SCORES = ("bbox/AP", "segm/AP", "panoptic_seg/PQ", "sem_seg/mIoU")
VALIDATION = "loss/"
_COLUMNS = 3
# Okabe and Ito's colors, which most color-blind people tell apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

Series = dict[int, float]  # value by iteration


@dataclass(frozen=True)
class Group:
    """Runs whose settings differ by the seed alone."""

    name: str  # of its folders
    runs: list[dict[str, Series]]  # series by metric, one dictionary for each run

    def curve(self, metric: str) -> np.ndarray:
        """(n, 4): iteration, mean, lowest and highest value, at the iterations that all runs with the metric have."""
        series = [run[metric] for run in self.runs if metric in run]
        shared = sorted(set(series[0]).intersection(*series)) if series else []
        if not shared:
            return np.zeros((0, 4))
        values = np.array([[each[at] for at in shared] for each in series])
        return np.stack([np.array(shared, dtype=float), values.mean(0), values.min(0), values.max(0)], axis=1)


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Group runs that differ by the seed alone, in the order given; raises UserError if one has no records."""
    names: dict[str, list[str]] = {}
    runs: dict[str, list[dict[str, Series]]] = {}
    for folder, name in zip(folders, _names(folders), strict=True):
        key = _settings(folder)
        names.setdefault(key, []).append(name)
        runs.setdefault(key, []).append(_read_run(folder))
    return [Group(_common_name(names[key]), runs[key]) for key in runs]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _read_run(folder: Path) -> dict[str, Series]:
    path = folder / METRICS_FILE
    series: dict[str, Series] = {}
    for _, record in records(path):
        at = record.pop("iteration")
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, {})[at] = float(value)
    if not series:
        raise UserError(f"{path} has no records; give the OUTPUT_DIR of a run that has trained for 20 iterations.")
    return series


def _settings(folder: Path) -> str:
    """The settings of a run without its seed and place; its own name where it has no config.yaml."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return str(folder)
    keys = dict(flatten(yaml.safe_load(path.read_text(encoding="utf-8"))))
    return json.dumps({key: value for key, value in keys.items() if key not in (*FREE_KEYS, "SEED")}, default=str)


def _common_name(names: Sequence[str]) -> str:
    """The name of a run, or what those of several have in common, and their number."""
    if len(names) == 1:
        return names[0]
    return f"{os.path.commonprefix(names).rstrip('_-. ') or names[0]} ({len(names)} runs)"


def default_metrics(groups: Sequence[Group]) -> list[str]:
    """The metrics that a picture shows: total and last-stage losses, then scores."""
    known = {metric for group in groups for run in group.runs for metric in run}
    losses = sorted(name for name in known if name.startswith("loss_") and is_final_loss(name))
    losses = [name for name in ("total_loss", *losses) if name in known]
    return [*losses, *(name for name in SCORES if name in known)]


def draw_curves(groups: Sequence[Group], metrics: Sequence[str], path: Path) -> None:
    """Draw a panel for each metric and write a picture; raises UserError for a metric that no run has.

    The line is the mean over the runs of a group, the band their lowest to highest value; a dashed line is the same
    loss of the validation (TEST.LOSS).
    """
    known = sorted({metric for group in groups for run in group.runs for metric in run})
    for metric in metrics:
        if metric not in known:
            raise UserError(f"No run has the metric {metric!r}; these are recorded: {', '.join(known)}.")
    columns = min(_COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.6), layout="constrained")

    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, metric in zip(panels, metrics, strict=False):
        _draw_panel(axes, groups, metric)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Axes, groups: Sequence[Group], metric: str) -> None:
    for index, group in enumerate(groups):
        color = _COLORS[index % len(_COLORS)]
        at, mean, low, high = group.curve(metric).T
        marker = "o" if len(at) < 30 else None
        axes.plot(at + 1, mean, color=color, label=group.name, linewidth=1.4, marker=marker, markersize=3)
        if len(group.runs) > 1:
            axes.fill_between(at + 1, low, high, color=color, alpha=0.2, linewidth=0)
        validation = group.curve(f"{VALIDATION}{metric}")
        if len(validation):
            axes.plot(validation[:, 0] + 1, validation[:, 1], "--", color=color, linewidth=1.2)
    axes.set_title(metric, fontsize=10)
    axes.set_xlabel("iterations", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
