"""Ground truth in the coordinates that the model predicts in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from dimaskdino.errors import DatasetError
from dimaskdino.layers.boxes import cxcywh_to_xyxy, normalize_boxes, xyxy_to_cxcywh
from dimaskdino.structures.predictions import Matches


@dataclass(frozen=True)
class Targets:
    """The objects of one image on the padded canvas."""

    labels: Tensor  #: (n,) int64 in [0, K)
    boxes: Tensor  #: (n, 4) float32 cxcywh, normalized to the padded canvas
    masks: Tensor | None  #: (n, H, W) bool on the padded canvas; None for an image whose objects have boxes alone
    box_supervised: Tensor  #: (n,) bool, whether the box loss counts the object
    mask_supervised: Tensor | None = None  #: (n,) bool, whether the object has a mask; None where all have, or none
    box_weight: Tensor | None = None  #: (n,) float32, what the box losses of each object are multiplied by; None for 1
    unlabeled: Tensor | None = None  #: (K,) bool, the classes that are no false positives in this image; None for none
    crowd: "CrowdRegions | None" = None  #: the regions whose predictions are no false positives; None for none
    #: (n, ...) whatever else is known of the objects: ``gt_<name>`` of the instances, by ``<name>``
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_instances(
        cls,
        instances: Instances,
        height: int,
        width: int,
        num_classes: int,
        device: torch.device | None = None,
        *,
        with_masks: bool = True,
        unlabeled: Sequence[int] = (),
        crowd: Instances | None = None,
    ) -> "Targets":
        """Read detectron2's ``Instances``.

        Args:
            instances: gt_classes, gt_boxes (xyxy px), and optionally gt_masks (BitMasks, PolygonMasks or a (n, h, w)
                tensor), gt_box_supervised and gt_mask_supervised ((n,) bool), in the frame of the unpadded image; other
                tensors ``gt_<name>`` (n, ...) become :attr:`fields`.
            height: of the padded canvas, px.
            width: of the padded canvas, px.
            num_classes: K.
            device: of the result; by default that of ``instances``. Instances are checked where they are, which should
                be the host: asking a GPU for a class waits for it.
            with_masks: False for a model that predicts no masks; those of the instances are then not used.
            unlabeled: classes that are no false positives in this image.
            crowd: regions whose predictions are none, with gt_classes, gt_any_class, and gt_masks.

        Raises:
            DatasetError: when a class is outside [0, K), or masks are larger than the canvas.

        Deviation: the releases divide boxes by the unpadded size while predictions live on the padded canvas, which
        differs for batches of mixed size only.
        """
        labels = instances.gt_classes
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
            raise DatasetError(
                f"Classes {int(labels.min())} to {int(labels.max())} in the training data, but "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}."
            )
        device = device or labels.device
        labels = labels.to(device)
        supervised, has_mask = (
            instances.get(name).to(device) if instances.has(name) else None
            for name in ("gt_box_supervised", "gt_mask_supervised")
        )
        return cls(
            labels=labels,
            boxes=normalize_boxes(xyxy_to_cxcywh(instances.gt_boxes.tensor.float()), width, height).to(device),
            masks=_padded_masks(instances, height, width, device) if with_masks else None,
            box_supervised=torch.ones_like(labels, dtype=torch.bool) if supervised is None else supervised,
            mask_supervised=has_mask,
            box_weight=instances.gt_box_weight.to(device) if instances.has("gt_box_weight") else None,
            unlabeled=_class_mask(unlabeled, num_classes).to(device) if len(unlabeled) else None,
            crowd=CrowdRegions.from_instances(crowd, height, width, device) if crowd else None,
            fields={
                name.removeprefix("gt_"): values.to(device)
                for name, values in instances.get_fields().items()
                if name.startswith("gt_") and name not in _OWN_FIELDS and isinstance(values, Tensor)
            },
        )

    def supervise_boxes_of(self, classes: Tensor) -> "Targets":
        """The same objects, with the boxes of some classes alone supervised; ``classes`` is (K,) bool."""
        return replace(self, box_supervised=self.box_supervised & classes[self.labels])


@dataclass(frozen=True)
class CrowdRegions:
    """Regions of one image with objects that were not labeled one by one."""

    labels: Tensor  #: (m,) int64 in [0, K), the class of each; -1 for any class
    masks: Tensor  #: (m, H, W) bool, the pixels of each on the padded canvas
    #: (m, H + 1, W + 1) float32, pixels of a region above and left of each corner of the canvas' pixels
    integral: Tensor

    @classmethod
    def from_instances(cls, regions: Instances, height: int, width: int, device: torch.device) -> "CrowdRegions":
        """Read gt_classes, gt_any_class, and gt_masks."""
        masks = _padded_masks(regions, height, width, device)
        assert masks is not None
        labels = regions.gt_classes.masked_fill(regions.gt_any_class, -1).to(device)
        return cls(labels, masks, F.pad(masks.float().cumsum(1).cumsum(2), (1, 0, 1, 0)))

    def share(self, boxes: Tensor) -> Tensor:
        """(Q, m) share of each box (Q, 4), cxcywh in parts of the canvas, that lies in each region."""
        height, width = self.integral.shape[1] - 1, self.integral.shape[2] - 1
        corners = cxcywh_to_xyxy(boxes) * boxes.new_tensor([width, height, width, height])
        left, top, right, bottom = corners.round().long().unbind(-1)
        left, right = left.clamp(0, width), right.clamp(0, width)
        top, bottom = top.clamp(0, height), bottom.clamp(0, height)
        at = self.integral
        inside = at[:, bottom, right] - at[:, top, right] - at[:, bottom, left] + at[:, top, left]
        return (inside / ((right - left) * (bottom - top)).clamp(min=1)).T

    def share_of_masks(self, logits: Tensor) -> Tensor:
        """(Q, m) share of the positive cells of mask logits (Q, h, w), which cover the canvas, in each region."""
        positive = (logits > 0).flatten(1).float()
        height, width = logits.shape[-2:]
        covered = F.adaptive_avg_pool2d(self.masks.float(), (height, width)).flatten(1)
        return positive @ covered.T / positive.sum(1, keepdim=True).clamp(min=1)

    def of_classes(self, classes: Tensor) -> Tensor:
        """(n, H, W) bool: for each of the classes (n,) int64 the pixels of its regions and of those of any class."""
        applies = (self.labels == classes[:, None]) | (self.labels < 0)
        return torch.stack([(self.masks & each[:, None, None]).any(0) for each in applies])


def _class_mask(classes: Sequence[int], num_classes: int) -> Tensor:
    return F.one_hot(torch.tensor(list(classes)), num_classes).any(0)  # refuses what is no class, as a mapper may give


# Fields of instances that targets have attributes for.
_OWN_FIELDS = ("gt_classes", "gt_boxes", "gt_masks", "gt_box_supervised", "gt_mask_supervised", "gt_box_weight")


class JoinedTargets:
    """The objects of the images of a whole batch in one row, so that all stages are supervised at once."""

    def __init__(self, targets: Sequence[Targets]) -> None:
        self.labels = torch.cat([target.labels for target in targets])  #: (n,) int64
        self.boxes = torch.cat([target.boxes for target in targets])  #: (n, 4) float32 cxcywh
        self.box_supervised = torch.cat([target.box_supervised for target in targets])  #: (n,) bool
        weights = [_given_or_ones(target.box_weight, target.boxes[:, 0]) for target in targets]
        #: (n,) float32; None where all are 1
        self.box_weight = torch.cat(weights) if any(target.box_weight is not None for target in targets) else None
        filled = [target for target in targets if len(target)] or list(targets[:1])
        names = [name for name in filled[0].fields if all(name in target.fields for target in filled)]
        #: (n, ...) by name, those that every image with objects has
        self.fields = {name: torch.cat([target.fields[name] for target in filled]) for name in names}
        places = [image for image, target in enumerate(targets) if target.masks is not None]
        self._with_masks = [targets[image] for image in places]
        masks = [target.masks for target in targets if target.masks is not None]
        #: (m, H, W) bool, of the images that have masks
        self.masks = torch.cat(masks) if masks else self.labels.new_zeros((0, 1, 1), dtype=torch.bool)
        have_masks = [_given_or_ones(target.mask_supervised, target.box_supervised) for target in self._with_masks]
        #: (m,) bool, which of these are the masks of objects
        self.mask_supervised = torch.cat(have_masks) if have_masks else self.box_supervised[:0]
        self._starts = list(accumulate(map(len, targets[:-1]), initial=0))
        self._mask_starts = dict(zip(places, accumulate(map(len, self._with_masks), initial=0), strict=False))

    @cached_property
    def unjudged(self) -> tuple[Tensor | None, Tensor]:
        """:func:`unjudged_regions` of :attr:`masks`."""
        return unjudged_regions(self._with_masks)

    def objects(self, matches: Matches) -> Tensor:
        """(N,) int64: the objects of all matched pairs, image after image, by their place in the row."""
        return torch.cat([obj + start for (_, obj), start in zip(matches, self._starts, strict=True)])

    def masks_of(self, image: int, obj: Tensor) -> Tensor | None:
        """Places in :attr:`masks` of objects (N,) of one image; None where the image has no masks."""
        start = self._mask_starts.get(image)
        return None if start is None else obj + start


def _given_or_ones(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if given is None else given


def unjudged_regions(targets: Sequence[Targets]) -> tuple[Tensor | None, Tensor]:
    """Where the masks of objects are not judged, as a crowd is there, in images with masks.

    Returns:
        (r, H, W) bool, the regions of some classes in some images, the first one empty, or None where no image has a
        crowd; and the place (m,) int64 in it of each mask of the images.
    """
    if not any(target.crowd and len(target) for target in targets):
        return None, torch.zeros(0, dtype=torch.int64)
    regions: list[Tensor] = []
    places: list[Tensor] = []
    for target in targets:
        masks, labels = target.masks, target.labels
        assert masks is not None
        regions = regions or [masks.new_zeros((1, *masks.shape[1:]))]
        place = torch.zeros_like(labels)
        if target.crowd and len(target):
            classes, class_of = torch.unique(labels, return_inverse=True)
            place = class_of + sum(map(len, regions))
            regions.append(target.crowd.of_classes(classes))
        places.append(place)
    return torch.cat(regions), torch.cat(places)


def _padded_masks(instances: Instances, height: int, width: int, device: torch.device) -> Tensor | None:
    """(n, height, width) bool masks of any of the forms that mappers give; None where there are none."""
    if not instances.has("gt_masks"):
        return None
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        # detectron2 cannot rasterize an empty list of polygons.
        size = instances.image_size
        masks = BitMasks.from_polygon_masks(masks, *size) if len(masks) else torch.zeros(0, *size, dtype=torch.bool)
    masks = (masks.tensor if isinstance(masks, BitMasks) else masks).bool().to(device)
    pad_right, pad_below = width - masks.shape[-1], height - masks.shape[-2]
    if pad_right < 0 or pad_below < 0:
        raise DatasetError(f"Masks of {tuple(masks.shape[-2:])} px do not fit on a canvas of {(height, width)} px.")
    return F.pad(masks, (0, pad_right, 0, pad_below))
