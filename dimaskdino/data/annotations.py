"""From annotations in detectron2's format, and the transforms that an image went through, to training targets.

Everything geometric happens on run-length encodings: areas, boxes and unions of polygons are cheap there, and a mask is
unpacked only once its object is known to be kept.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data.transforms import NoOpTransform, TransformList
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from dimaskdino.data.fields import fields_of
from dimaskdino.data.validation.rules import MISSING_MASK, Level, Rules, Shape, has_mask, read_mask
from dimaskdino.errors import DatasetError
from dimaskdino.structures.rle_masks import Rle, Size, crop_of

Annotation = dict[str, Any]
Box = tuple[float, float, float, float]  # xyxy in pixels

MAX_LABELS = 127  # in one image of labels


class Region(NamedTuple):
    """Where an object lies in the target: its mask, if it has one, and its box."""

    rle: Rle | None
    box: Box


def annotations_to_instances(
    annotations: list[Annotation],
    *,
    transforms: TransformList,
    source_size: Size,
    target_size: Size,
    num_classes: int,
    file_name: str,
    with_masks: bool = True,
    fields: Sequence[str] = (),
    annotated_boxes: bool = False,
) -> Instances:
    """Build the targets of one image, without crowd regions and without objects that have no pixel left.

    Args:
        annotations: objects of the image before its transforms, in detectron2's format, with a mask or a box.
        transforms: what the image went through; moves coordinates linearly.
        source_size: (height, width) before, which RLE labels must have.
        target_size: (height, width) after.
        num_classes: category ids must lie in [0, num_classes).
        file_name: the image's path, for errors.
        with_masks: whether the targets have masks.
        fields: as INPUT.ANNOTATION_FIELDS.
        annotated_boxes: as INPUT.BOXES_OF_ANNOTATIONS.

    Returns:
        Instances of ``target_size`` with gt_classes (n,) int64 and gt_boxes (n, 4) float32, xyxy in pixels. With masks,
        a box is the extent of an object's polygons inside the target, or of its mask for RLE labels, where the far edge
        is the last pixel's index + 1; otherwise it is the annotation's box, clipped. Optional fields:

        - gt_masks: BitMasks (n, H, W), if ``with_masks``; empty for an object that has only a box.
        - gt_mask_supervised: (n,) bool, if some object has only a box: False for those.
        - gt_box_supervised (n,) bool, gt_box_weight (n,) float32: if some annotation has that key; by default True, 1.
        - gt_<name>: see :func:`dimaskdino.data.fields.fields_of`.

    Raises:
        DatasetError: for an annotation that cannot be used.

    Deviation: the releases keep objects whose mask has no pixel, with a mask loss that nothing can lower.
    """
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    rules = Rules(categories=dict.fromkeys(range(num_classes), ""), with_masks=with_masks)
    _check(annotations, rules, source_size, file_name)
    kept: dict[int, Region] = {}
    found = _regions(objects, transforms, source_size, target_size, with_masks=with_masks)
    for index, region in enumerate(found):
        if annotated_boxes and "bbox" in objects[index]:
            region = region._replace(box=_region_of_box(objects[index], transforms, target_size).box)
        if Shape(region.box, 0, [], region.rle).has_pixel(target_size):
            kept[index] = region
    objects = [objects[index] for index in kept]
    instances = _targets(objects, list(kept.values()), target_size, with_masks=with_masks)
    for name, values in _optional_fields(annotations, objects, fields, file_name).items():
        instances.set(name, values)
    return instances


def _targets(objects: list[Annotation], regions: list[Region], size: Size, *, with_masks: bool) -> Instances:
    instances = Instances(size)
    instances.gt_classes = torch.tensor([each["category_id"] for each in objects], dtype=torch.int64)
    boxes = torch.tensor([region.box for region in regions], dtype=torch.float32)
    instances.gt_boxes = Boxes(boxes.reshape(-1, 4))
    if with_masks:
        rles = [region.rle for region in regions]
        instances.gt_masks = BitMasks(_unpack(rles, size))
        if None in rles:
            instances.gt_mask_supervised = torch.tensor([rle is not None for rle in rles])
    return instances


def _optional_fields(
    annotations: list[Annotation], kept: list[Annotation], fields: Sequence[str], file_name: str
) -> dict[str, torch.Tensor]:
    """The fields that only some datasets have; an image has one if any of its annotations has the key."""
    found: dict[str, torch.Tensor] = {}
    for key, kind in (("box_supervised", torch.bool), ("box_weight", torch.float32)):
        if any(key in each for each in annotations):
            found[f"gt_{key}"] = torch.tensor([each.get(key, 1) for each in kept], dtype=kind)
    return found | fields_of(kept, fields, file_name)


def crowd_regions(annotations: list[Annotation], **arguments: Any) -> Instances:
    """The crowd regions of an image, as :func:`annotations_to_instances` gives objects.

    A region without a mask is its box. ``gt_any_class`` (n,) bool tells the regions with ``ignored`` from others.
    """
    crowd = [each for each in annotations if each.get("iscrowd")]
    plain = [{**each, "iscrowd": 0, "any_class": bool(each.get("ignored"))} for each in crowd]
    regions = annotations_to_instances(plain, **arguments, fields=["any_class"])
    regions.gt_any_class = regions.gt_any_class > 0
    for mask, box in zip(regions.gt_masks.tensor, regions.gt_boxes.tensor.round().int().tolist(), strict=True):
        if not mask.any():
            left, top, right, bottom = box
            mask[top:bottom, left:right] = True
    return regions


def boxes_of(annotations: list[Annotation], size: Size) -> np.ndarray:
    """(n, 4) float xyxy px of the objects, for augmentations that look at them; without crowd regions."""
    objects = [each for each in annotations if not each.get("iscrowd", 0)]
    identity = TransformList([NoOpTransform()])
    regions = _regions(objects, identity, size, size, with_masks=False)
    return np.array([region.box for region in regions], dtype=float).reshape(-1, 4)


def _check(annotations: list[Annotation], rules: Rules, size: Size, file_name: str) -> None:
    """Refuse what cannot be used; an object without a mask can, as one with only a box."""
    for index, annotation in enumerate(annotations):
        for problem in rules.problems(annotation, size):
            if problem.level is not Level.REFUSED or problem.kind == MISSING_MASK:
                continue
            which = annotation.get("id", f"number {index}")
            hint = f" MODEL.SEM_SEG_HEAD.NUM_CLASSES is {len(rules.categories)}." * problem.kind.startswith("category")
            raise DatasetError(
                f"Annotation {which} of {file_name}: {problem}.{hint} `python tools/check_dataset.py NAME` lists every "
                "problem of the dataset."
            )


def _regions(
    objects: list[Annotation], transforms: TransformList, source_size: Size, target_size: Size, *, with_masks: bool
) -> Iterable[Region]:
    """Where the objects lie in the target: by their masks, or by their boxes if masks are missing or not wanted."""
    by_pixels = any(getattr(each, "by_pixels", False) for each in transforms.transforms)
    masks = [
        read_mask(annotation["segmentation"], source_size)
        if has_mask(annotation) and (with_masks or by_pixels or "bbox" not in annotation)
        else None
        for annotation in objects
    ]
    if by_pixels:
        masks = [each and _as_pixels(each, source_size) for each in masks]
    rles = [mask.rle for mask in masks if mask is not None and mask.rle is not None]
    moved_rles = iter(_regions_of_rles(rles, transforms, source_size))
    for annotation, mask in zip(objects, masks, strict=True):
        if mask is None:
            yield _region_of_box(annotation, transforms, target_size)
        elif mask.rle is not None:
            yield next(moved_rles)
        else:
            yield _region_of_polygons(mask, transforms, target_size)


def _as_pixels(mask: Shape, size: Size) -> Shape:
    rle = mask.rasterized(size) if mask.rle or mask.polygons else _empty_rle(size)
    return mask._replace(polygons=[], rle=rle)


def _region_of_box(annotation: Annotation, transforms: TransformList, target_size: Size) -> Region:
    box = BoxMode.convert(list(annotation["bbox"]), BoxMode(annotation["bbox_mode"]), BoxMode.XYXY_ABS)
    height, width = target_size
    left, top, right, bottom = transforms.apply_box(np.array([box]))[0].clip(0, [width, height, width, height])
    return Region(None, (float(left), float(top), float(right), float(bottom)))


def _region_of_polygons(mask: Shape, transforms: TransformList, target_size: Size) -> Region:
    """Move the corners, then rasterize; the rasterizer leaves out what lies outside the target."""
    height, width = target_size
    moved: list[np.ndarray] = []
    for polygon in mask.polygons:
        points = transforms.apply_coords(np.array(polygon, dtype=np.float64).reshape(-1, 2))
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
    """Move pixels (nearest neighbor), many objects at once: those that do not overlap share an image of labels.

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


def _unpack(rles: list[Rle | None], size: Size) -> torch.Tensor:
    """(n, H, W) bool, contiguous. RLEs go down the columns; only boxes are decoded, and OpenCV transposes in blocks."""
    masks = np.zeros((len(rles), *size), dtype=bool)
    for mask, rle in zip(masks, rles, strict=True):
        if rle is not None:
            crop, top, left = crop_of(rle)
            if crop.size:
                rows = cv2.transpose(np.ascontiguousarray(crop.T).view(np.uint8)).view(bool)
                mask[top : top + crop.shape[0], left : left + crop.shape[1]] = rows
    return torch.from_numpy(masks)
