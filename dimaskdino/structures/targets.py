"""Ground truth in the coordinates that the model predicts in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from dimaskdino.errors import DatasetError
from dimaskdino.layers.boxes import normalize_boxes, xyxy_to_cxcywh
from dimaskdino.structures.predictions import Matches


@dataclass(frozen=True)
class Targets:
    """The objects of one image on the padded canvas.

    Attributes:
        labels: (n,) int64 in [0, K).
        boxes: (n, 4) float32 cxcywh, normalized to the padded canvas.
        masks: (n, H, W) bool on the padded canvas; None for an image whose objects have boxes alone.
        box_supervised: (n,) bool, whether the box loss counts the object.
        mask_supervised: (n,) bool, whether the object has a mask; None where all have, or none.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor | None
    box_supervised: Tensor
    mask_supervised: Tensor | None = None

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
    ) -> "Targets":
        """Read detectron2's ``Instances``.

        Args:
            instances: gt_classes, gt_boxes (xyxy px), and optionally gt_masks (BitMasks, PolygonMasks or a (n, h, w)
                tensor), gt_box_supervised and gt_mask_supervised ((n,) bool), in the frame of the unpadded image.
            height: of the padded canvas, px.
            width: of the padded canvas, px.
            num_classes: K.
            device: of the result; by default that of ``instances``. Instances are checked where they are, which should
                be the host: asking a GPU for a class waits for it.
            with_masks: False for a model that predicts no masks; those of the instances are then not used.

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
            instances.get(field).to(device) if instances.has(field) else None
            for field in ("gt_box_supervised", "gt_mask_supervised")
        )
        return cls(
            labels=labels,
            boxes=normalize_boxes(xyxy_to_cxcywh(instances.gt_boxes.tensor.float()), width, height).to(device),
            masks=_padded_masks(instances, height, width, device) if with_masks else None,
            box_supervised=torch.ones_like(labels, dtype=torch.bool) if supervised is None else supervised,
            mask_supervised=has_mask,
        )

    def supervise_boxes_of(self, classes: Tensor) -> "Targets":
        """The same objects, with the boxes of some classes alone supervised; ``classes`` is (K,) bool."""
        return replace(self, box_supervised=self.box_supervised & classes[self.labels])


class JoinedTargets:
    """The objects of a whole batch in one row, so that all stages are supervised at once.

    Args:
        targets: of each image.

    Attributes:
        labels: (n,) int64.
        boxes: (n, 4) float32 cxcywh.
        box_supervised: (n,) bool.
        masks: (m, H, W) bool, of the images that have masks.
        mask_supervised: (m,) bool, which of these are the masks of objects.
    """

    def __init__(self, targets: Sequence[Targets]) -> None:
        self.labels = torch.cat([target.labels for target in targets])
        self.boxes = torch.cat([target.boxes for target in targets])
        self.box_supervised = torch.cat([target.box_supervised for target in targets])
        masks = [target.masks for target in targets if target.masks is not None]
        self.masks = torch.cat(masks) if masks else self.labels.new_zeros((0, 1, 1), dtype=torch.bool)
        have_masks = [
            torch.ones_like(target.box_supervised) if target.mask_supervised is None else target.mask_supervised
            for target in targets
            if target.masks is not None
        ]
        self.mask_supervised = torch.cat(have_masks) if have_masks else self.box_supervised[:0]
        self._starts: list[int] = []
        self._mask_starts: list[int | None] = []
        num_objects = num_masks = 0
        for target in targets:
            self._starts.append(num_objects)
            self._mask_starts.append(None if target.masks is None else num_masks)
            num_objects += len(target)
            num_masks += 0 if target.masks is None else len(target)

    def objects(self, matches: Matches) -> Tensor:
        """(N,) int64: the objects of all matched pairs, image after image, by their place in the row."""
        return torch.cat([obj + start for (_, obj), start in zip(matches, self._starts, strict=True)])

    def masks_of(self, image: int, obj: Tensor) -> Tensor | None:
        """Places in :attr:`masks` of objects (N,) of one image; None where the image has no masks."""
        start = self._mask_starts[image]
        return None if start is None else obj + start


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
