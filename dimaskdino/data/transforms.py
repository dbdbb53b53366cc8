"""The augmentations behind each mapper name, read from the configuration."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from dimaskdino.data.readers import pad_value
from dimaskdino.errors import ConfigError, check_choice

PAD_VALUE = 128.0  # gray of the canvas around a picture that large-scale jitter made small, as in the releases
DETR_CROP_SHORT_EDGES = (400, 500, 600)
DETR_CROP_PROBABILITY = 0.5


class KeepAPixel(T.Augmentation):
    """A resize that leaves at least one pixel of each side of very long images."""

    def __init__(self, resize: T.Augmentation) -> None:
        super().__init__()
        self.resize = resize

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform of ``resize``, with no side shorter than a pixel."""
        transform = self.resize.get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform

    def __repr__(self) -> str:
        return repr(self.resize)


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Flip, scale by a random factor, then crop or pad at the bottom right to a square canvas.

    Source: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation".
    """
    side = cfg.INPUT.IMAGE_SIZE
    resize = T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, side, side)
    return [
        *color_and_flip(cfg),
        KeepAPixel(resize),
        T.FixedSizeCrop((side, side), pad_value=pad_value(cfg, PAD_VALUE)),
    ]


def shortest_edge(cfg: CfgNode) -> list[T.Augmentation]:
    """Flip, with INPUT.CROP.ENABLED crop every other image, then resize the shortest edge to one of several sizes.

    Source: Carion et al., "End-to-End Object Detection with Transformers".
    """
    augmentations = color_and_flip(cfg)
    if cfg.INPUT.CROP.ENABLED:
        resize = KeepAPixel(T.ResizeShortestEdge(DETR_CROP_SHORT_EDGES, sample_style="choice"))
        crop = T.AugmentationList([resize, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)])
        augmentations.append(T.RandomApply(crop, prob=DETR_CROP_PROBABILITY))
    sizes, style = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    return [*augmentations, KeepAPixel(T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TRAIN, style))]


def semantic_crop(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize the shortest edge, crop if wanted, distort colors if wanted, flip, and pad to INPUT.SIZE_DIVISIBILITY.

    Source: MaskFormer (Cheng et al., 2021), section 4.1.
    """
    sizes, style = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    augmentations: list[T.Augmentation] = [KeepAPixel(T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TRAIN, style))]
    crop = cfg.INPUT.CROP
    if crop.ENABLED and crop.SINGLE_CATEGORY_MAX_AREA < 1:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
            )
        )
    elif crop.ENABLED:
        augmentations.append(T.RandomCrop(crop.TYPE, crop.SIZE))
    augmentations += color_and_flip(cfg)
    side = cfg.INPUT.SIZE_DIVISIBILITY
    if side > 0:
        augmentations.append(T.FixedSizeCrop((side, side), pad_value=pad_value(cfg, PAD_VALUE)))
    return augmentations


def test_resize(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize the shortest edge to INPUT.MIN_SIZE_TEST, the longest staying within INPUT.MAX_SIZE_TEST."""
    return [KeepAPixel(T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice"))]


def color_and_flip(cfg: CfgNode) -> list[T.Augmentation]:
    """SSD's color distortion where INPUT.COLOR_AUG_SSD asks for it, and the flip of INPUT.RANDOM_FLIP."""
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.COLOR_AUG_SSD:
        check_color_distortion(cfg)
        # Imported here because the project of detectron2 takes a second to load.
        from detectron2.projects.point_rend import ColorAugSSDTransform

        augmentations.append(ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
    flip = cfg.INPUT.RANDOM_FLIP
    check_choice("INPUT.RANDOM_FLIP", flip, ("none", "horizontal", "vertical"))
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    return augmentations


def check_color_distortion(cfg: CfgNode) -> None:
    """Raise ConfigError if INPUT.COLOR_AUG_SSD would distort the colors of images without any."""
    if cfg.INPUT.COLOR_AUG_SSD and cfg.INPUT.READER:
        raise ConfigError(
            f"INPUT.COLOR_AUG_SSD True distorts colors of 8 bits, which INPUT.READER {cfg.INPUT.READER} may not give; "
            "set it to False."
        )
    if cfg.INPUT.COLOR_AUG_SSD and cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ConfigError(
            f"INPUT.COLOR_AUG_SSD True distorts colors, which images of INPUT.FORMAT {cfg.INPUT.FORMAT} do not have; "
            "set it to False, or INPUT.FORMAT to RGB or BGR."
        )
