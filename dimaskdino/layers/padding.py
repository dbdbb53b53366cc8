"""Batches of images of different sizes: which part of every feature level shows an image rather than padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dimaskdino.layers.ms_deform_attn_reference import SpatialShapes
from dimaskdino.layers.position import pixel_centers


@dataclass(frozen=True)
class ValidCells:
    """The cells of each level that lie on the image; padding is below and to the right of them."""

    counts: Tensor  # (B, L, 2) float32, columns and rows of each level that lie on the image, at least 1
    ratios: Tensor  # (B, L, 2) float32 in (0, 1], their part of the level's width and height
    spatial_shapes: SpatialShapes  # (height, width) of each level

    @cached_property
    def is_padding(self) -> Tensor:
        """(B, N) bool, True for the cells of all levels that lie on padding."""
        levels = []
        for level, (height, width) in enumerate(self.spatial_shapes):
            columns, rows = self.counts[:, level, :, None].unbind(1)
            outside_x = torch.arange(width, device=columns.device) >= columns
            outside_y = torch.arange(height, device=rows.device) >= rows
            levels.append((outside_y[:, :, None] | outside_x[:, None]).flatten(1))
        return torch.cat(levels, dim=1)


@dataclass(frozen=True)
class PaddedBatch:
    """Images on a common canvas."""

    image_sizes: Sequence[tuple[int, int]]  # (height, width) of each image in px
    canvas: tuple[int, int]  # (height, width) of the canvas in px

    def valid_cells(self, spatial_shapes: SpatialShapes, device: torch.device) -> ValidCells | None:
        """The cells of levels of these sizes that lie on the images; None where every image fills the canvas.

        A cell lies on the image when the pixel that it shows under nearest-neighbor resizing of the canvas does.
        """
        if all(tuple(size) == tuple(self.canvas) for size in self.image_sizes):
            return None
        (canvas_height, canvas_width), sizes = self.canvas, self.image_sizes
        counts = [
            [(-(-w * columns // canvas_width), -(-h * rows // canvas_height)) for rows, columns in spatial_shapes]
            for h, w in sizes
        ]
        # Non-blocking: a blocking copy would wait for everything that the device has still to do.
        both = torch.tensor([counts, [[shape[::-1] for shape in spatial_shapes]] * len(sizes)], dtype=torch.float32)
        valid, all_cells = both.to(device, non_blocking=True)
        return ValidCells(valid, valid / all_cells, spatial_shapes)


def level_centers(spatial_shapes: SpatialShapes, device: torch.device, valid: ValidCells | None) -> list[Tensor]:
    """Centers of the cells of each level as (x, y) in parts of the image.

    Args:
        spatial_shapes: (height, width) of each level.
        device: where the result lives.
        valid: the cells on the images; None where there is no padding.

    Returns:
        For each level (1, h * w, 2) float32, or (B, h * w, 2) with padding, whose cells lie beyond 1.
    """
    centers = [pixel_centers(height, width, device)[None] for height, width in spatial_shapes]
    if valid is None:
        return centers
    return [center / valid.ratios[:, level, None] for level, center in enumerate(centers)]
