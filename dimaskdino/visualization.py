"""Pictures of what is there and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLUMNS = ("input", "ground truth", "prediction")
INCHES_PER_PICTURE = 3.2
MASK_OPACITY = 0.45


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects of one image: masks (N, H, W) bool, boxes (N, 4) xyxy px, a text and a class index for each."""

    masks: np.ndarray
    boxes: np.ndarray
    texts: Sequence[str]
    classes: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image (H, W, 3) uint8 RGB with its true and its predicted objects."""

    image: np.ndarray
    truth: Objects
    found: Objects


def save_grid(rows: Sequence[Row], path: str | Path, *, num_classes: int) -> None:
    """Draw input, ground truth and prediction side by side, an image a row, and write a PNG.

    Args:
        rows: at least one image.
        path: of the PNG; its folder exists.
        num_classes: each class keeps one colour of so many.
    """
    size = (INCHES_PER_PICTURE * len(COLUMNS), INCHES_PER_PICTURE * len(rows) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for title, axes in zip(COLUMNS, grid[0], strict=True):
        axes.set_title(title)
    for axes_of_row, row in zip(grid, rows, strict=True):
        for axes, objects in zip(axes_of_row, (None, row.truth, row.found), strict=True):
            axes.imshow(row.image if objects is None else _with_masks(row.image, objects, num_classes))
            axes.set_axis_off()
            if objects is not None:
                _draw_boxes(axes, objects, num_classes)
    figure.savefig(path, dpi=110)


def class_colour(index: int, num_classes: int) -> np.ndarray:
    """A bright colour (3,) in [0, 1], different for each class."""
    return hsv_to_rgb((index / max(num_classes, 1), 0.85, 1.0))


def _with_masks(image: np.ndarray, objects: Objects, num_classes: int) -> np.ndarray:
    """The image (H, W, 3) in [0, 1] with every mask tinted and its rim drawn, the largest first."""
    picture = image.astype(np.float64) / 255
    for index in np.argsort(-objects.masks.sum((1, 2))):
        mask, colour = objects.masks[index], class_colour(objects.classes[index], num_classes)
        picture[mask] = (1 - MASK_OPACITY) * picture[mask] + MASK_OPACITY * colour
        picture[mask & ~_eroded(mask)] = colour
    return picture


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels of ``mask`` (H, W) whose four neighbours belong to it too; outside the image counts as inside."""
    padded = np.pad(mask, 1, constant_values=True)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _draw_boxes(axes: Axes, objects: Objects, num_classes: int) -> None:
    for (x0, y0, x1, y1), text, label in zip(objects.boxes, objects.texts, objects.classes, strict=True):
        colour = class_colour(label, num_classes)
        # Pixel centres lie on whole numbers in matplotlib, and on halves in a box.
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
        axes.text(
            max(x0 - 0.5, 0),
            max(y0 - 1, 0),
            text,
            fontsize=6.5,
            color="black",
            verticalalignment="bottom" if y0 > 4 else "top",
            clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.85, "pad": 0.6},
        )
