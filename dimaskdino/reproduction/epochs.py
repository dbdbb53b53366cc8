"""Scores against epochs, from the records of runs: DINO's Figures 4 and 7."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from dimaskdino.config import read_config
from dimaskdino.data.parallel import Progress, no_progress
from dimaskdino.errors import UserError
from dimaskdino.reproduction.anchors import average_top_k, measure_run
from dimaskdino.reproduction.charts import RUN_STYLES
from dimaskdino.reproduction.runs import read_records
from dimaskdino.reproduction.tables import EPOCH_IMAGES


@dataclass(frozen=True)
class Curve:
    """Scores of one run."""

    label: str  # of the run
    epochs: Sequence[float]  # at which it was evaluated
    scores: Sequence[float]  # one for each


def score_curve(folder: Path, label: str, metric: str, epoch_images: int | None = None) -> Curve:
    """Read a score (``bbox/AP``, ``panoptic_seg/PQ``, as in metrics.json) of every evaluation during a training.

    Raises:
        UserError: the folder holds no run, no such score, or the images of an epoch are not known.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a training: it has no metrics.json.")
    # An evaluation that was repeated counts once.
    scores = {record["iteration"]: record[metric] for record in read_records(path, f'"{metric}"') if metric in record}
    scores = {iteration: score for iteration, score in scores.items() if isinstance(score, int | float)}
    if not scores:
        raise UserError(
            f"{path} has no {metric}: evaluate during the training (TEST.EVAL_PERIOD), or name another score."
        )
    per_epoch = _iterations_of_epoch(folder, epoch_images)
    return Curve(label, [iteration / per_epoch for iteration in scores], list(scores.values()))


def distance_curves(
    folder: Path, label: str, k: int, epoch_images: int | None = None, progress: Progress = no_progress
) -> dict[str, Curve]:
    """ATD(k) of every checkpoint of a run, on "all" and on "small" objects; see :func:`measure_run`."""
    found = measure_run(folder, progress)
    if not found:
        raise UserError(f"{folder} has no checkpoint model_*.pth of an iteration (SOLVER.CHECKPOINT_PERIOD).")
    per_epoch = _iterations_of_epoch(folder, epoch_images)
    curves = {}
    for kind in ("all", "small"):
        names = [name for name in sorted(found) if found[name][kind]]
        epochs = [(int(re.findall(r"\d+", name)[0]) + 1) / per_epoch for name in names]
        curves[kind] = Curve(label, epochs, [average_top_k(found[name][kind], k) for name in names])
    return curves


def _iterations_of_epoch(folder: Path, epoch_images: int | None) -> float:
    cfg = read_config(folder / "config.yaml")
    if epoch_images is None:
        name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else ""
        known = EPOCH_IMAGES | {"shapes": cfg.DATASETS.SHAPES.NUM_TRAIN}
        epoch_images = known.get(name.partition("_")[0])
        if epoch_images is None:
            raise UserError(f"How many images {name or 'DATASETS.TRAIN'} has is not known; give --epoch-images.")
    return epoch_images / cfg.SOLVER.IMS_PER_BATCH


def draw_curves(panels: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draw curves over epochs, a panel for each score, and write a picture."""
    figure = Figure(figsize=(0.6 + 3.8 * len(panels), 3.4), layout="constrained")

    for axes, (score, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, curve in enumerate(curves):
            style = RUN_STYLES[index % len(RUN_STYLES)]
            axes.plot(curve.epochs, curve.scores, style, label=curve.label, markersize=4, linewidth=1.2)
        axes.set_xlabel("epoch")
        axes.set_ylabel(score)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=200)
