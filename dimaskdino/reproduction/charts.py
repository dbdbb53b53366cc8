"""Bars of a table: box and mask AP of every row, ours beside the paper's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dimaskdino.reproduction.experiments import DATASET_NAMES
from dimaskdino.reproduction.report import REFERENCE_DATASET, Compared, ComparedRow, heading
from dimaskdino.reproduction.tables import Table, metric_name

# Okabe and Ito's blue and orange, which most colour-blind people tell apart.
BOX_COLOUR, MASK_COLOUR = "#0072B2", "#E69F00"
PAPER_STYLE: dict[str, Any] = {"fill": True, "alpha": 0.25, "hatch": "////", "linewidth": 0.8}
_COLOURS = {"bbox/AP": BOX_COLOUR, "segm/AP": MASK_COLOUR}
_THICKNESS = 0.36


def draw_table(table: Table, dataset: str, rows: Sequence[ComparedRow], path: Path) -> None:
    """Draw horizontal bars, a panel for box and one for mask AP, and write a picture.

    Args:
        table: of the paper, with ``bbox/AP`` and ``segm/AP`` among its metrics.
        dataset: that the rows are on.
        rows: as :func:`dimaskdino.reproduction.report.compare` makes them.
        path: of the picture; its suffix decides the format.
    """
    of_paper = table.has_paper_values(dataset)
    figure = Figure(figsize=(9.5, 1.5 + (0.62 if of_paper else 0.42) * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_COLOURS), sharey=True)
    for axes, (metric, colour) in zip(panels, _COLOURS.items(), strict=True):
        cells = [row.cells[table.metrics.index(metric)] for row in rows]
        _draw_panel(axes, cells, [row.status for row in rows], colour, of_paper)
        axes.set_title(f"{metric_name(metric)} (%)", fontsize=10)
    panels[0].set_yticks(range(len(rows)), ["\n".join(_label(table, row)) for row in rows], fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(heading(table, dataset), fontsize=11, fontweight="bold")
    if of_paper:
        keys = [
            Patch(facecolor="0.35", label="ours"),
            Patch(facecolor="0.35", edgecolor="0.35", label="paper", **PAPER_STYLE),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    else:
        note = f"In brackets: change against the first row; the paper's on {DATASET_NAMES[REFERENCE_DATASET]}."
        figure.supxlabel(note, fontsize=8, color="0.35")
    figure.savefig(path, dpi=200)


def _label(table: Table, row: ComparedRow) -> list[str]:
    """What a row is called beside its bars, in one or two lines."""
    if set(row.labels) <= {"yes", "no"}:
        names = [name for name, value in zip(table.label_names, row.labels, strict=True) if value == "yes"]
        return [" + ".join(names) or f"without {' and '.join(table.label_names)}"]
    labels = [
        f"{name} = {value}" if value[0].isdigit() else value
        for name, value in zip(table.label_names, row.labels, strict=True)
    ]
    return [labels[0], ", ".join(labels[1:])] if len(labels) > 1 else labels


def _draw_panel(axes: Axes, cells: Sequence[Compared], empty: Sequence[str], colour: str, of_paper: bool) -> None:
    """The bars of one metric; ``empty`` says why there is none of ours."""
    thickness, offset = (_THICKNESS, _THICKNESS / 2) if of_paper else (1.6 * _THICKNESS, 0.0)
    largest = (
        max([value for cell in cells for value in (cell.ours, cell.paper) if value is not None], default=0.0) or 1.0
    )
    for position, cell in enumerate(cells):
        place, ours = position - offset, cell.ours or 0.0
        axes.barh(place, ours, thickness, color=colour)
        text = empty[position] if cell.ours is None else f"{ours:.1f}{_brackets(cell, position, of_paper)}"
        axes.text(ours + 0.015 * largest, place, text, va="center", fontsize=8)
        if cell.paper is not None:
            place = position + offset
            axes.barh(place, cell.paper, thickness, color=colour, edgecolor=colour, **PAPER_STYLE)
            axes.text(cell.paper + 0.015 * largest, place, f"{cell.paper:.1f}", va="center", fontsize=8, color="0.35")
    axes.set_xlim(0, largest * (1.25 if of_paper else 1.6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _brackets(cell: Compared, position: int, of_paper: bool) -> str:
    if of_paper:
        return "" if cell.difference is None else f" ({signed(cell.difference)})"
    if position == 0 or cell.change is None:
        return ""
    paper = "" if cell.paper_change is None else f"; paper {signed(cell.paper_change)}"
    return f" ({signed(cell.change)}{paper})"


def signed(value: float) -> str:
    """With its sign and one decimal, as print has it."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
