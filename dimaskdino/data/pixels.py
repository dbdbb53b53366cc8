"""An image through its augmentations, to a tensor: the same pixels as by detectron2's transforms, much faster."""

import itertools
import sys
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, HFlipTransform, NoOpTransform, PadTransform, VFlipTransform
from PIL import Image
from torch import Tensor

from dimaskdino.data.transforms import KeepAPixel
from dimaskdino.layers.ms_deform_attn_ops import COMPILED
from dimaskdino.structures.rle_masks import Size

# Augmentations that look at the size of an image alone, so that its pixels can wait for those that follow.
_BY_SIZE = (T.RandomFlip, KeepAPixel, T.FixedSizeCrop)
_FLIPS = {HFlipTransform: Image.Transpose.FLIP_LEFT_RIGHT, VFlipTransform: Image.Transpose.FLIP_TOP_BOTTOM}
_NOTHING = (CropTransform(0, 0, sys.maxsize, sys.maxsize), PadTransform(0, 0, 0, 0))
# What can follow flips; other sequences of transforms are applied one by one.
_QUICK = ((T.ResizeTransform,), (T.ResizeTransform, CropTransform, PadTransform))


def augment(
    augmentations: T.AugmentationList,
    image: np.ndarray,
    *,
    boxes: np.ndarray | None = None,
    sem_seg: np.ndarray | None = None,
) -> tuple[T.TransformList, Tensor]:
    """Draw and apply augmentations, which may look at boxes (n, 4) xyxy px and at labels (H, W), to an image (H, W, C).

    Returns:
        The transforms, and the image (C, H, W) in its own memory.
    """
    count = len(list(itertools.takewhile(lambda each: type(each) in _BY_SIZE, reversed(augmentations.augs))))
    first = len(augmentations.augs) - count
    augmented = T.AugInput(image, boxes=boxes, sem_seg=sem_seg)
    before = T.AugmentationList(augmentations.augs[:first])(augmented)
    waiting: list[T.Transform] = []
    height, width = augmented.image.shape[:2]
    for each in augmentations.augs[first:]:
        drawn = T.TransformList([each.get_transform(np.broadcast_to(np.uint8(0), (height, width)))]).transforms
        for transform in drawn:
            height, width = _size_after(transform, (height, width))
        waiting += drawn
    return before + T.TransformList(waiting), pixels_after(augmented.image, waiting)


def _size_after(transform: T.Transform, size: Size) -> Size:
    if isinstance(transform, T.ResizeTransform):
        return transform.new_h, transform.new_w
    if isinstance(transform, CropTransform):
        height, width = (max(side, 0) for side in (size[0] - transform.y0, size[1] - transform.x0))
        return min(transform.h, height), min(transform.w, width)
    if isinstance(transform, PadTransform):
        return size[0] + transform.y0 + transform.y1, size[1] + transform.x0 + transform.x1
    return size


def pixels_after(image: np.ndarray, transforms: Sequence[T.Transform]) -> Tensor:
    """An image (H, W, C) after transforms, as (C, H, W)."""
    steps = [each for each in transforms if type(each) is not NoOpTransform]
    flips = list(itertools.takewhile(lambda each: type(each) in _FLIPS, steps))
    rest = steps[len(flips) :]
    quick = image.dtype == np.uint8 and image.shape[2:] == (3,) and tuple(map(type, rest)) in _QUICK
    if not quick or _may_resize_rows_first(rest[0]):
        moved = T.TransformList(list(transforms)).apply_image(image)
        # A copy: the pixels may be PIL's, which cannot be written to.
        return torch.from_numpy(np.array(moved.transpose(2, 0, 1), order="C"))
    resize, crop, pad = rest if len(rest) == 3 else (*rest, *_NOTHING)
    width, height = min(crop.w, resize.new_w - crop.x0), min(crop.h, resize.new_h - crop.y0)
    canvas = np.full((3, pad.y0 + height + pad.y1, pad.x0 + width + pad.x1), pad.pad_value, dtype=np.uint8)
    inner = canvas[:, pad.y0 : pad.y0 + height, pad.x0 : pad.x0 + width]
    flipped = [sum(type(flip) is kind for flip in flips) % 2 == 1 for kind in _FLIPS]
    if resize.interp == Image.Resampling.BILINEAR and COMPILED and hasattr(torch.ops.dimaskdino, "resize_window"):
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        size, corner = (resize.new_h, resize.new_w), (crop.y0, crop.x0)
        torch.ops.dimaskdino.resize_window(pixels, size, corner, *flipped, torch.from_numpy(inner))
    else:
        picture = Image.fromarray(image)
        for flip in itertools.compress(_FLIPS.values(), flipped):
            picture = picture.transpose(flip)
        window = _resized_window(picture, resize, (crop.x0, crop.y0, crop.x0 + width, crop.y0 + height))
        for plane, band in zip(inner, window.split(), strict=True):
            plane[:] = np.asarray(band)
    return torch.from_numpy(canvas)


def _may_resize_rows_first(resize: T.ResizeTransform) -> bool:
    """Whether PIL may change the height before the width, and so round other numbers, as Pillow 13 does here."""
    return resize.h - resize.new_h > max(2 * (resize.w - resize.new_w), 0)


def _resized_window(picture: Image.Image, resize: T.ResizeTransform, window: tuple[int, int, int, int]) -> Image.Image:
    """A window (xyxy px) of a resized image, without computing most of the rest.

    PIL changes the width first, rounds, then the height, so that either can be cut in between without changing a pixel.
    """
    left, top, right, bottom = window
    if right - left < resize.new_w:
        picture = picture.resize((resize.new_w, picture.height), resize.interp)
        picture = picture.crop((left, 0, right, picture.height))
    picture = picture.resize((right - left, resize.new_h), resize.interp)
    return picture.crop((0, top, picture.width, bottom))
