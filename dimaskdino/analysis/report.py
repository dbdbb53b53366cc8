"""The report on what a model misses, as one HTML file that needs no other, with a contact sheet of examples."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as mask_util
from tabulate import tabulate

from dimaskdino.analysis import missed
from dimaskdino.analysis.explanation import Explained, by_class, by_size, by_stage, outcome_table
from dimaskdino.analysis.figures import (
    TaskScores,
    draw_calibration,
    draw_confusion,
    draw_curves,
    draw_errors,
    draw_outcomes,
    png,
)
from dimaskdino.analysis.missed import Limits, Outcome
from dimaskdino.analysis.stages import SeenStage, TrueObjects
from dimaskdino.structures.rle_masks import Rle
from dimaskdino.visualization import Objects, draw_objects

BOXES_ALONE = "Boxes alone decide, as the model or some object of the dataset has no mask."
_SIDE_PX = 220  # of a picture
_AROUND = 2.2  # side of what is shown, in sides of the object
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


@dataclass(kw_only=True)
class Examples:
    """Collects pictures of objects that were not found."""

    names: Sequence[str]  # class names
    limit: int = 4  # objects of an outcome
    # pairs (truth, nearest query) of (H, W, 3) uint8 RGB, by outcome
    pictures: dict[Outcome, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def add(self, image: np.ndarray, truth: TrueObjects, last: SeenStage, explained: Sequence[Explained]) -> None:
        """Draw the objects of an image (H, W, 3) uint8 RGB whose outcomes have room."""
        for each in explained:
            taken = self.pictures.get(each.last.outcome, [])
            if each.last.outcome is not Outcome.FOUND and len(taken) < self.limit:
                self.pictures[each.last.outcome] = [*taken, self._draw(image, truth, last, each)]

    def _draw(
        self, image: np.ndarray, truth: TrueObjects, last: SeenStage, each: Explained
    ) -> tuple[np.ndarray, np.ndarray]:
        x, y, width, height = truth.boxes[each.index]
        box = np.array((x, y, x + width, y + height))
        region = _region(box, image.shape[:2])
        rle = None if truth.rles is None else truth.rles[each.index]
        left = _cut(image, region, each.label, self.names[each.label], None, box, rle)
        if (query := each.last.query) is None:
            return left, _cut(image, region, 0, "", None, None, None)
        scores = last.view.scores[query] * last.view.quality[query]
        label = int(scores.argmax())
        own = (label, self.names[label], float(scores[label]))
        return left, _cut(image, region, *own, last.boxes[query], last.rles.get(query))


def _region(box: Sequence[float] | np.ndarray, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a square around a box xyxy px, moved into the image as far as it fits."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0, 16) * _AROUND
    spans = []
    for low, high, length in ((x0, x1, size[1]), (y0, y1, size[0])):
        own = min(length, round(side))
        start = min(max(0, round((low + high - own) / 2)), length - own)
        spans.append((start, start + own))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _cut(
    image: np.ndarray,
    region: tuple[int, int, int, int],
    label: int,
    name: str,
    score: float | None,
    box: np.ndarray | None,
    rle: Rle | None,
) -> np.ndarray:
    """The region with one object, or none without a box, of about :data:`_SIDE_PX`."""
    left, top, right, bottom = region
    scale = _SIDE_PX / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    # Enlarged before it is drawn on, so that lines are as thin as in any picture.
    crop = cv2.resize(image[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR)
    masks = None
    if rle is not None:
        mask = mask_util.decode(rle)[top:bottom, left:right]
        masks = (cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5)[None]
    shown = [] if box is None else [box]
    objects = Objects(
        classes=[label] * len(shown),
        names=[name] * len(shown),
        scores=None if score is None else [score] * len(shown),
        boxes=np.array([(each - (left, top, left, top)) * scale for each in shown]).reshape(-1, 4),
        masks=masks if shown else None,
    )
    return draw_objects(crop, objects, width=size[0])


def write_report(
    path: Path,
    *,
    title: str,
    explained: Sequence[Explained],
    names: Sequence[str],
    scores: Sequence[TaskScores],
    examples: Examples,
    limits: Limits,
    with_masks: bool,
) -> None:
    """Write the report as HTML; ``scores`` are of boxes and, ``with_masks``, of masks."""
    stages, pictures = by_stage(explained), examples.pictures
    found = sum(each.last.outcome is Outcome.FOUND for each in explained)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{found} of {len(explained)} objects are found by detections that score at least {limits.score:g}, with an "
        f"IoU of at least {limits.fit:g} of {'box and mask. ' if with_masks else f'box. {BOXES_ALONE} '}"
        "What became of the others, had each stage been the last:</p>",
        _figure(draw_outcomes(stages)),
        _table(*outcome_table(stages, "stage")),
        "<h2>Examples</h2><p class=note>Left the object, right the query that came nearest to it in the last layer, "
        "with its highest score; empty where none came near.</p>",
        *(_example_row(each.value, pictures[each]) for each in Outcome if each in pictures),
        "<h2>By class and size</h2><p class=note>In the end. Small objects have fewer than 32 x 32 px, large ones at "
        "least 96 x 96.</p>",
        _table(*outcome_table(by_class(explained, names), "class")),
        "<br>",
        _table(*outcome_table(by_size(explained), "size")),
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
