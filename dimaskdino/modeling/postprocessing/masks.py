"""Mask logits to masks at the asked size, in bounded memory, as bitmaps or straight to RLE."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from dimaskdino.errors import check_choice
from dimaskdino.layers.ms_deform_attn_ops import use_loops
from dimaskdino.structures import MaskLogits, RleMasks
from dimaskdino.structures.rle_masks import Size, rle_from_edges, run_edges

INTERPOLATIONS = ("two_step", "direct")
FORMATS = ("bitmask", "rle")
_BYTES_PER_PIXEL = 20  # of a mask while it is made: logits of two sizes, probabilities, their product, the bitmap


def resized_masks(logits: Tensor, steps: Sequence[tuple[Size, Size]], masks: Tensor) -> Tensor:
    """Interpolate logits bilinearly, step by step, and keep where they are positive.

    The steps of an axis are joined to one sum of cells first, so that no map between them is ever made.

    Args:
        logits: (N, h, w) float32.
        steps: (size after the step, part of it that is kept), each (height, width) in px.
        masks: (N, H, W) bool of the last kept size, which is filled.

    Returns:
        (N,) mean probability inside each mask; 0 for an empty one.
    """
    axes: list[Tensor] = []
    for axis, cells in enumerate(logits.shape[1:]):
        axes += _taps(cells, [(size[axis], kept[axis]) for size, kept in steps])
    probability, area = torch.ops.dimaskdino.resized_masks(logits, *axes, masks).unbind(1)
    return probability / (area + 1e-6)


def _taps(cells: int, steps: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Which cells make each pixel of an axis, (taps, pixels) int32, and their weights, float32."""
    index, weights = torch.arange(cells)[None], torch.ones(1, cells)
    for size, kept in steps:
        # As torch.nn.functional.interpolate without aligned corners, in its precision.
        place = ((torch.arange(size, dtype=torch.float32) + 0.5) * (cells / size) - 0.5).clamp(min=0)
        lower = place.long().clamp(max=cells - 1)
        upper, share = (lower + 1).clamp(max=cells - 1), place - lower
        lower, upper, share = lower[:kept], upper[:kept], share[:kept]
        index = torch.cat((index[:, lower], index[:, upper]))
        weights = torch.cat((weights[:, lower] * (1 - share), weights[:, upper] * share))
        cells = kept
    return index.int().contiguous(), weights.contiguous()


