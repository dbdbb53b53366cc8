"""The mappers of panoptic and semantic segmentation: label maps become objects with masks."""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from dimaskdino.data.annotations import Annotation
from dimaskdino.data.augmentations import copy_paste
from dimaskdino.data.label_maps import panoptic_annotations, read_segments, read_semantic, semantic_annotations
from dimaskdino.data.mapper import MAPPER_REGISTRY, InstanceMapper, mapper_arguments
from dimaskdino.data.readers import pad_value
from dimaskdino.data.transforms import PAD_VALUE, KeepAPixel, color_and_flip, large_scale_jitter
from dimaskdino.errors import ConfigError, DatasetError


class PanopticMapper(InstanceMapper):
    """Reads an image and its panoptic PNG; every segment that is no crowd region is an object.

    The box of an object encloses its mask, for stuff as for things.
    """

    def read_labels(self, entry: dict[str, Any], size: tuple[int, int]) -> tuple[list[Annotation], None]:
        """The segments of an image."""
        if "segments_info" not in entry:
            raise DatasetError(f"Image {entry['file_name']} has no panoptic labels (pan_seg_file_name, segments_info).")
        return panoptic_annotations(read_segments(entry, size), entry["segments_info"]), None


class SemanticMapper(InstanceMapper):
    """Reads an image and its label map; what a class covers in the image is one object.

    Pixels without a class have the label ``ignore``.
    """

    def __init__(self, *, ignore: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ignore = ignore

    def read_labels(self, entry: dict[str, Any], size: tuple[int, int]) -> tuple[list[Annotation], np.ndarray]:
        """The classes of an image."""
        if "sem_seg_file_name" not in entry and "segments_info" not in entry:
            raise DatasetError(f"Image {entry['file_name']} has no semantic labels (sem_seg_file_name).")
        labels = read_semantic(entry, num_classes=self.num_classes, ignore=self.ignore, size=size)
        # Resized by detectron2 in floating point, as labels may be larger than 255; only the choice of a crop sees it.
        return semantic_annotations(labels, self.ignore), labels.astype(np.float32)


@MAPPER_REGISTRY.register()
def coco_panoptic_lsj(cfg: CfgNode, **use: bool) -> PanopticMapper:
    """Panoptic labels, large-scale jitter on a square canvas in training."""
    crowd = cfg.MODEL.IGNORE_CROWD_SHARE > 0
    return PanopticMapper(crowd=crowd, **mapper_arguments(cfg, large_scale_jitter, **use))


@MAPPER_REGISTRY.register()
def mask_former_semantic(cfg: CfgNode, **use: bool) -> SemanticMapper:
    """Semantic labels, MaskFormer's resize, crop and padding in training."""
    if use["is_train"] and copy_paste(cfg):
        raise ConfigError("INPUT.AUGMENTATIONS lists CopyPaste, which needs objects, not a map of classes; remove it.")
    ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    return SemanticMapper(ignore=ignore, **mapper_arguments(cfg, semantic_crop, **use))


def semantic_crop(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize the shortest edge, crop if wanted, distort colors if wanted, flip, and pad to INPUT.SIZE_DIVISIBILITY.

    Args:
        cfg: reads INPUT.{MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TRAIN_SAMPLING, CROP, COLOR_AUG_SSD, RANDOM_FLIP,
            SIZE_DIVISIBILITY}.

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
