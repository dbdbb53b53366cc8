"""Ground truth in the coordinates that the model predicts in."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from dimaskdino.errors import DatasetError
from dimaskdino.layers.boxes import normalize_boxes, xyxy_to_cxcywh


@dataclass(frozen=True)
class Targets:
    """The objects of one image on the padded canvas.

    Attributes:
        labels: (n,) int64 in [0, K).
        boxes: (n, 4) float32 cxcywh, normalised to the padded canvas.
        masks: (n, H, W) bool on the padded canvas.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_instances(
        cls, instances: Instances, height: int, width: int, num_classes: int, device: torch.device | None = None
    ) -> "Targets":
        """Read detectron2's ``Instances``.

        Args:
            instances: gt_classes, gt_boxes (xyxy px) and gt_masks (BitMasks, PolygonMasks or a (n, h, w) tensor) in the
                frame of the unpadded image.
            height: of the padded canvas, px.
            width: of the padded canvas, px.
            num_classes: K.
            device: of the result; by default that of ``instances``. Instances are checked where they are, which should
                be the host: asking a GPU for a class waits for it.

        Raises:
            DatasetError: when a class is outside [0, K), or masks are missing or larger than the canvas.

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
        masks = _to_bitmask_tensor(instances).to(device)
        pad_right, pad_below = width - masks.shape[-1], height - masks.shape[-2]
        if pad_right < 0 or pad_below < 0:
            raise DatasetError(f"Masks of {tuple(masks.shape[-2:])} px do not fit on a canvas of {(height, width)} px.")
        return cls(
            labels=labels.to(device),
            boxes=normalize_boxes(xyxy_to_cxcywh(instances.gt_boxes.tensor.float()), width, height).to(device),
            masks=F.pad(masks, (0, pad_right, 0, pad_below)),
        )


def _to_bitmask_tensor(instances: Instances) -> Tensor:
    """(n, h, w) bool masks of any of the forms that mappers give."""
    if not instances.has("gt_masks"):
        raise DatasetError("The training data has no masks; DI-MaskDINO needs gt_masks (instance segmentation labels).")
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        if not len(masks):  # which detectron2 cannot rasterise
            return torch.zeros(0, *instances.image_size, dtype=torch.bool)
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return (masks.tensor if isinstance(masks, BitMasks) else masks).bool()
