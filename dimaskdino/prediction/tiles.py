"""Large pictures in tiles: whole objects across seams, each once."""

from collections.abc import Callable, Sequence

import numpy as np
from detectron2.structures import Boxes, Instances

from dimaskdino.prediction.canvases import Canvas
from dimaskdino.prediction.merging import merge_tiles
from dimaskdino.prediction.tiling import Tile, Tiling
from dimaskdino.structures import RleMasks
from dimaskdino.structures.rle_masks import Rle, crop_of, place_crop


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
