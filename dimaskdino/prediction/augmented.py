"""Test-time augmentation: what a model finds in scaled and flipped views of an image, joined."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import nn

from dimaskdino.data.pixels import pixels_after
from dimaskdino.data.transforms import KeepAPixel
from dimaskdino.errors import ConfigError
from dimaskdino.prediction.fusion import Fusion
from dimaskdino.structures import RleMasks


class AugmentedModel(nn.Module):
    """A model in evaluation that looks at several views of each image: every size, and every size mirrored.

    The model gives "instances", "sem_seg", or both, in detectron2's format. ``resizes`` lead from the image of the file
    to each view; at most ``max_detections`` instances of an image are left once the views are joined.
    """

    @configurable
    def __init__(self, *, model: nn.Module, resizes: Sequence[T.Augmentation], flip: bool, max_detections: int) -> None:
        super().__init__()
        self.model = model
        self.views = [(resize, flipped) for resize in resizes for flipped in ((False, True) if flip else (False,))]
        self.fusion = Fusion(max_detections=max_detections)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Read TEST.AUG; see :func:`check_augmentation`."""
        check_augmentation(cfg)
        node = cfg.TEST.AUG
        return {
            "model": model,
            "resizes": [KeepAPixel(T.ResizeShortestEdge(size, node.MAX_SIZE)) for size in node.MIN_SIZES],
            "flip": node.FLIP,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Evaluate a batch of images that were not resized (see :func:`whole_images`), one view at a time.

        Returns:
            For each image, as the model gives them: "instances", joined by :class:`Fusion`; "sem_seg" (K, H, W) and
            "image_feature" (C,), means of the views'.
        """
        return [self._joined(given) for given in batched_inputs]

    def _joined(self, given: dict[str, Any]) -> dict[str, Any]:
        pixels = given["image"].cpu().numpy().transpose(1, 2, 0)
        size = {"height": given.get("height", pixels.shape[0]), "width": given.get("width", pixels.shape[1])}
        found: list[Instances] = []
        sums: dict[str, torch.Tensor] = {}
        joined: dict[str, Any] = {}
        for resize, flipped in self.views:
            (result,) = self.model([{**given, **size, "image": view(pixels, resize, flipped)}])
            for name in {"sem_seg", "image_feature"} & result.keys():
                values = result[name].flip(-1) if flipped and name == "sem_seg" else result[name]
                sums[name] = sums[name].add_(values) if name in sums else values.clone()
            if "instances" in result:
                joined["instances"] = result["instances"]
                found.append(_on_host(result["instances"], flipped))
        if found:
            joined["instances"] = _as_given(self.fusion(found), joined["instances"])
        return joined | {name: total / len(self.views) for name, total in sums.items()}


def check_augmentation(cfg: CfgNode) -> None:
    """Raise ConfigError if TEST.AUG is on without sizes, or for panoptic results, which cannot be joined."""
    node = cfg.TEST.AUG
    if not node.ENABLED:
        return
    sizes = (*node.MIN_SIZES, node.MAX_SIZE)
    if not node.MIN_SIZES or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ConfigError(
            f"TEST.AUG.MIN_SIZES is {node.MIN_SIZES} and MAX_SIZE {node.MAX_SIZE}; give one or more sizes of the "
            "shortest edge, and the largest of the longest, in pixels."
        )
    if cfg.MODEL.META_ARCHITECTURE != "DINO" and cfg.MODEL.MaskDINO.TEST.PANOPTIC_ON:
        raise ConfigError(
            "TEST.AUG.ENABLED joins objects and semantic maps of several views, not panoptic ones; set it to False, or "
            "MODEL.MaskDINO.TEST.PANOPTIC_ON."
        )


def whole_images(cfg: CfgNode) -> CfgNode:
    """``cfg`` for a loader of images as they are in their files."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0  # detectron2's word for no resize
    return cfg


def view(pixels: np.ndarray, resize: T.Augmentation, flipped: bool) -> torch.Tensor:
    """A view (C, h, w) of an image (H, W, C), uint8 or float32."""
    resized = pixels_after(np.ascontiguousarray(pixels), [resize.get_transform(pixels)])
    return resized.flip(2) if flipped else resized


def _on_host(found: Instances, flipped: bool) -> Instances:
    """Detections on the CPU, masks as RLE, mirrored back where the view was mirrored."""
    moved = Instances(found.image_size, **found.get_fields()).to("cpu")
    if moved.has("pred_masks"):
        moved.pred_masks = RleMasks.of(found.pred_masks)
    if not flipped:
        return moved
    width = moved.image_size[1]
    left, top, right, bottom = moved.pred_boxes.tensor.unbind(1)
    moved.pred_boxes = Boxes(torch.stack((width - right, top, width - left, bottom), dim=1))
    if moved.has("pred_masks"):
        moved.pred_masks = moved.pred_masks.placed(
            lambda crop, top, left: (crop[:, ::-1], top, width - left - crop.shape[1]), moved.image_size
        )
    return moved


def _as_given(joined: Instances, given: Instances) -> Instances:
    """Joined detections where the model gives its own, masks in the same form."""
    if joined.has("pred_masks") and not isinstance(given.pred_masks, RleMasks):
        joined.pred_masks = joined.pred_masks.tensor
    return joined.to(given.scores.device)
