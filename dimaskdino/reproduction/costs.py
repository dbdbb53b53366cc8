"""What trainings cost: iterations, images, and hours from measured iterations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from tabulate import tabulate

from dimaskdino.engine.writers import METRICS_FILE
from dimaskdino.reproduction.runs import Run, seconds_per_iteration
from dimaskdino.reproduction.tables import EPOCH_IMAGES

_BACKBONES = {"build_resnet_backbone": "R{MODEL.RESNETS.DEPTH}", "D2SwinTransformer": "swin{MODEL.SWIN.EMBED_DIM}"}
_HEADS = ("run", "status", "epochs", "iterations left", "images left", "s / iteration", "hours left", "measured in")


@dataclass(frozen=True)
class Speed:
    """Seconds of an iteration, and the run they were measured in."""

    seconds: float
    source: str


def measure_folder(run: Run, output: Path) -> Path:
    """Folder of a short measurement for all runs that are about as fast: of one dataset, backbone, and batch."""
    model = run.cfg.MODEL
    backbone = _BACKBONES.get(model.BACKBONE.NAME, "{MODEL.TIMM.NAME}").format(MODEL=model)
    return output / run.experiment.dataset / "measured" / f"{backbone}_batch{run.cfg.SOLVER.IMS_PER_BATCH}"


def speeds(runs: Sequence[Run], output: Path) -> dict[Run, Speed]:
    """The speed of every run whose speed is known: its own, or else the newest one measured among similar runs."""
    own: dict[Run, Speed] = {}
    newest: dict[Path, tuple[float, Speed]] = {}
    groups = {run: measure_folder(run, output) for run in runs}
    for run, group in groups.items():
        for folder in (run.folder, group):
            seconds = seconds_per_iteration(folder)
            if seconds is None:
                continue
            speed, measured = Speed(seconds, folder.name), (folder / METRICS_FILE).stat().st_mtime
            newest[group] = max(newest.get(group, (0.0, speed)), (measured, speed), key=itemgetter(0))
            if folder == run.folder:
                own[run] = speed
    return {run: own.get(run) or newest[group][1] for run, group in groups.items() if group in newest}


def cost_table(runs: Sequence[Run], known: Mapping[Run, Speed], num_gpus: Mapping[Run, int] | None = None) -> str:
    """What is left to train of every run and of all together, without evaluation; ``num_gpus`` where it is less."""
    rows: list[list[str | int]] = [_cost_row(run, known.get(run)) for run in runs]
    hours = [hours_left(run, known.get(run)) for run in runs]
    iterations, images = sum(run.iterations_left for run in runs), sum(images_left(run) for run in runs)
    rows.append(["together", "", "", iterations, images, "", _total(hours), ""])
    if num_gpus:
        for run, row in zip(runs, rows, strict=False):
            row.append(num_gpus.get(run, ""))
    heads = [*_HEADS, *(["GPUs"] if num_gpus else [])]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def images_left(run: Run) -> int:
    """Images of the rest of the training."""
    return run.iterations_left * run.cfg.SOLVER.IMS_PER_BATCH


def hours_left(run: Run, speed: Speed | None) -> float | None:
    """Hours of the rest of the training; None if its speed is not known."""
    if run.iterations_left == 0:
        return 0.0
    return None if speed is None else run.iterations_left * speed.seconds / 3600


def _cost_row(run: Run, speed: Speed | None) -> list[str | int]:
    epochs = run.max_iter * run.cfg.SOLVER.IMS_PER_BATCH / EPOCH_IMAGES[run.experiment.dataset]
    hours = hours_left(run, speed)
    return [
        *(run.name, run.status, f"{epochs:.3g}", run.iterations_left, images_left(run)),
        f"{speed.seconds:.3g}" if speed else "unknown",
        "unknown" if hours is None else f"{hours:.1f}",
        speed.source if speed else "",
    ]


def _total(hours: Sequence[float | None]) -> str:
    known = [left for left in hours if left is not None]
    unknown = f" and {len(hours) - len(known)} unknown" if len(known) < len(hours) else ""
    return f"{sum(known):.1f}{unknown}" if known else "unknown"
