"""COCO's run-length encodings, checked before pycocotools sees them."""

from typing import Any

import numpy as np
from pycocotools import mask as mask_util

Rle = dict[str, Any]
Size = tuple[int, int]  # (height, width) in pixels


def checked_rle(segmentation: Rle, size: Size) -> Rle:
    """Return the compressed form of an RLE that fits an image.

    pycocotools fills whatever the run lengths leave open with uninitialized memory, so broken ones must not reach it.

    Args:
        segmentation: ``size`` (height, width) and ``counts``: compressed text or bytes, or a list of run lengths.
        size: size that it must have.

    Returns:
        An RLE with ``counts`` in bytes, as pycocotools takes it.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        given, counts = tuple(segmentation["size"]), segmentation["counts"]
    except (KeyError, TypeError):
        raise ValueError("an RLE without size or counts") from None
    if given != tuple(size) or not all(isinstance(side, int | np.integer) for side in given):
        raise ValueError("an RLE of another size than the image")
    if isinstance(counts, str):
        counts = counts.encode("utf-8")
    if not isinstance(counts, bytes | list):
        raise ValueError("an RLE whose counts are neither text nor a list")
    runs = run_lengths(counts) if isinstance(counts, bytes) else np.array(counts)
    if runs.dtype.kind not in "iu" or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError("an RLE whose runs do not cover the image")
    if isinstance(counts, list):
        return mask_util.frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": list(size), "counts": counts}


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
