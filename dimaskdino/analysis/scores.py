"""What COCO's evaluation knows beyond AP: TIDE's errors, curves, confusion, and calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np

TIDE_NAMES = {
    "Cls": "class wrong",
    "Loc": "place wrong",
    "Both": "class and place wrong",
    "Dupe": "found twice",
    "Bkg": "background",
    "Miss": "missed",
}


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores of boxes or masks.

    Attributes:
        task: "box" or "mask".
        metrics: AP, AP50 and others, in percent, nan where there is nothing to measure.
        tide: points of AP50 that each kind of error costs, by TIDE's name, and how often it occurs.
        curves: precision at 101 recalls from 0 to 1, averaged over classes, by IoU threshold.
        confusion: (K + 1, K + 1) objects by true (row) and predicted (column) class; the last is background. Of
            detections that score at least the threshold.
        calibration: rows of (mean score, share that is right, number) of detections, by score in tenths.
        calibration_error: mean distance of both, weighted by the number.
    """

    task: str
    metrics: dict[str, float]
    tide: dict[str, tuple[float, int]]
    curves: dict[str, np.ndarray]
    confusion: np.ndarray
    calibration: list[tuple[float, float, int]]
    calibration_error: float


def score_results(truth: hotcoco.COCO, results: Sequence[dict[str, Any]], task: str, score: float) -> TaskScores:
    """Score detections.

    Args:
        truth: images, categories and annotations, with ids from 1.
        results: detections in COCO's format with the same ids.
        task: "box" or "mask".
        score: threshold of the confusion matrix.
    """
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
