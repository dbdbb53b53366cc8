"""Figure 1: box and mask AP at the first and the last decoder layer, and optionally after every stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dimaskdino.errors import UserError
from dimaskdino.reproduction.charts import BOX_COLOUR, MASK_COLOUR, PAPER_STYLE, signed
from dimaskdino.reproduction.runs import decoder_layers
from dimaskdino.reproduction.tables import paper_tables
from dimaskdino.structures.stages import Stage

_BARS = (("box_AP", "box AP", BOX_COLOUR), ("mask_AP", "mask AP", MASK_COLOUR))
_WIDTH = 0.36
NOT_MEASURED = "n/a"  # in place of a bar
_RUN_STYLES = ("o-", "s--", "^:", "D-.")


@dataclass(frozen=True)
class StageResults:
    """Results of a run by stage.

    Attributes:
        label: of the run.
        stages: rows of its layers.json, each with ``stage``, ``box_AP``, ``mask_AP`` and ``gap`` in percent; None or
            nan where nothing could be measured.
    """

    label: str
    stages: list[dict[str, Any]]

    def ends(self) -> list[tuple[str, dict[str, Any]]]:
        """The first and the last decoder layer, with their names.

        Raises:
            UserError: there is no decoder layer among the stages.
        """
        layers = decoder_layers(self.stages)
        if not layers:
            raise UserError(f"The results of {self.label} hold no decoder layer: evaluate with --eval-layers all.")
        return [("first", layers[0]), ("last", layers[-1])]


def paper_ends(label: str) -> dict[str, float] | None:
    """What the paper's Figure 1 shows of a model, by ``first/box_AP`` and the like; None for another model."""
    figure = paper_tables()["figure1"]
    for row in figure.rows:
        if row.labels == (label,):
            return dict(zip(figure.metrics, row.paper["bdd100k"], strict=True))  # type: ignore[arg-type]
    return None


def draw_imbalance(runs: Sequence[StageResults], path: Path, *, with_paper: bool = False, lines: bool = False) -> None:
    """Draw the bars of one or several runs side by side and write a picture.

    Args:
        runs: at least one.
        path: of the picture; its suffix decides the format.
        with_paper: hatched bars beside those of runs whose label is a model of the paper's Figure 1.
        lines: a second panel with every stage.

    Raises:
        UserError: the paper's bars are asked for, and no label is one of its models.
    """
    models = [row.labels[0] for row in paper_tables()["figure1"].rows]
    if with_paper and not any(run.label in models for run in runs):
        raise UserError(f"The paper's bars belong to {' and '.join(models)}; name the runs so with --labels.")
    per_group = 1.35 if with_paper else 1.0
    width = 1.3 + 2 * per_group * len(runs)
    figure = Figure(figsize=(max(width, 3.6) + (4.4 if lines else 0.0), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if lines else 1, squeeze=False, width_ratios=[width, 4.4] if lines else [1])[0]
    _draw_bars(panels[0], runs, with_paper)
    if lines:
        _draw_lines(panels[1], runs)
    figure.savefig(path, dpi=200)


def _draw_bars(axes: Axes, runs: Sequence[StageResults], with_paper: bool) -> None:
    ticks: list[tuple[float, str]] = []
    step = 1.45 if with_paper else 1.0
    position = 0.0
    for run in runs:
        paper = paper_ends(run.label) if with_paper else None
        start = position
        for name, layer in run.ends():
            _draw_group(axes, position, name, layer, paper)
            of_paper = f" (paper {signed(paper[f'{name}/gap'])})" if paper else ""
            gap = signed(layer["gap"]) if _is_measured(layer["gap"]) else NOT_MEASURED
            ticks.append((position, f"{name} layer\ngap {gap}{of_paper}"))
            position += step
        middle = (start + position - step) / 2
        place = axes.get_xaxis_transform()
        axes.text(middle, -0.17, run.label, transform=place, ha="center", va="top", fontsize=9, fontweight="bold")
        position += 0.35
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_ylabel("AP (%)")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    handles = [Patch(facecolor=colour, label=name) for _, name, colour in _BARS]
    if with_paper:
        handles.append(Patch(facecolor="0.35", edgecolor="0.35", label="paper (BDD100K)", **PAPER_STYLE))
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1))


def _draw_group(axes: Axes, position: float, name: str, layer: dict[str, Any], paper: dict[str, float] | None) -> None:
    """The bars of one layer: box and mask AP, each with the paper's at its right."""
    bars: list[tuple[float | None, dict[str, Any]]] = []
    for key, _, colour in _BARS:
        bars.append((layer[key], {"color": colour}))
        if paper:
            bars.append((paper[f"{name}/{key}"], {"color": colour, "edgecolor": colour, **PAPER_STYLE}))
    width = _WIDTH * (0.85 if paper else 1.0)
    for index, (height, style) in enumerate(bars):
        place = position + (index - (len(bars) - 1) / 2) * width
        text = f"{height:.1f}" if _is_measured(height) else NOT_MEASURED
        top = height if _is_measured(height) else 0.0
        axes.bar(place, top, width * 0.94, **style)
        axes.annotate(text, (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)


def _is_measured(value: float | None) -> TypeGuard[float]:
    """AP of no object is nan, which JSON files hold as null."""
    return value is not None and not math.isnan(value)


def _draw_lines(axes: Axes, runs: Sequence[StageResults]) -> None:
    names = list(dict.fromkeys(stage["stage"] for run in runs for stage in run.stages))
    names.sort(key=lambda name: Stage.from_name(name).order)
    for index, run in enumerate(runs):
        style = _RUN_STYLES[index % len(_RUN_STYLES)]
        places = [names.index(stage["stage"]) for stage in run.stages]
        for key, _, colour in _BARS:
            heights = [stage[key] if _is_measured(stage[key]) else math.nan for stage in run.stages]
            axes.plot(places, heights, style, color=colour, markersize=4, linewidth=1.2)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("AP (%)")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color="0.35", marker=style[0], linestyle=style[1:], markersize=4, label=run.label)
        for run, style in zip(runs, _RUN_STYLES * len(runs), strict=False)
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
