"""COCO labels of visible masks: polygons for masks without holes, RLE for the others."""

from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.structures.rle_masks import as_text

Corner = tuple[int, int]  # (x, y), a corner between pixels


def visible_object(mask: np.ndarray) -> dict[str, Any]:
    """``segmentation``, ``area`` (px^2) and ``bbox`` (x, y, width, height; px) of a mask (H, W) bool with any pixel.

    The segmentation, polygons or a compressed RLE where the mask has a hole, rasterizes to exactly ``mask``.
    """
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    left, top, width, height = (int(value) for value in mask_util.toBbox(rle))
    outlines = trace_outlines(mask[top : top + height, left : left + width])
    if any(_signed_area(outline) < 0 for outline in outlines):
        segmentation: Any = as_text(rle)
    else:
        segmentation = [[float(c) for x, y in outline for c in (left + x, top + y)] for outline in outlines]
    return {
        "segmentation": segmentation,
        "area": int(mask_util.area(rle)),
        "bbox": [float(left), float(top), float(width), float(height)],
        "iscrowd": 0,
    }


def trace_outlines(mask: np.ndarray) -> list[list[Corner]]:
    """The borders between the pixels of a mask (H, W) bool and the rest, each a closed polygon of its turning corners.

    Their signed area is positive around a piece of the mask, negative around a hole. Pixels that touch only in a corner
    count as apart, so that no outline crosses itself.
    """
    steps = _border_steps(mask)
    outlines = []
    while steps:
        start = next(iter(steps))
        outline: list[Corner] = []
        corner, direction = start, steps[start][0]
        while True:
            choices = steps[corner]
            # The right turn where two pixels touch in a corner: it stays with the pixel that the walk came along.
            right = (-direction[1], direction[0])
            step = right if right in choices else choices[0]
            choices.remove(step)
            if not choices:
                del steps[corner]
            if step != direction or corner == start:
                outline.append(corner)
            direction = step
            corner = (corner[0] + step[0], corner[1] + step[1])
            if corner == start:
                break
        outlines.append(outline)
    return outlines


def _border_steps(mask: np.ndarray) -> dict[Corner, list[Corner]]:
    """Corner -> unit steps that leave it with the mask on their right (as seen in a picture whose y points down)."""
    padded = np.pad(mask, 1).astype(np.int8)
    horizontal = np.diff(padded, axis=0)[:, 1:-1]
    vertical = np.diff(padded, axis=1)[1:-1, :]
    steps: dict[Corner, list[Corner]] = {}
    # A top border runs right, a bottom border left; a right border runs down, a left border up.
    for edges, sign, offset, step in (
        (horizontal, 1, (0, 0), (1, 0)),
        (horizontal, -1, (1, 0), (-1, 0)),
        (vertical, -1, (0, 0), (0, 1)),
        (vertical, 1, (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(edges == sign).tolist():
            steps.setdefault((x + offset[0], y + offset[1]), []).append(step)
    return steps


def _signed_area(outline: list[Corner]) -> float:
    """Shoelace formula; positive for a clockwise outline in a picture whose y points down."""
    x, y = np.array(outline).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
