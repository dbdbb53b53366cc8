"""A COCO file as ground truth, completed where COCO's evaluation would go wrong without a word."""

import contextlib
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_util
from pycocotools.coco import COCO

logger = logging.getLogger(__name__)

Json = dict[str, Any]


def read_truth(path: str | Path) -> COCO:
    """Read an annotation file in COCO's format.

    Annotations are numbered anew from 1, since evaluation takes the id 0, and in part negative numbers and text, for no
    match. An area that is missing or no number is taken from the mask, or from the box where there is no mask:
    faster-coco-eval would take it as 0 and count every object as small.
    """
    truth = COCO()
    truth.dataset = json.loads(Path(path).read_bytes())
    annotations = truth.dataset.get("annotations", [])
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)  # pycocotools reads it of every object
    with quiet():
        truth.createIndex()
    without = [annotation for annotation in annotations if not _is_number(annotation.get("area"))]
    for annotation in without:
        annotation["area"] = _area(truth, annotation)
    if without:
        logger.info(
            "%d of %d annotations of %s have no area: it is that of their mask, or of their box where there is none.",
            len(without),
            len(annotations),
            path,
        )
    return truth


def quiet() -> contextlib.AbstractContextManager[Any]:
    """The COCO API prints; results are logged by whoever asks for them."""
    return contextlib.redirect_stdout(io.StringIO())


def _area(truth: COCO, annotation: Json) -> float:
    """In square pixels."""
    if annotation.get("segmentation") and annotation["image_id"] in truth.imgs:
        return float(mask_util.area(truth.annToRLE(annotation)))
    _, _, width, height = annotation.get("bbox") or (0, 0, 0, 0)
    return float(width * height)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
