"""A detector that trains in milliseconds, with the interface of the real one: for tests of the engine alone."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dimaskdino.config import Config
from dimaskdino.engine import Trainer

NUM_DETECTIONS = 3


class ToyDetector(nn.Module):
    """Regresses the mean box of an image from its mean color; masks are the boxes filled."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.backbone = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.box_head = nn.Linear(8, 4)

    def eval_layer_names(self) -> list[str]:
        """Two stages."""
        return ["layer.0", "layer.1"]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, instances otherwise."""
        colors = torch.stack([image["image"].float().mean((1, 2)) / 255 for image in batched_inputs])
        boxes = self.box_head(self.norm(self.backbone(colors))).sigmoid()
        if self.training:
            return self._losses(batched_inputs, boxes)
        return [self._detect(image, box) for image, box in zip(batched_inputs, boxes, strict=True)]

    def _losses(self, images: list[dict[str, Any]], boxes: Tensor) -> dict[str, Tensor]:
        targets = []
        for image in images:
            scale = torch.tensor([image["image"].shape[2], image["image"].shape[1]] * 2)
            gt = image["instances"].gt_boxes.tensor / scale
            targets.append(gt.mean(0) if len(gt) else torch.zeros(4))
        error = boxes - torch.stack(targets)
        return {"loss_bbox": error.abs().mean(), "loss_bbox_0": error.square().mean()}

    def _detect(self, image: dict[str, Any], box: Tensor) -> dict[str, Any]:
        height, width = image["height"], image["width"]
        xyxy = torch.tensor([0.0, 0.0, width, height]) * 0.5 + box * torch.tensor([width, height] * 2) * 0.1
        found = Instances((height, width))
        found.pred_boxes = Boxes(xyxy.repeat(NUM_DETECTIONS, 1))
        found.scores = torch.linspace(0.9, 0.1, NUM_DETECTIONS)
        found.pred_classes = torch.arange(NUM_DETECTIONS) % self.num_classes
        masks = torch.zeros(NUM_DETECTIONS, height, width, dtype=torch.bool)
        masks[:, : height // 2, : width // 2] = True
        found.pred_masks = masks
        return {"instances": found, "layers": dict.fromkeys(self.eval_layer_names(), {"instances": found})}


class ReorderedToyDetector(ToyDetector):
    """The same parts in another order."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.backbone = self._modules.pop("backbone")
        self.norm = self._modules.pop("norm")


class RandomToyDetector(ToyDetector):
    """Draws random numbers in training."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.backbone = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3))


for detector in (ToyDetector, ReorderedToyDetector, RandomToyDetector):
    if detector.__name__ not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(detector)


def train(cfg: Config, *, resume: bool = False, kind: type[Trainer] = Trainer, **attributes: Any) -> Trainer:
    """Train as train_net.py does, from known weights, with a trainer that has some attributes."""
    torch.manual_seed(7)
    trainer = kind(cfg)
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer
