"""Charts: the bars of a table, ours beside the paper's, and Figure 1 with the scores by decoder layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dimaskdino.errors import UserError
from dimaskdino.reproduction.report import Compared, ComparedRow
from dimaskdino.reproduction.runs import Run, StageRows, decoder_layers, read_stages
from dimaskdino.reproduction.tables import DATASET_NAMES, Table, metric_name, paper_tables
from dimaskdino.structures.stages import Stage

# Okabe and Ito's colors, which most color-blind people tell apart.
_STAGE_COLORS = {"box_AP": "#0072B2", "mask_AP": "#E69F00", "PQ": "#009E73", "mIoU": "#CC79A7"}
# The stage's score that has the color of a metric of a table.
_TABLE_COLORS = {"panoptic_seg/PQ": "PQ", "bbox/AP": "box_AP", "segm/AP": "mask_AP", "sem_seg/mIoU": "mIoU"}
_PAPER_STYLE: dict[str, Any] = {"fill": True, "alpha": 0.25, "hatch": "////", "linewidth": 0.8}
RUN_STYLES = ("o-", "s--", "^:", "D-.")
_THICKNESS = 0.36
_LINES_WIDTH = 4.4  # of the panel of lines, in inches
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")
NOT_MEASURED = "n/a"  # in place of a bar


def picture_path(path: Path, name: str) -> Path:
    """The picture that --output asks for, by default a PNG; raises UserError for a folder or another format."""
    if not (path.suffix or path.is_dir()):
        path = path.with_name(f"{path.name}.png")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name the picture in it: {path / name}.")
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--output {path} must end in {', '.join(PICTURE_SUFFIXES)}, not in {path.suffix}.")
    return path


def draw_table(table: Table, dataset: str, rows: Sequence[ComparedRow], path: Path) -> None:
    """Draw horizontal bars, a panel for each of box and mask AP that the table has, and write a picture."""
    of_paper = table.has_paper_values(dataset)
    metrics = [metric for metric in _TABLE_COLORS if metric in table.metrics]
    figure = Figure(figsize=(9.5, 1.5 + (0.62 if of_paper else 0.42) * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        cells = [row.cells[table.metrics.index(metric)] for row in rows]
        _draw_panel(axes, cells, [row.status for row in rows], _STAGE_COLORS[_TABLE_COLORS[metric]], of_paper)
        axes.set_title(f"{metric_name(metric)} (%)", fontsize=10)
    panels[0].set_yticks(range(len(rows)), ["\n".join(_label(table, row)) for row in rows], fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(table.heading(dataset), fontsize=11, fontweight="bold")
    if of_paper:
        keys = [Patch(facecolor="0.35", label="ours"), _paper_key("paper")]
        figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    else:
        reference = DATASET_NAMES[table.reference_dataset]
        note = f"In parentheses: change against the first row; the paper's on {reference}."
        figure.supxlabel(note, fontsize=8, color="0.35")
    figure.savefig(path, dpi=200)


def _label(table: Table, row: ComparedRow) -> list[str]:
    """The name of a row beside its bars, in one or two lines."""
    if set(row.labels) <= {"yes", "no"}:
        names = [name for name, value in zip(table.label_names, row.labels, strict=True) if value == "yes"]
        return [" + ".join(names) or f"without {' and '.join(table.label_names)}"]
    labels = [
        f"{name} = {value}" if value[0].isdigit() else value
        for name, value in zip(table.label_names, row.labels, strict=True)
    ]
    return [labels[0], ", ".join(labels[1:])] if len(labels) > 1 else labels


def _draw_panel(axes: Axes, cells: Sequence[Compared], statuses: Sequence[str], color: str, of_paper: bool) -> None:
    """Draw the bars of one metric; a row's status stands in for a missing bar of ours."""
    thickness, offset = (_THICKNESS, _THICKNESS / 2) if of_paper else (1.6 * _THICKNESS, 0.0)
    values = [value for cell in cells for value in (cell.ours, cell.paper) if value is not None]
    largest = max(values, default=0.0) or 1.0
    for position, cell in enumerate(cells):
        ours = cell.ours or 0.0
        axes.barh(position - offset, ours, thickness, color=color, xerr=cell.spread, ecolor="0.35")
        text = statuses[position] if cell.ours is None else f"{ours:.1f}{_changes(cell, position, of_paper)}"
        axes.text(ours + (cell.spread or 0.0) + 0.015 * largest, position - offset, text, va="center", fontsize=8)
        if cell.paper is not None:
            axes.barh(position + offset, cell.paper, thickness, color=color, edgecolor=color, **_PAPER_STYLE)
            place = (cell.paper + 0.015 * largest, position + offset)
            axes.text(*place, f"{cell.paper:.1f}", va="center", fontsize=8, color="0.35")
    axes.set_xlim(0, largest * (1.25 if of_paper else 1.6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _changes(cell: Compared, position: int, of_paper: bool) -> str:
    if of_paper:
        return "" if cell.difference is None else f" ({_signed(cell.difference)})"
    if position == 0 or cell.change is None:
        return ""
    paper = "" if cell.paper_change is None else f"; paper {_signed(cell.paper_change)}"
    return f" ({_signed(cell.change)}{paper})"


@dataclass(frozen=True)
class StageResults:
    """Results by stage of a run, or the mean of several."""

    label: str  # in the picture
    # rows of layers.json with ``stage`` and what was scored of ``box_AP``, ``mask_AP``, ``gap``, ``PQ``, and ``mIoU``
    # in percent; None or nan if it could not be measured
    stages: StageRows

    @classmethod
    def of_runs(cls, label: str, runs: Sequence[Run]) -> "StageResults":
        """The mean over runs that were evaluated by stage."""
        rows = [row for run in runs for row in read_stages(run.folder)]
        names = dict.fromkeys(row["stage"] for row in rows)
        return cls(label, [_mean_row([row for row in rows if row["stage"] == name]) for name in names])

    def ends(self) -> dict[str, dict[str, Any]]:
        """The ``first`` and the ``last`` decoder layer; UserError where no stage is one."""
        layers = decoder_layers(self.stages)
        if not layers:
            raise UserError(f"The results of {self.label} hold no decoder layer; evaluate with --eval-layers all.")
        return {"first": layers[0], "last": layers[-1]}


def _mean_row(rows: StageRows) -> dict[str, Any]:
    means: dict[str, float | None] = {}
    for key in (key for key in (*_STAGE_COLORS, "gap") if key in rows[0]):
        values = [row[key] for row in rows if _is_measured(row.get(key))]
        means[key] = mean(values) if values else None
    return {"stage": rows[0]["stage"], **means}


def paper_ends(label: str) -> dict[str, float] | None:
    """What the paper's Figure 1 shows of a model, by ``first/box_AP`` and the like; None for another model."""
    figure = paper_tables()["figure1"]
    values = next((row.paper["bdd100k"] for row in figure.rows if row.labels == (label,)), None)
    return None if values is None else dict(zip(figure.metrics, values, strict=True))  # type: ignore[arg-type]


def draw_imbalance(runs: Sequence[StageResults], path: Path, *, with_paper: bool = False, lines: bool = False) -> None:
    """Draw the scores at the first and the last decoder layer, runs side by side, and write a picture.

    Those are box and mask AP, PQ, and mIoU, as far as the runs have them. ``with_paper`` adds hatched bars beside those
    of runs whose label is a model of the paper's Figure 1, and ``lines`` a second panel with every stage.

    Raises:
        UserError: the paper's bars are asked for, but no label is one of its models.
    """
    if with_paper and not any(paper_ends(run.label) for run in runs):
        models = [row.labels[0] for row in paper_tables()["figure1"].rows]
        raise UserError(f"The paper's bars belong to {' and '.join(models)}; name the runs so with --labels.")
    step = 1.45 if with_paper else 1.0
    width = 1.3 + 2 * (1.35 if with_paper else 1.0) * len(runs)
    figure = Figure(figsize=(max(width, 3.6) + (_LINES_WIDTH if lines else 0.0), 3.6), layout="constrained")
    widths = [width, _LINES_WIDTH] if lines else [1]
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    keys = [key for key in _STAGE_COLORS if any(key in row for run in runs for row in run.stages)]
    ticks: dict[float, str] = {}
    for index, run in enumerate(runs):
        start = index * (2 * step + 0.35)
        ticks |= _draw_run(panels[0], run, keys, (start, start + step), paper_ends(run.label) if with_paper else None)
    _finish_bars(panels[0], ticks, keys, with_paper)
    if lines:
        _draw_lines(panels[1], runs, keys)
    figure.savefig(path, dpi=200)


def _draw_run(
    axes: Axes, run: StageResults, keys: Sequence[str], places: tuple[float, float], paper: Mapping[str, float] | None
) -> dict[float, str]:
    """Draw the bars of one run and return the text under each of its two groups by place."""
    ticks = {}
    for place, (name, layer) in zip(places, run.ends().items(), strict=True):
        _draw_group(axes, place, name, {key: layer.get(key) for key in keys}, paper)
        of_paper = f" (paper {_signed(paper[f'{name}/gap'])})" if paper else ""
        gap = _signed(layer["gap"]) if _is_measured(layer.get("gap")) else NOT_MEASURED
        ticks[place] = f"{name} layer" + (f"\ngap {gap}{of_paper}" if "gap" in layer else "")
    style: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 9, "fontweight": "bold"}
    axes.text(sum(places) / 2, -0.17, run.label, transform=axes.get_xaxis_transform(), **style)
    return ticks


def _draw_group(
    axes: Axes, position: float, name: str, scores: Mapping[str, Any], paper: Mapping[str, float] | None
) -> None:
    """Draw the scores of one layer by their kind, each with the paper's at its right where it has one."""
    bars: list[tuple[float | None, dict[str, Any]]] = []
    for key, score in scores.items():
        color = _STAGE_COLORS[key]
        bars.append((score, {"color": color}))
        if paper and f"{name}/{key}" in paper:
            bars.append((paper[f"{name}/{key}"], {"color": color, "edgecolor": color, **_PAPER_STYLE}))
    width = min(_THICKNESS * (0.85 if paper else 1.0), 0.86 / len(scores))
    for index, (height, style) in enumerate(bars):
        place = position + (index - (len(bars) - 1) / 2) * width
        top, text = (height, f"{height:.1f}") if _is_measured(height) else (0.0, NOT_MEASURED)
        axes.bar(place, top, width * 0.94, **style)
        axes.annotate(text, (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)


def _finish_bars(axes: Axes, ticks: Mapping[float, str], keys: Sequence[str], with_paper: bool) -> None:
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_ylabel(_unit(keys))
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    handles = [Patch(facecolor=_STAGE_COLORS[key], label=key.replace("_", " ")) for key in keys]
    handles += [_paper_key("paper (BDD100K)")] if with_paper else []
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1))


def _unit(keys: Sequence[str]) -> str:
    return "AP (%)" if all(key.endswith("AP") for key in keys) else "%"


def _draw_lines(axes: Axes, runs: Sequence[StageResults], keys: Sequence[str]) -> None:
    names = sorted({row["stage"] for run in runs for row in run.stages}, key=lambda name: Stage.from_name(name).order)
    handles = []
    for index, run in enumerate(runs):
        style = RUN_STYLES[index % len(RUN_STYLES)]
        places = [names.index(row["stage"]) for row in run.stages]
        for key in keys:
            heights = [math.nan if row.get(key) is None else row[key] for row in run.stages]
            axes.plot(places, heights, style, color=_STAGE_COLORS[key], markersize=4, linewidth=1.2)
        look: dict[str, Any] = {"marker": style[0], "linestyle": style[1:], "markersize": 4}
        handles.append(Line2D([], [], color="0.35", label=run.label, **look))
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_ylabel(_unit(keys))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")


def _paper_key(label: str) -> Patch:
    return Patch(facecolor="0.35", edgecolor="0.35", label=label, **_PAPER_STYLE)


def _is_measured(value: float | None) -> TypeGuard[float]:
    """AP without any object is nan, and null in JSON files."""
    return value is not None and not math.isnan(value)


def _signed(value: float) -> str:
    """A number with its sign and one decimal, as print sets it."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
