"""Predictions and targets made by hand for the losses."""

import torch
from torch import Tensor

from dimaskdino.structures import MaskLogits, Stage, StagePrediction, Targets

SIDE = 8
LAYER = Stage("layer")


class GridSampler:
    """Looks at the centers of a grid of pixels, always; counts how often it is asked for shared points."""

    def __init__(self, side: int = SIDE) -> None:
        centers = (torch.arange(side) + 0.5) / side
        self.points = torch.stack((centers.repeat(side), centers.repeat_interleave(side)), dim=-1)
        self.num_shared = 0

    def shared(self, device: torch.device) -> Tensor:
        self.num_shared += 1
        return self.points.to(device)

    def per_mask(self, logits: Tensor) -> Tensor:
        return self.points.expand(len(logits), -1, -1)


def box_mask(box: list[float]) -> Tensor:
    """(SIDE, SIDE) bool mask that fills a cxcywh box whose edges lie on pixel borders."""
    cx, cy, w, h = (round(SIDE * value * 2) for value in box)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[(cy - h // 2) // 2 : (cy + h // 2) // 2, (cx - w // 2) // 2 : (cx + w // 2) // 2] = True
    return mask


def make_targets(labels: list[int], boxes: list[list[float]]) -> Targets:
    masks = torch.stack([box_mask(box) for box in boxes]) if boxes else torch.zeros(0, SIDE, SIDE, dtype=torch.bool)
    supervised = torch.ones(len(labels), dtype=torch.bool)
    return Targets(torch.tensor(labels, dtype=torch.int64), torch.tensor(boxes).reshape(-1, 4), masks, supervised)


def make_stage(logits: list, boxes: list, masks: Tensor | None = None, stage: Stage = LAYER) -> StagePrediction:
    """A stage of one image; ``masks`` (Q, h, w) are logits."""
    factors = None if masks is None else MaskLogits(torch.eye(len(masks))[None], masks[None].float())
    return StagePrediction(stage, torch.tensor([logits]), torch.tensor([boxes]), factors)


def stack(*stages: StagePrediction) -> StagePrediction:
    """Images of one stage side by side."""
    masks = None
    if stages[0].masks is not None:
        masks = MaskLogits(*(torch.cat([getattr(s.masks, name) for s in stages]) for name in ("embed", "features")))
    return StagePrediction(
        stages[0].stage, torch.cat([s.logits for s in stages]), torch.cat([s.boxes for s in stages]), masks
    )


def logits_of(mask: Tensor, certainty: float = 20.0) -> Tensor:
    """Mask logits that say just this mask."""
    return (mask.float() * 2 - 1) * certainty
