"""The report on what a model misses, as one HTML file that needs no other."""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate

from dimaskdino.analysis import missed
from dimaskdino.analysis.examples import Examples
from dimaskdino.analysis.explanation import Explained, by_class, by_size, by_stage, outcome_heads, outcome_rows
from dimaskdino.analysis.figures import (
    TaskScores,
    draw_calibration,
    draw_confusion,
    draw_curves,
    draw_errors,
    draw_outcomes,
    png,
)
from dimaskdino.analysis.missed import Limits

# The module's own text, without the marks of its markup.
_DEFINITIONS = (missed.__doc__ or "").replace(":class:`Limits`", "above").replace("``", "")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } p.note { color: #555; font-size: .9em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88em; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } .pair { display: inline-flex; gap: 3px; margin: 0 14px 10px 0; vertical-align: top; }
.pair img { height: 170px; } .figures img { vertical-align: top; } pre { white-space: pre-wrap; font: inherit; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    explained: Sequence[Explained],
    names: Sequence[str],
    scores: Sequence[TaskScores],
    examples: Examples,
    limits: Limits,
) -> None:
    """Write the report as HTML; ``scores`` are of boxes, and of masks where there are any."""
    stages = by_stage(explained)
    found = list(stages.values())[-1][missed.Outcome.FOUND] if stages else 0
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{found} of {len(explained)} objects are found by detections that score at least {limits.score:g}, with an "
        f"IoU of at least {limits.fit:g} of box and mask. What became of the others, had each stage been the last:</p>",
        _figure(draw_outcomes(stages)),
        _table(outcome_rows(stages), outcome_heads("stage")),
        "<h2>Examples</h2><p class=note>Left the object, right the query that came nearest to it in the last layer, "
        "with its highest score; empty where none came near.</p>",
        *(_example_row(outcome.value, pairs) for outcome, pairs in examples.rows()),
        "<h2>By class and size</h2><p class=note>In the end. Small objects have up to 32 x 32 px, large ones more than "
        "96 x 96.</p>",
        _table(outcome_rows(by_class(explained, names)), outcome_heads("class")),
        "<br>",
        _table(outcome_rows(by_size(explained)), outcome_heads("size")),
        *_score_parts(scores, names, limits),
        f"<h2>What the words mean</h2><p>near {limits.near:g}, fit {limits.fit:g}, score {limits.score:g}, "
        f"{limits.max_detections} detections of an image</p><pre>{html.escape(_DEFINITIONS)}</pre>",
    ]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    path.write_text(f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>", "utf-8")


def _score_parts(scores: Sequence[TaskScores], names: Sequence[str], limits: Limits) -> list[str]:
    if not scores:
        return []
    metrics = [name for name in scores[0].metrics if name.startswith("AP")]
    rows = [[each.task, *(each.metrics[name] for name in metrics)] for each in scores]
    figures = "".join(_figure(draw(scores)) for draw in (draw_errors, draw_curves, draw_calibration))
    confusion = scores[-1]
    return [
        "<h2>Errors, curves, confusion, calibration</h2>",
        _table(rows, ["AP in percent", *metrics]),
        "<p class=note>TIDE's errors: points of AP50 that are gained if errors of one kind are mended. Calibration: "
        "the mean distance of score and share that is right, over all detections.</p>",
        f"<div class=figures>{figures}</div>",
        f"<p class=note>Confusion of {confusion.task}es at IoU 0.5, of detections that score at least "
        f"{limits.score:g}.</p>".replace("maskes", "masks"),
        _figure(draw_confusion(confusion.confusion, names)),
    ]


def _table(rows: Sequence[Sequence[Any]], heads: Sequence[str]) -> str:
    shown = [[_cell(value) for value in row] for row in rows]
    return str(tabulate(shown, heads, tablefmt="html", disable_numparse=True))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.1f}"
    return str(value)


def _figure(figure: Figure) -> str:
    return _image(png(figure))


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _example_row(title: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    pictures = "".join(f"<span class=pair>{''.join(map(_picture, pair))}</span>" for pair in pairs)
    return f"<h3>{html.escape(title)}</h3><div>{pictures}</div>"


def _picture(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return _image(buffer.getvalue())
