"""Augmentations by key: INPUT.AUGMENTATIONS is a list of names with arguments."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.common.registry import Registry

from dimaskdino.data.copy_paste import CopyPaste
from dimaskdino.data.readers import pad_value
from dimaskdino.data.transforms import PAD_VALUE, KeepAPixel
from dimaskdino.errors import ConfigError, UserError, check_choice

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
AUGMENTATION_REGISTRY.__doc__ = """
Augmentations by the names in INPUT.AUGMENTATIONS. Each is called as ``builder(cfg, **arguments)`` and gives one of
detectron2's augmentations or transforms, or a list of them. Transforms must move coordinates linearly, or have
``by_pixels = True``: objects are then moved as masks.
"""
PASTE = "CopyPaste"


def own_augmentations(cfg: CfgNode) -> list[Any]:
    """The augmentations that INPUT.AUGMENTATIONS lists, without copy-paste.

    Raises:
        ConfigError: an entry is no name with arguments, is unknown, or cannot take its arguments.
    """
    built: list[Any] = []
    for name, arguments in _entries(cfg):
        if name == PASTE:
            continue
        try:
            made = _builder(name)(cfg, **arguments)
        except UserError:
            raise
        except Exception as error:  # a builder of the user's may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"INPUT.AUGMENTATIONS: {name} cannot be made from {arguments} ({reason}).") from error
        made = made if isinstance(made, list) else [made]
        if wrong := [each for each in made if not isinstance(each, T.Augmentation | T.Transform)]:
            raise ConfigError(
                f"INPUT.AUGMENTATIONS: {name} gives {wrong[0]!r:.60}, which is no augmentation or transform of "
                "detectron2; see AUGMENTATION_REGISTRY."
            )
        built += made
    return built


def copy_paste(cfg: CfgNode, *, with_masks: bool = True) -> CopyPaste | None:
    """The copy-paste that INPUT.AUGMENTATIONS lists; ConfigError if its arguments are wrong, or there are no masks."""
    found = [arguments for name, arguments in _entries(cfg) if name == PASTE]
    if not found:
        return None
    if len(found) > 1:
        raise ConfigError("INPUT.AUGMENTATIONS lists CopyPaste twice; list it once.")
    if not with_masks:
        raise ConfigError("INPUT.AUGMENTATIONS lists CopyPaste, which needs objects with masks; remove it.")
    try:
        return CopyPaste(**found[0])
    except TypeError as error:
        raise ConfigError(f"INPUT.AUGMENTATIONS: CopyPaste cannot be made from {found[0]} ({error}).") from error


def _entries(cfg: CfgNode) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and arguments of each entry: NAME, {NAME: ARGUMENTS} or [NAME, ARGUMENTS]."""
    entries = []
    for each in cfg.INPUT.AUGMENTATIONS:
        entry: Any = (each, {}) if isinstance(each, str) else each
        if isinstance(each, Mapping) and len(each) == 1:
            (entry,) = each.items()
        name, arguments = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
        arguments = {} if arguments is None else arguments
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ConfigError(f"INPUT.AUGMENTATIONS has {each!r}; write a name, or a name with its arguments.")
        entries.append((name, arguments))
    return entries


def _builder(name: str) -> Any:
    if name in AUGMENTATION_REGISTRY:
        return AUGMENTATION_REGISTRY.get(name)
    from dimaskdino.data.albumentations import find

    known = ", ".join(sorted([PASTE, *(each for each, _ in AUGMENTATION_REGISTRY)]))
    return find(name, f"INPUT.AUGMENTATIONS names {name!r}; ours are {known}")


