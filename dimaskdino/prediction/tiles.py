"""Large pictures in tiles: whole objects across seams, each once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from dimaskdino.errors import ConfigError
from dimaskdino.prediction.canvases import Canvas
from dimaskdino.structures import RleMasks
from dimaskdino.structures.rle_masks import Rle

_TOUCH_PX = 2  # an object that comes this close to the seam may go on beyond it
_CUT = 0.7  # factor of the score of a detection that a seam may cut, since it may be half an object
_MISSED = 0.5  # a score loses this much times the share of the tiles that see the object and do not find it
_WHOLE, _PART = 0.8, 0.5  # least scores of a replacement and of a further part, as a share of the cut detection's
_SAME_OBJECT_IOU = 0.5  # of two detections, in the region that both tiles see

Region = tuple[int, int, int, int]  # left, top, right, bottom, px


@dataclass(frozen=True)
class Tiling:
    """Square tiles that overlap; raises ConfigError for a number out of range."""

    side: int  # px
    overlap: float = 0.2  # share of the side that neighbors have in common; objects up to this size are whole in a tile

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

    def touches_seam(self, boxes: np.ndarray) -> np.ndarray:
        """(N,) bool: whether boxes (N, 4) xyxy px reach a seam, or lie beyond it."""
        gaps = np.stack(
            (boxes[:, 1] - self.top, boxes[:, 0] - self.left, self.bottom - boxes[:, 3], self.right - boxes[:, 2]),
            axis=1,
        )
        return ((gaps < _TOUCH_PX) & np.array(self.inner)).any(1)

    def overlap(self, other: "Tile") -> Region | None:
        """What two tiles have in common, (left, top, right, bottom); None if nothing."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        return (left, top, right, bottom) if left < right and top < bottom else None


def predict_tiles(
    canvas: Canvas, tiling: Tiling, predict: Callable[[Sequence[np.ndarray]], list[Instances]], batch_size: int
) -> Instances:
    """The objects of a picture by descending score, predicted ``batch_size`` tiles at a time; masks are RLE.

    ``predict`` takes a batch of (H, W, 3) uint8 RGB tiles, and gives the detections of each, masks as RLE.
    """
    tiles = tiling.tiles(canvas.size)
    found: list[Instances] = []
    for start in range(0, len(tiles), batch_size):
        batch = tiles[start : start + batch_size]
        pieces = [canvas.read(tile.top, tile.left, tile.bottom - tile.top, tile.right - tile.left) for tile in batch]
        found += [_place(each, tile, canvas.size) for each, tile in zip(predict(pieces), batch, strict=True)]
    tile_of = np.repeat(np.arange(len(tiles)), [len(each) for each in found])
    return merge_tiles(Instances.cat(found), tile_of, tiles)


def _place(found: Instances, tile: Tile, size: tuple[int, int]) -> Instances:
    """Move the detections of a tile to their place in the picture."""
    placed = Instances(size)
    for name, value in found.get_fields().items():
        if name == "pred_boxes":
            offset = value.tensor.new_tensor((tile.left, tile.top, tile.left, tile.top))
            placed.pred_boxes = Boxes(value.tensor + offset)
        elif name == "pred_masks":
            placed.pred_masks = RleMasks.of(value).placed(
                lambda crop, top, left: (crop, tile.top + top, tile.left + left), size
            )
        else:
            placed.set(name, value)
    return placed


def merge_tiles(found: Instances, tile_of: np.ndarray, tiles: Sequence[Tile]) -> Instances:
    """The objects by descending score: parts that seams cut are joined, and of several detections one is kept.

    ``found`` are the detections of all tiles in px of the picture; ``tile_of`` (N,) says which tile each is from.

    Two detections are the same object if they have the same class and overlap enough in the region that both tiles
    see. The one with the best score is kept. Scores are lowered for detections that a seam may cut, and for those that
    other tiles should have found and did not. If a seam cuts the best one, a whole detection that reaches beyond its
    tile replaces it, or parts from other tiles are added to it; either must score nearly as high.
    """
    merge = _Merge(found, tile_of, tiles)
    left = np.ones(len(found), dtype=bool)
    objects: list[list[int]] = []
    for best in np.argsort(-merge.scores, kind="stable").tolist():
        if left[best]:
            objects.append(merge.parts(best, left))
            for part in (best, *objects[-1]):
                left[[part, *merge.agreeing[part]]] = False
    return merge.joined(objects)