@dataclass(frozen=True)
class Frame:
    """The sizes that a mask passes through, each (height, width) in px."""

    padded: Size  # of the padded batch, whose size the mask logits cover
    image: Size  # of the image before padding
    output: Size  # of the result

    def on_canvas(self, maps: Tensor) -> Tensor:
        """Maps (N, h, w) at the padded size."""
        return _resize(maps, self.padded)

    def crop_and_resize(self, maps: Tensor) -> Tensor:
        """Maps (N, H, W) of the padded size, cut to the image, at the size of the result."""
        maps = maps[..., : self.image[0], : self.image[1]]
        return maps if self.image == self.output else _resize(maps, self.output)

    def logits(
        self, predicted: MaskLogits, image: int, queries: Tensor, *, memory_mb: int, crop: bool = True
    ) -> Iterator[Tensor]:
        """Resized mask logits of some queries of one image, a few at a time.

        Args:
            predicted: of the batch.
            image: index in the batch.
            queries: (N,) int64.
            memory_mb: about what a chunk needs, in MiB.
            crop: at the size of the result; otherwise at the padded size.

        Yields:
            (n, H, W) float32 logits of the next n queries.
        """
        largest = max(math.prod(self.padded), math.prod(self.output))
        for chunk in queries.split(max(1, memory_mb * 2**20 // _BYTES_PER_PIXEL // largest)):
            maps = self.on_canvas(predicted.select(image, chunk).float())
            yield self.crop_and_resize(maps) if crop else maps


def _resize(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@dataclass(frozen=True, kw_only=True)
class MaskRendering:
    """How masks are made."""

    # ``two_step`` resizes the logits to the padded size, crops, and resizes to the asked size, as the releases do;
    # ``direct`` interpolates once, and only where a mask is, which differs in few pixels
    interpolation: str = "two_step"
    format: str = "bitmask"  # ``bitmask`` for a (N, H, W) bool tensor, or ``rle`` for :class:`RleMasks`
    memory_mb: int = 256  # masks are made in chunks that need about this much memory, in MiB

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "MaskRendering":
        """Read MODEL.MaskDINO.TEST.MASK_*.

        Raises:
            ConfigError: a value that is not one of the choices.
        """
        node, prefix = cfg.MODEL.MaskDINO.TEST, "MODEL.MaskDINO.TEST."
        check_choice(f"{prefix}MASK_INTERPOLATION", node.MASK_INTERPOLATION, INTERPOLATIONS)
        check_choice(f"{prefix}MASK_FORMAT", node.MASK_FORMAT, FORMATS)
        return cls(interpolation=node.MASK_INTERPOLATION, format=node.MASK_FORMAT, memory_mb=node.MASK_MEMORY_MB)

    def __call__(
        self, predicted: MaskLogits, image: int, queries: Tensor, frame: Frame
    ) -> tuple[Tensor | RleMasks, Tensor]:
        """Make the masks of some queries of one image.

        Args:
            predicted: factors of the logits.
            image: index in the batch.
            queries: (N,) int64.
            frame: the sizes.

        Returns:
            The masks, and the mean probability inside each, (N,) float32; 0 for an empty one.
        """
        canvas = _Rles(frame.output, len(queries)) if self.format == "rle" else _Bitmaps(frame.output, queries)
        pixels = self.memory_mb * 2**20 // _BYTES_PER_PIXEL
        per_mask = math.prod(predicted.features.shape[-2:])
        qualities, done = [queries.new_zeros(0, dtype=torch.float32)], 0
        if self.interpolation == "two_step":
            largest = max(math.prod(frame.padded), math.prod(frame.output))
            # The loops need nothing of the larger sizes but the bitmap.
            per_mask = max(per_mask, math.ceil(largest / _BYTES_PER_PIXEL) if use_loops(qualities[0]) else largest)
        for chunk in queries.split(max(1, pixels // per_mask)):
            logits = predicted.select(image, chunk).float()
            make = _two_step if self.interpolation == "two_step" else _direct
            qualities.append(make(logits, frame, canvas, done, pixels))
            done += len(chunk)
        return canvas.result(), torch.cat(qualities)


TWO_STEP = MaskRendering()


def _two_step(logits: Tensor, frame: Frame, canvas: "_Canvas", first: int, _: int) -> Tensor:
    """Resize (N, h, w) logits to the padded size, crop, and resize to the asked size; returns the qualities (N,)."""
    if use_loops(logits):
        masks = canvas.room(first, len(logits))
        steps = [(frame.padded, frame.image), *([(frame.output, frame.output)] if frame.image != frame.output else [])]
        qualities = resized_masks(logits, steps, masks)
        canvas.add_all(first, masks)
        return qualities
    logits = frame.crop_and_resize(frame.on_canvas(logits))
    masks = logits > 0
    for number, mask in enumerate(masks, start=first):
        canvas.add(number, mask, 0, 0)
    return (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)


def _direct(logits: Tensor, frame: Frame, canvas: "_Canvas", first: int, pixels: int) -> Tensor:
    """Interpolate (N, h, w) logits once, only around what is positive, at most ``pixels`` at a time."""
    sizes = zip(logits.shape[-2:], frame.padded, frame.image, frame.output, strict=True)
    rows, columns = (_Axis.of(*each, logits.device) for each in sizes)
    positive = logits > 0
    row_spans, column_spans = rows.spans(positive.any(2)), columns.spans(positive.any(1))
    qualities = logits.new_zeros(len(logits))
    for index, (each, (top, bottom), (left, right)) in enumerate(zip(logits, row_spans, column_spans, strict=True)):
        total = area = logits.new_zeros(())
        step = max(1, pixels // max(1, bottom - top))
        for start in range(left, right, step):
            strip = rows.interpolate(columns.interpolate(each, 1, start, min(start + step, right)), 0, top, bottom)
            mask = strip > 0
            canvas.add(first + index, mask, top, start)
            total, area = total + (strip.sigmoid() * mask).sum(), area + mask.sum()
        qualities[index] = total / (area + 1e-6)
    return qualities


@dataclass(frozen=True)
class _Axis:
    """Linear interpolation along one axis, from cells of the logits to pixels of the result."""

    lower: Tensor  # (n,) int64, cell before the center of each pixel
    upper: Tensor  # (n,) int64, cell after it
    weight: Tensor  # (n,) float32, of the cell after it

    @classmethod
    def of(cls, cells: int, padded: int, image: int, output: int, device: torch.device) -> "_Axis":
        centers = (torch.arange(output, device=device, dtype=torch.float64) + 0.5) * (image / output)
        place = (centers * (cells / padded) - 0.5).clamp(0, cells - 1)
        lower = place.long()
        return cls(lower, (lower + 1).clamp(max=cells - 1), (place - lower).float())

    def spans(self, occupied: Tensor) -> list[tuple[int, int]]:
        """For each row of ``occupied`` (N, cells) bool, the range of pixels that an occupied cell reaches."""
        first = occupied.int().argmax(1)
        last = occupied.shape[1] - 1 - occupied.flip(1).int().argmax(1)
        begin = torch.searchsorted(self.upper, first)
        end = torch.searchsorted(self.lower, last, right=True)
        end = torch.where(occupied.any(1), end, begin)
        return list(zip(begin.tolist(), end.tolist(), strict=True))

    def interpolate(self, values: Tensor, dim: int, begin: int, end: int) -> Tensor:
        """Values at the pixels ``begin`` to ``end``."""
        shape = (-1, 1) if dim == 0 else (1, -1)
        lower, upper = (values.index_select(dim, cells[begin:end]) for cells in (self.lower, self.upper))
        return torch.lerp(lower, upper, self.weight[begin:end].view(shape))


class _Bitmaps:
    """Collects pieces of masks as bitmaps."""

    def __init__(self, size: Size, queries: Tensor) -> None:
        self._bitmaps = queries.new_zeros((len(queries), *size), dtype=torch.bool)

    def add(self, number: int, piece: Tensor, top: int, left: int) -> None:
        """Add a piece (h, w) bool of a mask at its place."""
        self._bitmaps[number, top : top + piece.shape[0], left : left + piece.shape[1]] = piece

    def room(self, first: int, count: int) -> Tensor:
        """(count, H, W) bool to be filled with some whole masks, for :meth:`add_all`."""
        return self._bitmaps[first : first + count]

    def add_all(self, first: int, masks: Tensor) -> None:
        """Whole masks from :meth:`room`, which are where they belong."""

    def result(self) -> Tensor:
        return self._bitmaps


class _Rles:
    """Collects pieces of masks as run lengths; those of a mask come from left to right, each of whole columns."""

    def __init__(self, size: Size, count: int) -> None:
        self._size = size
        self._edges = [[np.zeros(0, dtype=np.int64)] for _ in range(count)]

    def add(self, number: int, piece: Tensor, top: int, left: int) -> None:
        """Add a piece (h, w) bool of a mask at its place."""
        self._edges[number].append(run_edges(piece.cpu().numpy(), top, left, self._size[0]))

    def room(self, first: int, count: int) -> Tensor:
        """(count, H, W) bool to be filled with some whole masks, for :meth:`add_all`."""
        return torch.empty((count, *self._size), dtype=torch.bool)

    def add_all(self, first: int, masks: Tensor) -> None:
        """Add whole masks (n, H, W) bool."""
        for number, mask in enumerate(masks, start=first):
            self.add(number, mask, 0, 0)

    def result(self) -> RleMasks:
        return RleMasks([rle_from_edges(np.concatenate(edges), self._size) for edges in self._edges], self._size)


_Canvas = _Bitmaps | _Rles