def _number(name: str, value: Any, least: float, most: float = math.inf, *, whole: bool = False) -> Any:
    if not isinstance(value, int if whole else int | float) or not (least <= value <= most and math.isfinite(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(
            f"{name} is {value!r}, not {kind} of at least {least:g}" + f" and at most {most:g}" * (most < math.inf)
        )
    return value


def _share(value: Any, name: str = "prob") -> float:
    return _number(name, value, 0, 1)


def _pair(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
    ends = value if isinstance(value, list | tuple) else (value, value)
    if len(ends) != 2:
        raise ValueError(f"{name} is {value!r}, not a number or a pair of numbers")
    low, high = (float(_number(name, end, least, most)) for end in ends)
    if low > high:
        raise ValueError(f"the range {value} of {name} ends below its beginning")
    return low, high


def _crop_size(kind: str, size: Any) -> list[float]:
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"the size {size!r} is not a pair (height, width)")
    if kind.startswith("relative"):
        return [float(_number("a side of size", side, 0.001, 1)) for side in size]
    sides = [_number("a side of size", side, 1, whole=True) for side in size]
    return list(_pair("size", sides)) if kind == "absolute_range" else sides


@AUGMENTATION_REGISTRY.register()
def Flip(cfg: CfgNode, *, direction: str = "horizontal", prob: float = 0.5) -> Any:  # noqa: N802 (its name in YAML)
    """Mirror, horizontally or vertically."""
    return T.RandomFlip(_share(prob), horizontal=direction == "horizontal", vertical=direction == "vertical")


@AUGMENTATION_REGISTRY.register()
def LargeScaleJitter(  # noqa: N802
    cfg: CfgNode, *, min_scale: float = 0.1, max_scale: float = 2.0, size: int = 1024
) -> list[Any]:
    """Scale at random, then crop or pad to a square of ``size``."""
    _number("size", size, 1, whole=True)
    min_scale, max_scale = _pair("the scale", (min_scale, max_scale), 0)
    crop = T.FixedSizeCrop((size, size), pad_value=pad_value(cfg, PAD_VALUE))
    return [KeepAPixel(T.ResizeScale(min_scale, max_scale, size, size)), crop]


@AUGMENTATION_REGISTRY.register()
def MultiScaleResize(cfg: CfgNode, *, sizes: Sequence[int], max_size: int = 1333) -> Any:  # noqa: N802
    """Resize the shortest edge to one of ``sizes``, the longest staying within ``max_size``; nothing is cut off."""
    if not isinstance(sizes, list | tuple) or not sizes:
        raise ValueError(f"sizes is {sizes!r}, not a list of numbers")
    for name, value in [("max_size", max_size), *(("an entry of sizes", size) for size in sizes)]:
        _number(name, value, 1, whole=True)
    return KeepAPixel(T.ResizeShortestEdge(list(sizes), max_size, "choice"))


@AUGMENTATION_REGISTRY.register()
def Rotate(cfg: CfgNode, *, angle: Any = (-15, 15), expand: bool = True, prob: float = 1.0) -> Any:  # noqa: N802
    """Turn by an angle in degrees, drawn from a range; ``expand`` keeps the corners."""
    turn = _Rotation(_pair("angle", angle), expand=expand)
    return turn if _share(prob) == 1 else T.RandomApply(turn, prob=prob)


class _Rotation(T.RandomRotation):
    """detectron2's, of images with a single channel too."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        turn = super().get_transform(image)
        if not isinstance(turn, T.RotationTransform):
            return turn
        return _Rotated(turn.h, turn.w, turn.angle, expand=turn.expand, center=turn.center, interp=turn.interp)


class _Rotated(T.RotationTransform):
    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Rotate; OpenCV drops the axis of a single channel."""
        turned = super().apply_image(img, interp)
        return turned.reshape(*turned.shape[:2], *img.shape[2:])


class Turn(T.Transform):
    """Turns an image of a width and height by ``quarters`` of 90 degrees, counterclockwise; pixels stay as they are."""

    def __init__(self, quarters: int, height: int, width: int) -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Turn an image."""
        return np.ascontiguousarray(np.rot90(img, self.quarters))

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Turn a map of labels."""
        return self.apply_image(segmentation)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Turn points (n, 2)."""
        coords, sides = coords.astype(float), (self.width, self.height)
        for quarter in range(self.quarters % 4):
            coords = np.stack((coords[:, 1], sides[quarter % 2] - coords[:, 0]), axis=1)
        return coords


@AUGMENTATION_REGISTRY.register()
class Rotate90(T.Augmentation):
    """Turn by 0, 90, 180, or 270 degrees, each as likely; ``prob`` is that of turning at all."""

    def __init__(self, cfg: CfgNode, prob: float = 1.0) -> None:
        super().__init__()
        self.prob = _share(prob)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The turn of one image."""
        if self._rand_range() >= self.prob:
            return T.NoOpTransform()
        return Turn(np.random.randint(4), *image.shape[:2])


@AUGMENTATION_REGISTRY.register()
def Color(  # noqa: N802
    cfg: CfgNode, *, brightness: Any = (0.8, 1.2), contrast: Any = (0.8, 1.2), saturation: Any = (0.8, 1.2)
) -> list[Any]:
    """Multiply brightness, contrast, and the saturation of color images by factors from ranges; 1 leaves them."""
    factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    ranges = [_pair(name, value, 0) for name, value in factors.items()]
    made = [T.RandomBrightness(*ranges[0]), T.RandomContrast(*ranges[1])]
    return made + ([T.RandomSaturation(*ranges[2])] if cfg.INPUT.FORMAT in ("RGB", "BGR") else [])


@AUGMENTATION_REGISTRY.register()
class Blur(T.Augmentation):
    """Blur the image by a Gaussian of a width in a range (``sigma``, px), with a probability."""

    def __init__(self, cfg: CfgNode, sigma: Any = (0.1, 2.0), prob: float = 0.5) -> None:
        super().__init__()
        self.sigma, self.prob = _pair("sigma", sigma, 0, 1000), _share(prob)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The blur of one image; objects stay where they are."""
        if self._rand_range() >= self.prob:
            return T.NoOpTransform()
        sigma = max(np.random.uniform(*self.sigma), 1e-3)
        return T.ColorTransform(lambda pixels: cv2.GaussianBlur(pixels, (0, 0), sigma).reshape(pixels.shape))


@AUGMENTATION_REGISTRY.register()
class Crop(T.Augmentation):
    """Crop at random, and again until enough objects are inside; the whole image where none of the crops has them.

    ``kind`` and ``size`` are as INPUT.CROP.TYPE and INPUT.CROP.SIZE. A share of each box of ``least_share`` must be
    inside, of at least ``least_objects``; an image with fewer may lose none. ``tries`` crops are drawn.
    """

    needs_boxes = True

    def __init__(
        self,
        cfg: CfgNode,
        kind: str = "relative_range",
        size: Sequence[float] = (0.5, 0.5),
        least_objects: int = 1,
        least_share: float = 0.5,
        tries: int = 10,
    ) -> None:
        super().__init__()
        check_choice(
            "INPUT.AUGMENTATIONS: kind of Crop", kind, ("relative_range", "relative", "absolute", "absolute_range")
        )
        self.crop = T.RandomCrop(kind, _crop_size(kind, size))
        self.least_objects = _number("least_objects", least_objects, 0, whole=True)
        self.least_share, self.tries = _share(least_share, "least_share"), _number("tries", tries, 1, whole=True)

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        """The crop of one image (H, W, C) with boxes (n, 4) xyxy px."""
        needed = min(self.least_objects, len(boxes))
        area = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1e-6)
        for _ in range(self.tries):
            crop = self.crop.get_transform(image)
            corner = np.array([crop.x0, crop.y0])
            inside = np.minimum(boxes[:, 2:], corner + (crop.w, crop.h)) - np.maximum(boxes[:, :2], corner)
            if (inside.clip(0).prod(1) / area >= self.least_share).sum() >= needed:
                return crop
        return T.NoOpTransform()
