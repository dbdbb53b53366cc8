"""COCO's run-length encodings, checked before pycocotools sees them."""

from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from dimaskdino.structures.rle_masks import run_lengths

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
