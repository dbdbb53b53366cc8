"""How a large picture is cut into tiles."""

import math
from dataclasses import dataclass

import numpy as np

from dimaskdino.errors import ConfigError

_TOUCH_PX = 2  # an object that comes this close to the seam may go on beyond it


@dataclass(frozen=True)
class Tiling:
    """Square tiles that overlap.

    Attributes:
        side: of a tile, px.
        overlap: share of the side that neighbors have in common. Objects up to this size are whole in some tile.

    Raises:
        ConfigError: a number out of range.
    """

    side: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        """Check the range of both."""
        if self.side < 16 or not 0 <= self.overlap <= 0.9:
            raise ConfigError(
                f"Tiles of {self.side} px with an overlap of {self.overlap} do not work: the side must be at least 16 "
                "px, the overlap between 0 and 0.9."
            )

    def tiles(self, size: tuple[int, int]) -> list["Tile"]:
        """Tiles that cover a picture of ``size`` (height, width), row by row, evenly spread."""
        rows, columns = (self._spans(length) for length in size)
        return [
            Tile(top, left, bottom, right, inner=(top > 0, left > 0, bottom < size[0], right < size[1]))
            for top, bottom in rows
            for left, right in columns
        ]

    def _spans(self, length: int) -> list[tuple[int, int]]:
        if length <= self.side:
            return [(0, length)]
        step = max(1.0, self.side * (1 - self.overlap))
        count = 1 + math.ceil((length - self.side) / step)
        starts = np.linspace(0, length - self.side, count).round().astype(int).tolist()
        return [(start, start + self.side) for start in starts]


@dataclass(frozen=True)
class Tile:
    """One tile, in px of the picture, and which of its sides (top, left, bottom, right) are seams."""

    top: int
    left: int
    bottom: int
    right: int
    inner: tuple[bool, bool, bool, bool]

    def touches_seam(self, boxes: np.ndarray, *, gap_px: float = _TOUCH_PX) -> np.ndarray:
        """(N,) bool: whether boxes (N, 4) xyxy px come closer to a seam than a gap, or lie beyond it."""
        gaps = np.stack(
            (boxes[:, 1] - self.top, boxes[:, 0] - self.left, self.bottom - boxes[:, 3], self.right - boxes[:, 2]),
            axis=1,
        )
        return ((gaps < gap_px) & np.array(self.inner)).any(1)

    def overlap(self, other: "Tile") -> tuple[int, int, int, int] | None:
        """What two tiles have in common, (left, top, right, bottom); None if nothing."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        return (left, top, right, bottom) if left < right and top < bottom else None
