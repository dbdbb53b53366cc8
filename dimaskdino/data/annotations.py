"""From annotations in detectron2's format, and the transforms that an image went through, to training targets.

Everything geometric happens on run-length encodings: areas, boxes and unions of polygons are cheap there, and a mask is
unpacked only once its object is known to be kept.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.transforms import TransformList
from detectron2.structures import BitMasks, Boxes, Instances
from pycocotools import mask as mask_util

from dimaskdino.data.rle import Rle, Size, checked_rle
from dimaskdino.errors import DatasetError

Annotation = dict[str, Any]
Box = tuple[float, float, float, float]  # xyxy in pixels


MAX_LABELS = 127  # in one image of labels


class Region(NamedTuple):
    """Where an object lies in the target: its mask, and its box."""

    rle: Rle
    box: Box


def annotations_to_instances(
    annotations: list[Annotation],
    *,
    transforms: TransformList,
    source_size: Size,
    target_size: Size,
    num_classes: int,
    file_name: str,
) -> Instances:
    """Build the targets of one image; crowd regions and objects without a pixel left are not among them.

    Args:
        annotations: objects of the image before its transforms, in detectron2's format, with polygons or RLE.
        transforms: what the image went through; moves coordinates linearly.
        source_size: size of the image before, which RLE labels must have.
        target_size: size of the image after.
        num_classes: category ids must lie in [0, num_classes).
        file_name: the image's path, for errors.

    Returns:
        Instances of ``target_size`` with gt_classes (N,) int64, gt_masks BitMasks (N, H, W), and gt_boxes (N, 4)
        float32, xyxy in pixels: the extent of an object's polygons inside the target, or of its mask for RLE labels,
        where the far edge is the last pixel's index + 1.

    Raises:
        DatasetError: for an annotation without a usable mask or with a category out of range.

    Deviation: the releases keep objects whose mask has no pixel, with a mask loss that nothing can lower.
    """
    classes: list[int] = []
    masks: list[Rle | list[np.ndarray]] = []
    for index, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        where = f"annotation {annotation.get('id', f'number {index}')} of {file_name}"
        classes.append(_checked_class(annotation, num_classes, where))
        masks.append(_checked_mask(annotation, source_size, where))
    moved_rles = iter(_regions_of_rles([mask for mask in masks if isinstance(mask, dict)], transforms, source_size))
    regions = [
        next(moved_rles) if isinstance(mask, dict) else _region_of_polygons(mask, transforms, target_size)
        for mask in masks
    ]
    kept = [index for index, region in enumerate(regions) if mask_util.area(region.rle) > 0]
    boxes = [regions[index].box for index in kept]
    instances = Instances(target_size)
    instances.gt_classes = torch.tensor([classes[index] for index in kept], dtype=torch.int64)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_masks = BitMasks(_unpack([regions[index].rle for index in kept], target_size))
    return instances


def _checked_class(annotation: Annotation, num_classes: int, where: str) -> int:
    label = annotation["category_id"]
    if not 0 <= label < num_classes:
        raise DatasetError(
            f"Category index {label} in {where} is outside [0, {num_classes}); "
            "set MODEL.SEM_SEG_HEAD.NUM_CLASSES to the dataset's number of categories or correct the annotation."
        )
    return label


def _checked_mask(annotation: Annotation, source_size: Size, where: str) -> Rle | list[np.ndarray]:
    """An RLE of the image's size, or polygons (points, 2) in its pixels."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        return [_checked_polygon(polygon, where) for polygon in segmentation]
    if not isinstance(segmentation, dict):
        raise DatasetError(
            f"No segmentation in {where}; every object needs polygons or an RLE: add it or remove the annotation."
        )
    try:
        return checked_rle(segmentation, source_size)
    except ValueError as error:
        raise DatasetError(
            f"Unusable segmentation in {where}: {error}; encode the mask again at the image's size "
            f"(height x width {source_size[0]}x{source_size[1]})."
        ) from error


