"""Mask logits to masks at the asked size, in bounded memory, as bitmaps or straight to RLE."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from dimaskdino.errors import check_choice
from dimaskdino.layers.ms_deform_attn_ops import use_loops
from dimaskdino.structures import MaskLogits, RleMasks
from dimaskdino.structures.rle_masks import Size

INTERPOLATIONS = ("direct", "two_step")
FORMATS = ("bitmask", "rle")
_BYTES_PER_PIXEL = 20  # of a mask while it is made: logits of two sizes, probabilities, their product, the bitmap
# Which cells make each pixel of an axis, (taps, pixels) int32, and their weights, (taps, pixels) float32.
Taps = tuple[Tensor, Tensor]


def resized_masks(logits: Tensor, rows: Taps, columns: Taps, masks: Tensor) -> Tensor:
    """Interpolate logits, and keep where they are positive, without a map of interpolated logits.

    Args:
        logits: (N, h, w) float32.
        rows: of the masks, as sums of rows of the logits.
        columns: the same of the columns.
        masks: (N, H, W) bool, which is filled.

    Returns:
        (N,) mean probability inside each mask; 0 for an empty one.
    """
    probability, area = torch.ops.dimaskdino.resized_masks(logits, *rows, *columns, masks).unbind(1)
    return probability / (area + 1e-6)


def _two_step_taps(cells: int, padded: int, image: int, output: int) -> Taps:
    """Two bilinear steps, with a cut to the image between them, joined to one sum of cells."""
    index, weights = torch.arange(cells)[None], torch.ones(1, cells)
    for size, kept in [(padded, image), *([(output, output)] if image != output else [])]:
        # As torch.nn.functional.interpolate without aligned corners, in its precision.
        place = ((torch.arange(size, dtype=torch.float32) + 0.5) * (cells / size) - 0.5).clamp(min=0)
        lower = place.long().clamp(max=cells - 1)
        upper, share = (lower + 1).clamp(max=cells - 1), place - lower
        lower, upper, share = lower[:kept], upper[:kept], share[:kept]
        index = torch.cat((index[:, lower], index[:, upper]))
        weights = torch.cat((weights[:, lower] * (1 - share), weights[:, upper] * share))
        cells = kept
    return index.int().contiguous(), weights.contiguous()


def _direct_taps(cells: int, padded: int, image: int, output: int, device: torch.device | str = "cpu") -> Taps:
    """One bilinear step from the logits to the result."""
    centers = (torch.arange(output, dtype=torch.float32, device=device) + 0.5) * (image / output)
    place = (centers * (cells / padded) - 0.5).clamp(0, cells - 1)
    lower = place.long()
    share = place - lower
    return torch.stack((lower, (lower + 1).clamp(max=cells - 1))).int(), torch.stack((1 - share, share))


def _interpolate(logits: Tensor, axis: int, cells: Tensor, weights: Tensor) -> Tensor:
    """Logits (N, h, w) with one of the axes at the size of the result."""
    weights = weights.unflatten(1, (-1, *[1] * (2 - axis)))
    return sum(logits.index_select(axis, each) * weight for each, weight in zip(cells, weights, strict=True))


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

    # ``direct`` interpolates once, from the logits to the asked size; ``two_step`` resizes to the padded size, crops,
    # and resizes to the asked size, as the releases do, which differs in few pixels
    interpolation: str = "direct"
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
        made = _BYTES_PER_PIXEL * math.prod(predicted.features.shape[-2:])
        if use_loops(predicted.features):
            made = max(made, math.prod(frame.output))  # nothing of a larger size but the bitmap
        else:
            made = max(made, *(_BYTES_PER_PIXEL * math.prod(size) for size in (frame.output, frame.padded)))
        chunks = queries.split(max(1, self.memory_mb * 2**20 // made))
        as_rle = self.format == "rle"
        masks = queries.new_empty((len(chunks[0]) if as_rle else len(queries), *frame.output), dtype=torch.bool)
        rles, qualities, done = [], [], 0
        for chunk in chunks:
            room = masks[: len(chunk)] if as_rle else masks[done : done + len(chunk)]
            qualities.append(self._fill(room, predicted.select(image, chunk).float(), frame))
            rles += RleMasks.of(room).rles if as_rle else []
            done += len(chunk)
        return RleMasks(rles, frame.output) if as_rle else masks, torch.cat(qualities)

    def _fill(self, masks: Tensor, logits: Tensor, frame: Frame) -> Tensor:
        """Fill (N, H, W) masks from (N, h, w) logits; returns the qualities (N,)."""
        taps = _two_step_taps if self.interpolation == "two_step" else _direct_taps
        rows, columns = zip(logits.shape[1:], frame.padded, frame.image, frame.output, strict=True)
        if use_loops(logits):
            return resized_masks(logits, taps(*rows), taps(*columns), masks)
        if self.interpolation == "two_step":
            logits = frame.crop_and_resize(frame.on_canvas(logits))
        else:
            for axis, sizes in enumerate((rows, columns), start=1):
                logits = _interpolate(logits, axis, *_direct_taps(*sizes, logits.device))
        masks.copy_(logits > 0)
        return (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)


DIRECT = MaskRendering()
