"""Simple copy-paste: objects of another image of the dataset, put over those of an image."""

from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from dimaskdino.errors import ConfigError


class CopyPaste:
    """Pastes objects of an image, as mapped, over another one of the same data set.

    Args:
        prob: of pasting at all.
        share: of the other image's objects that are pasted, each at random; at least one.
        most: objects to paste at most.
        blend: width in pixels of the Gaussian that softens the seam of the image; 0 cuts sharply.
        least_left: objects of which a smaller share stays visible are left out.

    Source: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation".
    """

    def __init__(
        self, prob: float = 0.5, share: float = 0.5, most: int = 100, blend: float = 1.0, least_left: float = 0.05
    ) -> None:
        shares = 0 <= prob <= 1 and 0 < share <= 1 and 0 <= least_left <= 1
        if not (shares and isinstance(most, int) and most >= 1 and 0 <= blend <= 1000):
            raise ConfigError(
                "INPUT.AUGMENTATIONS: CopyPaste needs prob, share, and least_left from 0 to 1, a whole number of at "
                "least 1 as most, and blend from 0 to 1000."
            )
        self.prob, self.share, self.most, self.blend, self.least_left = prob, share, most, blend, least_left

    def __call__(self, mapped: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """Paste at random into a copy; both images as the mapper gives them, aligned at the upper left corner."""
        pasted = self._chosen(other["instances"])
        size = mapped["instances"].image_size
        pasted_masks = _fit(pasted.gt_masks.tensor, size)
        inside = pasted_masks.flatten(1).any(1)
        pasted, pasted_masks = pasted[inside], pasted_masks[inside]
        if not len(pasted):
            return mapped
        covered = pasted_masks.any(0)
        image = self._blended(mapped["image"], _fit(other["image"], size), covered)
        below = _covered(mapped["instances"], covered, self.least_left)
        above = _resized(pasted, pasted_masks, size)
        return {**mapped, "image": image, "instances": _joined(below, above)}

    def _chosen(self, instances: Instances) -> Instances:
        """Objects to paste, each with a mask."""
        usable = np.flatnonzero(instances.gt_masks.tensor.flatten(1).any(1).numpy())
        chosen = usable[np.random.random(len(usable)) < self.share]
        if len(usable) and not len(chosen):
            chosen = np.random.choice(usable, 1)
        return instances[torch.from_numpy(np.sort(np.random.permutation(chosen)[: self.most]))]

    def _blended(self, image: Tensor, other: Tensor, covered: Tensor) -> Tensor:
        alpha = covered.numpy().astype(np.float32)
        if self.blend > 0:
            alpha = cv2.GaussianBlur(alpha, (0, 0), self.blend)
        opacity = torch.from_numpy(alpha)
        mixed = image.float() * (1 - opacity) + other.float() * opacity
        return (mixed if image.dtype.is_floating_point else mixed.round()).to(image.dtype)


def _fit(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Planes (n, h, w), cut or padded with zeros at the right and below to ``size``."""
    fitted = planes.new_zeros(len(planes), *size)
    height, width = min(size[0], planes.shape[1]), min(size[1], planes.shape[2])
    fitted[:, :height, :width] = planes[:, :height, :width]
    return fitted


def _covered(instances: Instances, covered: Tensor, least_left: float) -> Instances:
    """The objects below: without what is covered, and without those of which too little is left."""
    masks = instances.gt_masks.tensor
    left = masks & ~covered
    before, after = masks.flatten(1).sum(1), left.flatten(1).sum(1)
    kept = (before == 0) | ((after > 0) & (after >= least_left * before))  # an object with a box alone stays
    changed = (after < before) & kept
    boxes = instances.gt_boxes.tensor.clone()
    boxes[changed] = BitMasks(left[changed]).get_bounding_boxes().tensor
    below = Instances(instances.image_size, **instances.get_fields())
    below.gt_boxes, below.gt_masks = Boxes(boxes), BitMasks(left)
    return below[kept]


def _resized(pasted: Instances, masks: Tensor, size: tuple[int, int]) -> Instances:
    """The pasted objects in the frame of the image below."""
    boxes = pasted.gt_boxes.tensor.clone()
    if pasted.image_size != size:
        boxes = BitMasks(masks).get_bounding_boxes().tensor
    above = Instances(size, **{k: v for k, v in pasted.get_fields().items() if k not in ("gt_boxes", "gt_masks")})
    above.gt_boxes, above.gt_masks = Boxes(boxes), BitMasks(masks)
    return above


def _joined(below: Instances, above: Instances) -> Instances:
    """Both, with what only some images have (see annotations_to_instances) at its default for the others."""
    fields: dict[str, Any] = {}
    for name in {**below.get_fields(), **above.get_fields()}:
        values: list[Any] = [each.get(name) if each.has(name) else _default(name, each) for each in (below, above)]
        if isinstance(values[0], Boxes):
            fields[name] = Boxes.cat(values)
        elif isinstance(values[0], BitMasks):
            fields[name] = BitMasks(torch.cat([each.tensor for each in values]))
        else:
            # A field without objects may lack the further dimensions.
            fields[name] = torch.cat([each for each in values if len(each)] or values[:1])
    return Instances(below.image_size, **fields)


def _default(name: str, instances: Instances) -> Tensor:
    if name in ("gt_mask_supervised", "gt_box_supervised"):
        return torch.ones(len(instances), dtype=torch.bool)
    if name == "gt_box_weight":
        return torch.ones(len(instances))
    return torch.full((len(instances),), torch.nan)