def _checked_polygon(polygon: Any, where: str) -> np.ndarray:
    corners = np.array(polygon, dtype=np.float64).reshape(-1)
    if len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
        raise DatasetError(
            f"A polygon with {len(corners)} numbers in {where}; it needs at least three finite points x, y."
        )
    return corners.reshape(-1, 2)


def _region_of_polygons(polygons: list[np.ndarray], transforms: TransformList, target_size: Size) -> Region:
    """Move the corners, then rasterise; what lies outside the target is left out by the rasteriser itself."""
    height, width = target_size
    moved: list[np.ndarray] = []
    for polygon in polygons:
        points = transforms.apply_coords(polygon)
        if (points.max(axis=0) > 0).all() and (points.min(axis=0) < (width, height)).all():
            moved.append(points)
    if not moved:
        return Region(_empty_rle(target_size), (0.0, 0.0, 0.0, 0.0))
    rle = mask_util.merge(mask_util.frPyObjects([points.reshape(-1).tolist() for points in moved], height, width))
    return Region(rle, _box_of_polygons(np.concatenate(moved), rle, target_size))


def _box_of_polygons(corners: np.ndarray, rle: Rle, size: Size) -> Box:
    """Extent of polygons in an image; where they leave it, the pixels that are left bound the box to within one."""
    extent = np.concatenate((corners.min(axis=0), corners.max(axis=0)))
    far_corner = np.array([size[1], size[0], size[1], size[0]])
    if (extent.clip(0, far_corner) != extent).any():
        pixels = np.array(_box_of_rle(rle))
        extent = extent.clip(pixels - 1, pixels + 1).clip(0, far_corner)
    left, top, right, bottom = extent.tolist()
    return left, top, right, bottom


def _regions_of_rles(rles: list[Rle], transforms: TransformList, source_size: Size) -> list[Region]:
    """Move pixels (nearest neighbour), many objects at once: those that do not overlap share an image of labels.

    A transform may pad with 0, 128 or 255, none of which is a label.
    """
    layers: list[tuple[np.ndarray, list[int]]] = []  # labels, and the object of each label
    for index, rle in enumerate(rles):
        left, top, right, bottom = (int(edge) for edge in _box_of_rle(rle))
        pixels = mask_util.decode(rle)[top:bottom, left:right] == 1
        for labels, members in layers:
            window = labels[top:bottom, left:right]
            if len(members) < MAX_LABELS and not window[pixels].any():
                break
        else:
            labels, members = np.zeros(source_size, dtype=np.uint8), []
            layers.append((labels, members))
            window = labels[top:bottom, left:right]
        members.append(index)
        window[pixels] = len(members)
    regions: dict[int, Region] = {}
    for labels, members in layers:
        moved = np.asfortranarray(transforms.apply_segmentation(labels))
        for label, index in enumerate(members, start=1):
            moved_rle = mask_util.encode((moved == label).view(np.uint8))
            regions[index] = Region(moved_rle, _box_of_rle(moved_rle))
    return [regions[index] for index in range(len(rles))]


def _empty_rle(size: Size) -> Rle:
    return mask_util.encode(np.zeros(size, dtype=np.uint8, order="F"))


def _box_of_rle(rle: Rle) -> Box:
    """Tight box of a mask, far edges exclusive."""
    left, top, width, height = mask_util.toBbox(rle).tolist()
    return left, top, left + width, top + height


def _unpack(rles: list[Rle], size: Size) -> torch.Tensor:
    """(N, H, W) bool, contiguous. Unpacked masks lie column by column; turning them inside the box alone is cheap."""
    masks = np.zeros((len(rles), *size), dtype=bool)
    for mask, rle in zip(masks, rles, strict=True):
        left, top, right, bottom = (int(edge) for edge in _box_of_rle(rle))
        mask[top:bottom, left:right] = mask_util.decode(rle)[top:bottom, left:right]
    return torch.from_numpy(masks)
