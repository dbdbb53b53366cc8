"""Draws the polygons of Scalabel labels pixel by pixel as BDD100K's official bitmasks are drawn."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

from dimaskdino.data.rle import Size

PATH_CODES = {"L": Path.LINETO, "C": Path.CURVE4}
DOTS_PER_INCH = 72  # any: only widths of lines depend on it, and none are drawn


class PolygonPainter:
    """Paints polygons one after the other and returns the pixels that each covers.

    As in the official bitmasks, corners are rounded to whole pixels and a pixel belongs to a polygon that touches it.

    Args:
        size: height and width of the image.
    """

    def __init__(self, size: Size) -> None:
        height, width = size
        self._renderer = RendererAgg(width, height, DOTS_PER_INCH)
        self._upright = Affine2D().scale(1, -1).translate(0, height)
        self._look = self._renderer.new_gc()
        self._look.set_antialiased(False)
        self._look.set_snap(True)
        self._look.set_linewidth(0)

    def paint(self, outlines: list[Path]) -> np.ndarray:
        """Pixels (H, W) bool that any of the outlines covers."""
        self._renderer.clear()
        for outline in outlines:
            self._renderer.draw_path(self._look, outline, self._upright, (1.0, 1.0, 1.0))
        return np.asarray(self._renderer.buffer_rgba())[..., 3] > 0


def outline(part: dict[str, Any]) -> Path:
    """The closed path of one part of a label's ``poly2d``.

    Args:
        part: ``vertices`` (N, 2) in pixels and ``types``, a letter for each: L for a corner; C begins a cubic Bezier
            curve: that vertex and the next are its control points, and the one after them, or the first, is its end.

    Raises:
        ValueError: if it has fewer than three vertices, or they or their types are malformed.
    """
    try:
        vertices = np.array(part["vertices"], dtype=np.float64).reshape(-1, 2)
        codes = [PATH_CODES[letter] for letter in part["types"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("malformed") from None
    if len(vertices) < 3 or len(codes) != len(vertices) or not np.isfinite(vertices).all():
        raise ValueError("malformed or of fewer than three points")
    return Path(np.concatenate((vertices, vertices[:1])), [Path.MOVETO, *codes[1:], Path.LINETO])
