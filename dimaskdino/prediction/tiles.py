"""Large pictures in tiles: whole objects across seams, each once."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from dimaskdino.errors import ConfigError
from dimaskdino.prediction.canvases import Canvas
from dimaskdino.structures import RleMasks
from dimaskdino.structures.rle_masks import Rle, crop_of, place_crop

_TOUCH_PX = 2  # an object that comes this close to the seam may go on beyond it
_COVERED = 0.7  # a part of an object goes if a better detection covers this share of it
_SAME_OBJECT_IOU = 0.5  # of two detections where both of their tiles see them


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

    def touches_seam(self, boxes: np.ndarray) -> np.ndarray:
        """(N,) bool: whether boxes (N, 4) xyxy px reach a seam, or lie beyond it."""
        gaps = np.stack(
            (boxes[:, 1] - self.top, boxes[:, 0] - self.left, self.bottom - boxes[:, 3], self.right - boxes[:, 2]),
            axis=1,
        )
        return ((gaps < _TOUCH_PX) & np.array(self.inner)).any(1)

    def overlap(self, other: "Tile") -> tuple[int, int, int, int] | None:
        """What two tiles have in common, (left, top, right, bottom); None if nothing."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        return (left, top, right, bottom) if left < right and top < bottom else None


def predict_tiles(
    canvas: Canvas, tiling: Tiling, predict: Callable[[Sequence[np.ndarray]], list[Instances]], batch_size: int
) -> Instances:
    """Predict a picture tile by tile.

    Args:
        canvas: the picture.
        tiling: how it is cut.
        predict: a batch of (H, W, 3) uint8 RGB tiles to detections, masks as RLE.
        batch_size: tiles in a batch.

    Returns:
        The objects of the picture by descending score, masks as RLE.
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
            placed.pred_masks = RleMasks([_moved(rle, tile, size) for rle in RleMasks.of(value).rles], size)
        else:
            placed.set(name, value)
    return placed


def _moved(rle: Rle, tile: Tile, size: tuple[int, int]) -> Rle:
    crop, top, left = crop_of(rle)
    return place_crop(crop, tile.top + top, tile.left + left, size)


def merge_tiles(found: Instances, tile_of: np.ndarray, tiles: Sequence[Tile]) -> Instances:
    """Join the parts of objects that a seam cuts, and keep one of several detections of an object.

    A part that lies wholly inside another tile goes: that tile sees the object and its surroundings. Detections of
    neighbors are one object if they are of one class and agree where both tiles see them. Of such a group the best
    detection that no seam cuts is kept; if there is none, the union of its masks or boxes, with the score of the
    largest part. What is then still a part goes if a better detection of its class covers most of it.

    Args:
        found: detections of all tiles, in px of the picture.
        tile_of: (N,) tile of each.
        tiles: all tiles.
    """
    extents = _extents(found)
    cut = np.zeros(len(found), dtype=bool)
    redundant = np.zeros(len(found), dtype=bool)
    neighbors = {
        number: [other for other, tile in enumerate(tiles) if other != number and tile.overlap(tiles[number])]
        for number in np.unique(tile_of).tolist()
    }
    for number, others in neighbors.items():
        (own,) = np.nonzero(tile_of == number)
        cut[own] = tiles[number].touches_seam(extents[own])
        for other in others:
            redundant[own] |= cut[own] & _inside(extents[own], tiles[other]) & ~tiles[other].touches_seam(extents[own])
    found, tile_of, extents, cut = (
        found[torch.from_numpy(~redundant)],
        *(a[~redundant] for a in (tile_of, extents, cut)),
    )
    shapes = _Shapes(found, extents)
    groups = _Groups(tile_of)
    for _, first, second in sorted(_pairs(found, tile_of, extents, tiles, neighbors, shapes), reverse=True):
        groups.join(first, second)
    return _joined(found, list(groups.members()), cut, shapes)


def _extents(found: Instances) -> np.ndarray:
    """Boxes around masks, or the predicted boxes of a model without masks."""
    boxes = found.pred_masks.get_bounding_boxes() if found.has("pred_masks") else found.pred_boxes
    return boxes.tensor.numpy().astype(np.float64)


def _inside(boxes: np.ndarray, tile: Tile) -> np.ndarray:
    low, high = np.array((tile.left, tile.top)), np.array((tile.right, tile.bottom))
    return np.all((boxes[:, :2] >= low) & (boxes[:, 2:] <= high), axis=1)


def _pairs(
    found: Instances,
    tile_of: np.ndarray,
    extents: np.ndarray,
    tiles: Sequence[Tile],
    neighbors: dict[int, list[int]],
    shapes: "_Shapes",
) -> Iterator[tuple[float, int, int]]:
    """(agreement, first, second) of detections in neighboring tiles that are one object."""
    classes = found.pred_classes.numpy()
    members = {number: np.nonzero(tile_of == number)[0] for number in neighbors}
    for number, others in neighbors.items():
        for other in (other for other in others if other > number and other in members):
            region = tiles[number].overlap(tiles[other])
            assert region is not None
            first, second = members[number], members[other]
            low = np.maximum(extents[first, None, :2], extents[None, second, :2])
            high = np.minimum(extents[first, None, 2:], extents[None, second, 2:])
            frame = shapes.frame(region)
            may_be_one = (low < high).all(2) & (classes[first, None] == classes[None, second])
            for row, column in zip(*np.nonzero(may_be_one), strict=True):
                pair = int(first[row]), int(second[column])
                agreement = shapes.iou_inside(*pair, frame)
                if agreement >= _SAME_OBJECT_IOU:
                    yield agreement, *pair


class _Shapes:
    """Masks of detections, or boxes where there are no masks, as sets of pixels.

    Args:
        found: the detections.
        extents: (N, 4) boxes around them.
    """

    def __init__(self, found: Instances, extents: np.ndarray) -> None:
        self._size = found.image_size
        self._extents = extents
        self.rles: list[Rle] | None = found.pred_masks.rles if found.has("pred_masks") else None

    def frame(self, region: tuple[int, int, int, int]) -> Any:
        """A region (left, top, right, bottom) as :meth:`iou_inside` takes it."""
        if self.rles is None:
            return region
        left, top, right, bottom = region
        box = np.array([[left, top, right - left, bottom - top]], dtype=np.float64)
        return mask_util.frPyObjects(box, *self._size)[0]

    def iou_inside(self, first: int, second: int, frame: Any) -> float:
        """IoU of two detections, of their parts inside a frame."""
        if self.rles is None:
            low, high = np.array(frame[:2]), np.array(frame[2:])
            one, other = (
                np.concatenate((self._extents[each, :2].clip(low, high), self._extents[each, 2:].clip(low, high)))
                for each in (first, second)
            )
            both = np.concatenate((np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])))
            common = _area(both)
            return common / max(_area(one) + _area(other) - common, 1e-9)
        inside = [mask_util.merge([self.rles[each], frame], intersect=True) for each in (first, second)]
        return float(mask_util.iou([inside[0]], [inside[1]], [0])[0, 0]) if all(map(mask_util.area, inside)) else 0.0

    def area(self, index: int) -> float:
        """Size of a detection, px."""
        return _area(self._extents[index]) if self.rles is None else float(mask_util.area(self.rles[index]))


def _area(box: np.ndarray) -> float:
    return float(np.maximum(box[2:] - box[:2], 0).prod())


class _Groups:
    """Detections that are one object; a tile has one detection at most in a group."""

    def __init__(self, tile_of: np.ndarray) -> None:
        self._group_of = list(range(len(tile_of)))
        self._members = {index: [index] for index in range(len(tile_of))}
        self._tiles = {index: {int(tile)} for index, tile in enumerate(tile_of)}

    def join(self, first: int, second: int) -> None:
        one, other = self._group_of[first], self._group_of[second]
        if one == other or self._tiles[one] & self._tiles[other]:
            return
        for index in self._members[other]:
            self._group_of[index] = one
        self._members[one] += self._members.pop(other)
        self._tiles[one] |= self._tiles.pop(other)

    def members(self) -> Iterator[list[int]]:
        yield from self._members.values()


def _joined(found: Instances, groups: list[list[int]], cut: np.ndarray, shapes: _Shapes) -> Instances:
    """One detection for each group, by descending score."""
    scores = found.scores.numpy()
    chosen, parts, boxes, rles = [], [], found.pred_boxes.tensor.clone(), list(shapes.rles or ())
    for group in groups:
        whole = [index for index in group if not cut[index]]
        best = max(whole, key=scores.__getitem__) if whole else max(group, key=shapes.area)
        if not whole and len(group) > 1:
            own = boxes[group]
            boxes[best] = torch.cat((own[:, :2].amin(0), own[:, 2:].amax(0)))
            if shapes.rles is not None:
                rles[best] = mask_util.merge([shapes.rles[index] for index in group])
        chosen.append(best)
        parts.append(not whole)
    found.pred_boxes = Boxes(boxes)
    if found.has("pred_masks"):
        found.pred_masks = RleMasks(rles, found.image_size)
    order = sorted(range(len(chosen)), key=lambda place: -scores[chosen[place]])
    found = found[torch.tensor([chosen[place] for place in order], dtype=torch.int64)]
    return found[torch.from_numpy(~_covered(found, np.array([parts[place] for place in order], dtype=bool)))]


def _covered(found: Instances, parts: np.ndarray) -> np.ndarray:
    """(N,) bool: parts of objects, most of which a better detection of their class covers."""
    extents, classes = _extents(found), found.pred_classes.numpy()
    covered = np.zeros(len(found), dtype=bool)
    for index in np.flatnonzero(parts).tolist():
        low = np.maximum(extents[:index, :2], extents[index, :2])
        high = np.minimum(extents[:index, 2:], extents[index, 2:])
        near = np.flatnonzero((low < high).all(1) & (classes[:index] == classes[index]) & ~covered[:index])
        if len(near) and found.has("pred_masks"):
            rles = found.pred_masks.rles
            shares = mask_util.iou([rles[index]], [rles[other] for other in near.tolist()], [1] * len(near))
            covered[index] = mask_util.area(rles[index]) == 0 or shares.max() >= _COVERED
        elif len(near):
            common = (high - low)[near].prod(1)
            covered[index] = common.max() >= _COVERED * max(_area(extents[index]), 1e-9)
    return covered
