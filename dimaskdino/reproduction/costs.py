"""What trainings cost before they are started: iterations, images, hours from a measured iteration."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from dimaskdino.reproduction.experiments import EPOCH_IMAGES
from dimaskdino.reproduction.runs import Run

Group = tuple[str, str, int]


@dataclass(frozen=True)
class Speed:
    """Seconds of an iteration, and the run that they were measured in."""

    seconds: float
    source: str


def speed_group(run: Run) -> Group:
    """Runs of one group are about equally fast: dataset, backbone, images per iteration."""
    model = run.cfg.MODEL
    names = {"build_resnet_backbone": f"R{model.RESNETS.DEPTH}", "D2SwinTransformer": f"swin{model.SWIN.EMBED_DIM}"}
    backbone = names.get(model.BACKBONE.NAME, model.TIMM.NAME)
    return run.experiment.dataset, backbone, run.cfg.SOLVER.IMS_PER_BATCH


def measure_folder(run: Run, output: Path) -> Path:
    """Where a few iterations of the run's group are measured."""
    dataset, backbone, batch = speed_group(run)
    return output / dataset / "measured" / f"{backbone}_batch{batch}"


def speeds(runs: Iterable[Run], output: Path) -> dict[Run, Speed]:
    """The speed of every run where it is known: its own, else the newest one measured in its group.

    Args:
        runs: opened under ``output``.
        output: folder of all runs.
    """
    own: dict[Run, Speed] = {}
    newest: dict[Group, tuple[float, Speed]] = {}
    runs = list(runs)
    for run in runs:
        for candidate in (run, Run(run.experiment, measure_folder(run, output), run.cfg, run.options)):
            seconds = candidate.seconds_per_iteration()
            if seconds is None:
                continue
            speed = Speed(seconds, candidate.folder.name)
            when = (candidate.folder / "metrics.json").stat().st_mtime
            newest[speed_group(run)] = max(
                newest.get(speed_group(run), (0.0, speed)), (when, speed), key=lambda p: p[0]
            )
            if candidate is run:
                own[run] = speed
    return {
        run: own.get(run) or newest[speed_group(run)][1] for run in runs if run in own or speed_group(run) in newest
    }


def cost_table(runs: Sequence[Run], known: Mapping[Run, Speed], num_gpus: Mapping[Run, int] | None = None) -> str:
    """What is left to train of every run, and of all together; evaluation comes on top.

    Args:
        runs: in the order of the rows.
        known: :func:`speeds`.
        num_gpus: of the runs that get another number than was asked for; a column of its own where there are any.
    """
    rows = [_cost_row(run, known.get(run)) for run in runs]
    hours = [hours_left(run, known.get(run)) for run in runs]
    rows.append(
        [
            "together",
            "",
            "",
            sum(run.iterations_left for run in runs),
            sum(images_left(run) for run in runs),
            "",
            _total(hours),
            "",
        ]
    )
    heads = ["run", "status", "epochs", "iterations left", "images left", "s / iteration", "hours left", "measured in"]
    if num_gpus:
        heads.append("GPUs")
        for run, row in zip(runs, rows, strict=False):
            row.append(num_gpus.get(run, ""))
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def _total(hours: Sequence[float | None]) -> str:
    known = [left for left in hours if left is not None]
    unknown = len(hours) - len(known)
    if not known:
        return "unknown"
    return f"{sum(known):.1f}" + (f" and {unknown} unknown" if unknown else "")


def _cost_row(run: Run, speed: Speed | None) -> list[str | int]:
    batch = run.cfg.SOLVER.IMS_PER_BATCH
    epochs = run.max_iter * batch / EPOCH_IMAGES[run.experiment.dataset]
    hours = hours_left(run, speed)
    return [
        f"{run.experiment.dataset}/{run.experiment.name}",
        run.status,
        f"{epochs:.3g}",
        run.iterations_left,
        images_left(run),
        f"{speed.seconds:.3g}" if speed else "unknown",
        "unknown" if hours is None else f"{hours:.1f}",
        speed.source if speed else "",
    ]


def images_left(run: Run) -> int:
    """Images that the rest of the training sees."""
    return run.iterations_left * run.cfg.SOLVER.IMS_PER_BATCH


def hours_left(run: Run, speed: Speed | None) -> float | None:
    """Hours that the rest of the training takes; None where its speed is not known."""
    if run.iterations_left == 0:
        return 0.0
    return None if speed is None else run.iterations_left * speed.seconds / 3600
