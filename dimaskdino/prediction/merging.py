"""From the detections of overlapping tiles to one detection of each object."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from pycocotools import mask as mask_util

from dimaskdino.prediction.tiling import Tile
from dimaskdino.structures import RleMasks
from dimaskdino.structures.rle_masks import Rle, crop_of, place_crop

_COVERED = 0.7  # a part of an object goes if a better detection covers this share of it
_SAME_OBJECT_IOU = 0.5  # of two detections where both of their tiles see them
_AGREES = 0.75  # IoU with a whole view from which a detection at a seam is a view as well
_MISSED = 0.5  # what a tile counts in the score of an object that it holds whole and does not find


def merge_tiles(found: Instances, tile_of: np.ndarray, tiles: Sequence[Tile]) -> Instances:
    """Join the parts of objects that a seam cuts, and keep one of several detections of an object.

    A part that lies wholly inside another tile goes: that tile sees the object and its surroundings. Detections of
    neighbors are one object if they are of one class and agree where both tiles see them. Those of such a group that no
    seam cuts are averaged, weighted by their scores; their score is the root of the mean square, in which a tile that
    holds the object whole and does not find it counts half. If a seam cuts all of them, their masks or boxes are
    united, with the score of the largest part. What is then still a part goes if a better detection of its class covers
    most of it.

    Args:
        found: detections of all tiles, in px of the picture.
        tile_of: (N,) tile of each.
        tiles: all tiles.
    """
    extents = _extents(found)
    cut = np.zeros(len(found), dtype=bool)
    whole_elsewhere = np.zeros(len(found), dtype=bool)
    neighbors = {
        number: [other for other, tile in enumerate(tiles) if other != number and tile.overlap(tiles[number])]
        for number in np.unique(tile_of).tolist()
    }
    for number, others in neighbors.items():
        (own,) = np.nonzero(tile_of == number)
        cut[own] = tiles[number].touches_seam(extents[own])
        for other in others:
            whole_elsewhere[own] |= ~tiles[other].touches_seam(extents[own])
    open_ended = cut & ~whole_elsewhere
    shapes = _Shapes(found, extents)
    groups = _Groups(tile_of)
    for _, first, second in sorted(_pairs(found, tile_of, extents, open_ended, tiles, neighbors, shapes), reverse=True):
        groups.join(first, second)
    return _joined(found, list(groups.members()), cut, open_ended, shapes, tile_of, tiles)


def _extents(found: Instances) -> np.ndarray:
    """The predicted boxes, which stray pixels of a mask do not enlarge."""
    return found.pred_boxes.tensor.numpy().astype(np.float64)


def _pairs(
    found: Instances,
    tile_of: np.ndarray,
    extents: np.ndarray,
    open_ended: np.ndarray,
    tiles: Sequence[Tile],
    neighbors: dict[int, list[int]],
    shapes: "_Shapes",
) -> Iterator[tuple[float, int, int]]:
    """(agreement, first, second) of detections in neighboring tiles that are one object."""
    classes, boxes = found.pred_classes.numpy(), torch.from_numpy(extents)
    members = {number: np.nonzero(tile_of == number)[0] for number in neighbors}
    for number, others in neighbors.items():
        for other in (other for other in others if other > number and other in members):
            region = tiles[number].overlap(tiles[other])
            assert region is not None
            first, second = members[number], members[other]
            ious = pairwise_iou(Boxes(boxes[first]), Boxes(boxes[second])).numpy()
            may_be_one = (ious > 0) & (classes[first, None] == classes[None, second])
            frame = shapes.frame(region)
            for row, column in zip(*np.nonzero(may_be_one), strict=True):
                pair = int(first[row]), int(second[column])
                # Of two that may be whole, the boxes must agree; of others what both tiles see of them.
                whole = not open_ended[list(pair)].any()
                agreement = float(ious[row, column]) if whole else shapes.iou_inside(*pair, frame)
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
        self.rles: list[Rle] | None = list(found.pred_masks.rles) if found.has("pred_masks") else None

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

    def replace(self, index: int, members: Sequence[int], weights: np.ndarray | None = None) -> None:
        """Put the masks of several detections together: all of them, or what most of the weights agree on."""
        if self.rles is not None:
            masks = [self.rles[member] for member in members]
            self.rles[index] = mask_util.merge(masks) if weights is None else _vote(masks, weights)

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


def _joined(
    found: Instances,
    groups: list[list[int]],
    cut: np.ndarray,
    open_ended: np.ndarray,
    shapes: "_Shapes",
    tile_of: np.ndarray,
    tiles: Sequence[Tile],
) -> Instances:
    """One detection for each group, by descending score."""
    scores, boxes = (np.array(each, dtype=np.float64) for each in (found.scores, found.pred_boxes.tensor))
    own_tile = [tiles[number] for number in tile_of.tolist()]
    chosen = np.zeros(len(groups), dtype=np.int64)
    views = np.zeros(len(groups), dtype=np.int64)  # that see the object whole
    has_whole = np.array([not cut[group].all() for group in groups], dtype=bool)
    for place, group in enumerate(groups):
        whole = _views([index for index in group if not open_ended[index]], boxes, scores, cut, own_tile)
        best = max(whole, key=scores.__getitem__) if whole else max(group, key=shapes.area)
        chosen[place], views[place] = best, len(whole)
        if len(whole) > 1:
            weights = scores[whole]
            shapes.replace(best, whole, weights)
            boxes[best], scores[best] = weights @ boxes[whole] / weights.sum(), np.sqrt(np.square(weights).mean())
        elif not whole and len(group) > 1:
            shapes.replace(best, group)
            boxes[best] = np.concatenate((boxes[group, :2].min(0), boxes[group, 2:].max(0)))
    boxes, scores, parts = boxes[chosen], scores[chosen], ~has_whole
    could_see = sum((~tile.touches_seam(boxes)).astype(np.int64) for tile in tiles)
    scores /= np.sqrt(1 + _MISSED * np.maximum(could_see - views, 0) / np.maximum(views, 1))
    order = np.argsort(-scores, kind="stable")
    found = found[torch.from_numpy(chosen[order])]
    found.pred_boxes = Boxes(torch.from_numpy(boxes[order]).float())
    found.scores = torch.from_numpy(scores[order]).float()
    if shapes.rles is not None:
        found.pred_masks = RleMasks([shapes.rles[index] for index in chosen[order].tolist()], found.image_size)
    return found[torch.from_numpy(~_covered(found, parts[order]))]


def _views(
    members: list[int], boxes: np.ndarray, scores: np.ndarray, cut: np.ndarray, tile_of: Sequence[Tile]
) -> list[int]:
    """The members that see an object whole: those that no seam cuts, and those at a seam that agree with them."""
    uncut = [index for index in members if not cut[index]]
    if not uncut or len(uncut) == len(members):
        return members
    best = boxes[[max(uncut, key=scores.__getitem__)]]
    ious = pairwise_iou(Boxes(torch.from_numpy(boxes[members])), Boxes(torch.from_numpy(best)))[:, 0].tolist()
    return [
        index
        for index, iou in zip(members, ious, strict=True)
        if not cut[index] or (iou >= _AGREES and not tile_of[index].touches_seam(best, gap_px=-0.5)[0])
    ]


def _vote(rles: Sequence[Rle], weights: np.ndarray) -> Rle:
    """The pixels that masks of at least half of the ``weights`` hold."""
    crops = [crop_of(rle) for rle in rles]
    top, left = min(y for _, y, _ in crops), min(x for _, _, x in crops)
    bottom = max(y + crop.shape[0] for crop, y, _ in crops)
    right = max(x + crop.shape[1] for crop, _, x in crops)
    votes = np.zeros((bottom - top, right - left))
    for (crop, y, x), weight in zip(crops, weights.tolist(), strict=True):
        votes[y - top : y - top + crop.shape[0], x - left : x - left + crop.shape[1]] += weight * crop
    return place_crop(votes >= weights.sum() / 2, top, left, rles[0]["size"])


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
