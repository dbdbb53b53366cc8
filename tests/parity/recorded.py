"""What the releases computed from made-up weights: tests/data/NAME.npz, and our model with the same weights.

Recorded on CPU in float32 by running the public releases of MaskDINO and DI-MaskDINO on two made-up images.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from dimaskdino.checkpoint import from_release
from dimaskdino.modeling.meta_arch import DIMaskDINO
from tests.parity.releases import release

DATA = Path(__file__).parents[1] / "data"
NAMES = ("maskdino_tiny", "dimaskdino_tiny", "maskdino_panoptic_tiny", "maskdino_semantic_tiny")
IMAGE_SIZE = (128, 160)
OUTPUT_SIZE = (240, 300)
MASK_LOGITS_SIZE = (32, 40)


class DenseGrid:
    """Every pixel center of the mask logits, once: what replaced the random points in the recorded runs."""

    def __init__(self, height: int, width: int) -> None:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        self.points = torch.stack((x, y), dim=-1).flatten(0, 1)

    def shared(self, device: torch.device) -> Tensor:
        return self.points.to(device)

    def per_mask(self, logits: Tensor) -> Tensor:
        return self.points.to(logits.device).expand(len(logits), -1, -1)


@functools.cache
def recorded(name: str) -> Mapping[str, np.ndarray]:
    """The arrays of a run, by name."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def model(name: str, **node: Any) -> DIMaskDINO:
    """Our model with the release's settings and weights, looking at the dense grid of points.

    Args:
        name: one of NAMES.
        node: other keys below MODEL.MaskDINO; a double underscore stands for the dot.
    """
    cfg = release(name).cfg()
    cfg.MODEL.MaskDINO.TEST.MASK_INTERPOLATION = "two_step"
    for key, value in node.items():
        cfg.merge_from_list([f"MODEL.MaskDINO.{key.replace('__', '.')}", value])
    built = DIMaskDINO(cfg, point_sampler=DenseGrid(*MASK_LOGITS_SIZE))
    built.load_state_dict(from_release(release(name).state_dict()))
    return built


def images(name: str) -> Tensor:
    """(2, 3, 128, 160) uint8 RGB."""
    return torch.from_numpy(recorded(name)["images"])


def unpack(masks: np.ndarray, width: int) -> Tensor:
    """Masks (N, H, ceil(width / 8)) packed along the width as (N, H, width) bool."""
    return torch.from_numpy(np.unpackbits(masks, axis=-1)[..., :width].astype(bool))


def training_batch(name: str) -> list[dict[str, Any]]:
    """Both images with their objects."""
    data, batch = recorded(name), []
    for index, image in enumerate(images(name)):
        objects = Instances(IMAGE_SIZE)
        objects.gt_classes = torch.from_numpy(data[f"train/classes{index}"])
        objects.gt_boxes = Boxes(torch.from_numpy(data[f"train/boxes{index}"]))
        objects.gt_masks = BitMasks(unpack(data[f"train/masks_packed{index}"], IMAGE_SIZE[1]))
        batch.append({"image": image, "instances": objects})
    return batch


def our_stage(name: str, stage: str) -> str:
    """Our name of a recorded stage: aux0 is the prediction before layer 0, aux1 that of layer 0."""
    if stage == "final":
        num_layers = release(name).config_values["MODEL.MaskDINO.DEC_LAYERS"]
        return f"layer.{num_layers - 1}"
    if stage.startswith("aux"):
        index = int(stage.removeprefix("aux"))
        return f"layer.{index - 1}" if index else "initial"
    return stage.replace("di", "di.") if stage.startswith("di") else stage


def recorded_stages(name: str) -> list[str]:
    """Stages whose predictions were recorded in evaluation."""
    return [key.split("/")[1] for key in recorded(name) if key.startswith("eval/") and key.endswith("pred_logits")]
