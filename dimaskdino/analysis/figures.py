"""Scores of a report, and its figures: outcomes by stage, errors, curves, confusion, calibration."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dimaskdino.analysis.missed import Outcome

TIDE_NAMES = {
    "Cls": "class wrong",
    "Loc": "place wrong",
    "Both": "class and place wrong",
    "Dupe": "found twice",
    "Bkg": "background",
    "Miss": "missed",
}
# Colors of Okabe and Ito, which most color-blind people tell apart; what is found recedes.
_OUTCOME_COLORS = ("#D9D9D9", "#000000", "#D55E00", "#CC79A7", "#56B4E9", "#0072B2", "#F0E442", "#009E73")
_TASK_COLORS = {"box": "#0072B2", "mask": "#E69F00"}
_LEAST_LABELED = 0.03  # share of a bar whose number is written


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores of boxes or masks."""

    task: str  # "box" or "mask"
    metrics: dict[str, float]  # AP, AP50 and others, in percent, nan where there is nothing to measure
    # points of AP50 that each kind of error costs, by TIDE's name, and how often it occurs
    tide: dict[str, tuple[float, int]]
    curves: dict[str, np.ndarray]  # precision at 101 recalls from 0 to 1, averaged over classes, by IoU threshold
    # (K + 1, K + 1) objects by true (row) and predicted (column) class; the last is background. Of detections that
    # score at least the threshold.
    confusion: np.ndarray
    # rows of (mean score, share that is right, number) of detections, by score in tenths
    calibration: list[tuple[float, float, int]]
    calibration_error: float  # mean distance of both, weighted by the number


def score_results(truth: hotcoco.COCO, results: Sequence[dict[str, Any]], task: str, score: float) -> TaskScores:
    """Score boxes or masks ("box", "mask") by a truth with the same ids, from 1; ``score`` is for the confusion."""
    kind, shape = {"box": ("bbox", "bbox"), "mask": ("segm", "segmentation")}[task]
    alone = [{key: each[key] for key in ("image_id", "category_id", "score", shape)} for each in results]
    evaluation = hotcoco.COCOeval(truth, truth.load_res(alone), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()
    report, tide, calibration = evaluation.report(), evaluation.tide_errors(), evaluation.calibration()
    return TaskScores(
        task=task,
        metrics={name: 100 * value if value >= 0 else np.nan for name, value in report["metrics"].items()},
        tide={name: (100 * tide["delta_ap"][name], tide["counts"][name]) for name in TIDE_NAMES},
        curves={
            name.removeprefix("pr@"): np.array(report["curves"][name]) for name in ("pr@0.50", "pr@0.75", "pr@0.90")
        },
        confusion=evaluation.confusion_matrix(min_score=score)["matrix"],
        calibration=[(each["avg_confidence"], each["avg_accuracy"], each["count"]) for each in calibration["bins"]],
        calibration_error=calibration["ece"],
    )


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def draw_outcomes(counts: Mapping[str, Counter[Outcome]]) -> Figure:
    """Bars of outcomes, one for each stage."""
    figure = Figure(figsize=(9.5, 1.4 + 0.42 * len(counts)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(counts))
    totals = np.array([max(count.total(), 1) for count in counts.values()])
    for outcome, color in zip(Outcome, _OUTCOME_COLORS, strict=True):
        values = np.array([count[outcome] for count in counts.values()])
        bars = axes.barh(range(len(counts)), values / totals, left=left, color=color, label=outcome.value, height=0.75)
        texts = [
            str(value) if value / total >= _LEAST_LABELED else "" for value, total in zip(values, totals, strict=True)
        ]
        dark = sum(to_rgb(color)) < 1.3
        axes.bar_label(bars, texts, label_type="center", fontsize=8, color="white" if dark else "black")
        left += values / totals
    axes.set_yticks(range(len(counts)), list(counts), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def draw_errors(scores: Sequence[TaskScores]) -> Figure:
    """What each kind of TIDE's errors costs, in points of AP50."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(scores)
    for number, each in enumerate(scores):
        places = np.arange(len(TIDE_NAMES)) + number * height
        values = [each.tide[name][0] for name in TIDE_NAMES]
        bars = axes.barh(places, values, height, color=_TASK_COLORS[each.task], label=each.task)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=8, padding=2)
    axes.set_yticks(np.arange(len(TIDE_NAMES)) + (len(scores) - 1) * height / 2, TIDE_NAMES.values(), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("points of AP50", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_curves(scores: Sequence[TaskScores]) -> Figure:
    """Precision over recall, averaged over classes, at three IoU thresholds."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for each in scores:
        for (threshold, curve), style in zip(each.curves.items(), ("-", "--", ":"), strict=True):
            recalls = np.linspace(0, 1, len(curve))
            axes.plot(recalls, curve, style, color=_TASK_COLORS[each.task], label=f"{each.task}, IoU {threshold}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_calibration(scores: Sequence[TaskScores]) -> Figure:
    """The share of detections that are right over their score."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color="0.7", linewidth=1)
    for each in scores:
        points = np.array([(score, right) for score, right, count in each.calibration if count])
        label = f"{each.task}, error {each.calibration_error:.3f}"
        axes.plot(*points.reshape(-1, 2).T, "o-", color=_TASK_COLORS[each.task], label=label, markersize=4)
    axes.set(xlabel="score", ylabel="share that is right (IoU 0.5)", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """True classes in rows, predicted ones in columns, background last."""
    labels = [*names, "background"]
    side = 2 + 0.35 * len(labels)
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("found as", fontsize=9)
    axes.set_ylabel("is", fontsize=9)
    if len(labels) <= 30:
        for row, column in np.argwhere(matrix > 0):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    return figure
