"""Masks of one image as COCO's run-length encoding: kilobytes where a bitmap of each object takes gigabytes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util
from torch import Tensor

Rle = dict[str, Any]
Size = tuple[int, int]  # (height, width) in pixels


class RleMasks:
    """Masks as RLE, with the methods that detectron2's BitMasks has; ``pred_masks`` of a result may be either.

    Where a tensor or an array is asked for (:attr:`tensor`, :meth:`numpy`, iteration), masks are decoded on the fly.
    The RLEs are compressed, with ``counts`` in bytes; ``size`` is that of every mask.
    """

    def __init__(self, rles: Sequence[Rle], size: Size) -> None:
        self.rles, self.size = list(rles), size

    @classmethod
    def of(cls, masks: Any) -> "RleMasks":
        """Encode (N, H, W) bool masks, a tensor or BitMasks; RLE masks are returned as they are."""
        if isinstance(masks, cls):
            return masks
        dense = getattr(masks, "tensor", masks)
        rles = [_encode(mask.cpu().numpy()) for mask in dense]
        return cls(rles, (int(dense.shape[1]), int(dense.shape[2])))

    @property
    def tensor(self) -> Tensor:
        """All masks, (N, H, W) bool on the CPU."""
        return torch.stack(list(self)) if self.rles else torch.zeros((0, *self.size), dtype=torch.bool)

    def numpy(self) -> np.ndarray:
        """All masks, (N, H, W) bool."""
        return self.tensor.numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[Tensor]:
        for rle in self.rles:
            yield torch.from_numpy(mask_util.decode(rle)).bool()

    def __getitem__(self, index: int | slice | Tensor) -> "RleMasks":
        """Some of the masks, by number, slice, or a tensor of numbers or booleans."""
        chosen = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index]
        return RleMasks([self.rles[number] for number in chosen.reshape(-1).tolist()], self.size)

    def to(self, *_: Any, **__: Any) -> "RleMasks":
        """The same masks: they live on the host."""
        return self

    cpu = to

    @staticmethod
    def cat(several: Sequence["RleMasks"]) -> "RleMasks":
        """The masks of several, which have one size, in one."""
        return RleMasks([rle for masks in several for rle in masks.rles], several[0].size)

    def placed(self, place: Callable[[np.ndarray, int, int], tuple[np.ndarray, int, int]], size: Size) -> "RleMasks":
        """Each mask as ``place`` changes its crop (h, w) bool, top and left (see :func:`crop_of`), on a canvas."""
        return RleMasks([place_crop(*place(*crop_of(rle)), size) for rle in self.rles], size)

    def area(self) -> Tensor:
        """Pixels of each mask, (N,) float32."""
        return torch.tensor([float(mask_util.area(rle)) for rle in self.rles])

    def get_bounding_boxes(self) -> Boxes:
        """Smallest boxes around the masks, xyxy px with exclusive right and lower edges; zeros for an empty mask."""
        boxes = np.array([mask_util.toBbox(rle) for rle in self.rles], dtype=np.float32).reshape(-1, 4)
        return Boxes(BoxMode.convert(torch.from_numpy(boxes), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))


def _encode(mask: np.ndarray) -> Rle:
    """The RLE of a mask (H, W) bool; only its bounding box is encoded."""
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return place_crop(mask[:0, :0], 0, 0, mask.shape)
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return place_crop(crop, int(rows[0]), int(columns[0]), mask.shape)


def run_lengths(counts: bytes) -> np.ndarray:
    """Decode the run lengths (N,) int64 of a compressed RLE; invalid bytes give no runs, or runs of any sum.

    A number is written in characters from "0" on, five bits in each, the lowest first; the sixth bit says that more
    follow, and the last character's fifth bit is the sign. From the fourth number on, each is the difference to the
    last but one.
    """
    characters = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero((characters & 0x20) == 0)
    if not len(ends) or ends[-1] != len(characters) - 1 or characters.min() < 0 or characters.max() > 0x3F:
        return np.zeros(0, dtype=np.int64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 12:  # more than 60 bits
        return np.zeros(0, dtype=np.int64)
    digits = np.arange(len(characters)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((characters & 0x1F) << (5 * digits), starts)
    numbers -= np.where(characters[ends] & 0x10, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def checked_rle(segmentation: Rle, size: Size) -> Rle:
    """The compressed form, with ``counts`` in bytes, of an RLE that fits an image; ValueError says what is wrong.

    pycocotools fills whatever the run lengths leave open with uninitialized memory, so broken ones must not reach it.
    ``counts`` are compressed text or bytes, or a list of run lengths.
    """
    try:
        given, counts = tuple(segmentation["size"]), segmentation["counts"]
    except (KeyError, TypeError):
        raise ValueError("an RLE without size or counts") from None
    if given != tuple(size) or not all(isinstance(side, int | np.integer) for side in given):
        raise ValueError("an RLE of another size than the image")
    if len(given) != 2 or min(given) < 1:
        raise ValueError(f"an RLE of the size {given}, which is no (height, width)")
    if isinstance(counts, str):
        counts = counts.encode("utf-8")
    if not isinstance(counts, bytes | list):
        raise ValueError("an RLE whose counts are neither text nor a list")
    runs = run_lengths(counts) if isinstance(counts, bytes) else np.array(counts)
    if runs.dtype.kind not in "iu" or not ((runs >= 0) & (runs < 2**32)).all() or runs.sum() != size[0] * size[1]:
        raise ValueError("an RLE whose runs do not cover the image")
    if isinstance(counts, list):
        return mask_util.frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": list(size), "counts": counts}


def crop_of(rle: Rle) -> tuple[np.ndarray, int, int]:
    """A mask cut to its bounding box (h, w) bool, and the row and column where it begins; the rest is not decoded."""
    x, y, width, height = (int(side) for side in mask_util.toBbox(rle))
    canvas_height = rle["size"][0]
    begin, end = x * canvas_height, (x + width) * canvas_height
    ends = np.cumsum(run_lengths(rle["counts"])).clip(begin, end)
    inside = np.arange(len(ends)) % 2 == 1
    columns = np.repeat(inside, np.diff(ends, prepend=begin)).reshape(width, canvas_height)
    return columns[:, y : y + height].T, y, x


def place_crop(crop: np.ndarray, top: int, left: int, size: Size) -> Rle:
    """The RLE of a canvas of ``size`` that holds a crop (h, w) bool; only the crop is looked at."""
    rows, columns = crop.shape
    padded = np.zeros((columns, rows + 1), dtype=bool)  # a gap after each column ends its last run
    padded[:, :-1] = crop.T
    flat = np.concatenate(([False], padded.ravel()))
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), rows + 1)
    edges = (left + column) * size[0] + top + row  # begin and end (exclusive) of each run, in column-major order
    # A run that goes on in the next column ends and begins there.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])
    edges = np.delete(edges, np.concatenate((2 * joined + 1, 2 * joined + 2)))
    ends = [size[0] * size[1]] if not len(edges) or edges[-1] < size[0] * size[1] else []
    counts = np.diff(np.concatenate(([0], edges, ends)).astype(np.int64))
    return mask_util.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)


def as_text(rle: Rle) -> Rle:
    """A compressed RLE with its counts as text, as JSON needs it."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def coco_shape(rle: Rle) -> dict[str, Any]:
    """The fields of a COCO annotation that describe a mask: bbox (xywh px), area (px^2), segmentation (RLE as text)."""
    return {"bbox": mask_util.toBbox(rle).tolist(), "area": int(mask_util.area(rle)), "segmentation": as_text(rle)}


def instances_to_coco(
    instances: Instances, image_id: Any, category_ids: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Detections, on the CPU, as COCO's results hold them, with category ids by class index, else the indices.

    Each has image_id, category_id, bbox (xywh px), score, and where there are masks segmentation (RLE with text
    counts).
    """
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    classes = instances.pred_classes.tolist()
    found = [
        {"image_id": image_id, "category_id": label if category_ids is None else category_ids[label]}
        | {"bbox": box, "score": score}
        for label, box, score in zip(classes, boxes.tolist(), instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        for result, rle in zip(found, RleMasks.of(instances.pred_masks).rles, strict=True):
            result["segmentation"] = as_text(rle)
    return found