class _Merge:
    """Compares the detections of all tiles; takes the arguments of :func:`merge_tiles`.

    Attributes:
        scores: (N,) scores of the detections, lowered for seams and for tiles that missed the object.
        agreeing: for each detection, the detections of the same object by other tiles.
    """

    def __init__(self, found: Instances, tile_of: np.ndarray, tiles: Sequence[Tile]) -> None:
        self._found, self._tile_of, self._tiles = found, tile_of, tiles
        self._extents = _extents(found)
        self._rles: list[Rle] | None = found.pred_masks.rles if found.has("pred_masks") else None
        self._cut = np.zeros(len(found), dtype=bool)
        self._seen, self._missed = np.zeros(len(found)), np.zeros(len(found))
        self.agreeing: list[list[int]] = [[] for _ in range(len(found))]
        members = [np.flatnonzero(tile_of == number) for number in range(len(tiles))]
        corners = np.array([((tile.top, tile.left), (tile.bottom, tile.right)) for tile in tiles])
        for number, tile in enumerate(tiles):
            self._cut[members[number]] = tile.touches_seam(self._extents[members[number]])
            for other in np.flatnonzero((corners[:number, 1] > corners[number, 0]).all(1)).tolist():
                if region := tile.overlap(tiles[other]):
                    agree = self._agree(members[number], members[other], region)
                    self._compare(members[number], members[other], agree, tiles[other])
                    self._compare(members[other], members[number], agree.T, tile)
        missed = self._missed / (1 + self._seen)  # its own tile found it
        self.scores = found.scores.double().numpy() * np.where(self._cut, _CUT, 1) * (1 - _MISSED * missed)

    def _agree(self, first: np.ndarray, second: np.ndarray, region: Region) -> np.ndarray:
        """(n, m) bool: which detections of two tiles are the same object, given what both tiles see."""
        classes = self._found.pred_classes.numpy()
        low = np.maximum(self._extents[first, None, :2], self._extents[None, second, :2])
        high = np.minimum(self._extents[first, None, 2:], self._extents[None, second, 2:])
        agree = (low < high).all(2) & (classes[first, None] == classes[None, second])
        for row, column in np.argwhere(agree).tolist():
            agree[row, column] = self._iou_inside([first[row], second[column]], region) >= _SAME_OBJECT_IOU
        return agree

    def _iou_inside(self, pair: list[int], region: Region) -> float:
        """IoU of two detections' masks, or boxes, of their parts inside a region."""
        boxes = np.clip(self._extents[pair], 2 * region[:2], 2 * region[2:])
        shapes: Any = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        if self._rles is not None:
            shapes = [self._rles[index] for index in pair]
            if (boxes != self._extents[pair]).any():
                frame = _rectangle(region, self._found.image_size)
                shapes = [mask_util.merge([shape, frame], intersect=True) for shape in shapes]
        return float(mask_util.iou(shapes[:1], shapes[1:], [0])[0, 0])

    def _compare(self, own: np.ndarray, others: np.ndarray, agree: np.ndarray, tile: Tile) -> None:
        """Count whether another tile, with the detections ``others``, sees and misses the detections ``own``."""
        sees = _inside(self._extents[own], tile) & ~tile.touches_seam(self._extents[own])
        self._seen[own] += sees
        self._missed[own] += sees & ~agree.any(1)
        for row, column in np.argwhere(agree).tolist():
            self.agreeing[own[row]].append(int(others[column]))

    def parts(self, best: int, left: np.ndarray) -> list[int]:
        """The detections that make the object of its ``best`` one: the whole one, or parts from several tiles.

        Those that are not ``left`` (N,) belong to another object.
        """
        parts = [best]
        for part in parts if self._cut[best] else ():
            for other in sorted(self.agreeing[part], key=self.scores.__getitem__, reverse=True):
                least = (_PART if self._cut[other] else _WHOLE) * self.scores[best]
                tiles = (self._tiles[self._tile_of[each]] for each in parts)
                if (
                    left[other]
                    and self.scores[other] >= least
                    and not any(_inside(self._extents[[other]], tile)[0] for tile in tiles)
                ):
                    if not self._cut[other]:
                        return [other]
                    parts.append(other)
        return parts

    def joined(self, objects: list[list[int]]) -> Instances:
        """One detection for each object, by descending score."""
        found = self._found
        result = found[torch.tensor([parts[0] for parts in objects], dtype=torch.int64)]
        result.scores = torch.from_numpy(self.scores[[parts[0] for parts in objects]]).to(found.scores.dtype)
        boxes = [found.pred_boxes.tensor[parts] for parts in objects]
        unions = [torch.cat((each[:, :2].amin(0), each[:, 2:].amax(0))) for each in boxes]
        result.pred_boxes = Boxes(torch.stack(unions) if unions else found.pred_boxes.tensor[:0])
        if (rles := self._rles) is not None:
            masks = [mask_util.merge([rles[part] for part in parts]) for parts in objects]
            result.pred_masks = RleMasks(masks, found.image_size)
        return result[torch.argsort(-result.scores, stable=True)]


def _extents(found: Instances) -> np.ndarray:
    """Boxes around masks, or the predicted boxes of a model without masks."""
    boxes = found.pred_masks.get_bounding_boxes() if found.has("pred_masks") else found.pred_boxes
    return boxes.tensor.numpy().astype(np.float64)


@lru_cache(maxsize=1)
def _rectangle(region: Region, size: tuple[int, int]) -> Rle:
    left, top, right, bottom = region
    return mask_util.frPyObjects(np.array([[left, top, right - left, bottom - top]], dtype=np.float64), *size)[0]


def _inside(boxes: np.ndarray, tile: Tile) -> np.ndarray:
    low, high = np.array((tile.left, tile.top)), np.array((tile.right, tile.bottom))
    return np.all((boxes[:, :2] >= low) & (boxes[:, 2:] <= high), axis=1)
