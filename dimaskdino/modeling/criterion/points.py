"""The points at which mask losses and the matcher compare masks."""

from typing import Any, Protocol

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from dimaskdino.errors import ConfigError
from dimaskdino.layers.points import sample_binary_masks, uncertain_points


class PointSampler(Protocol):
    """Chooses points; pass another one to the criterion and the matcher to look elsewhere."""

    def shared(self, device: torch.device) -> Tensor:
        """Points that all masks of an image share: (P, 2) as (x, y) in [0, 1]."""

    def per_mask(self, logits: Tensor) -> Tensor:
        """Points of each mask: (N, h, w) logits to (N, P, 2) as (x, y) in [0, 1]."""


class RandomPointSampler:
    """Uniform points for matching; for the losses, a share of the most uncertain of an oversampled set.

    Args:
        num_points: P.
        oversample_ratio: candidates per point, at least 1.
        importance_ratio: share of the points that are the most uncertain candidates, in [0, 1].

    Source: PointRend (Kirillov et al., 2020), section 3.1.
    """

    @configurable
    def __init__(self, *, num_points: int, oversample_ratio: float, importance_ratio: float) -> None:
        if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
            raise ConfigError(
                "MODEL.MaskDINO.TRAIN_NUM_POINTS and OVERSAMPLE_RATIO must be at least 1 and IMPORTANCE_SAMPLE_RATIO "
                f"in [0, 1]; they are {num_points}, {oversample_ratio}, {importance_ratio}."
            )
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_ratio)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO."""
        node = cfg.MODEL.MaskDINO
        return {
            "num_points": node.TRAIN_NUM_POINTS,
            "oversample_ratio": node.OVERSAMPLE_RATIO,
            "importance_ratio": node.IMPORTANCE_SAMPLE_RATIO,
        }

    def shared(self, device: torch.device) -> Tensor:
        """Uniform points, (P, 2)."""
        return torch.rand(self.num_points, 2, device=device)

    def per_mask(self, logits: Tensor) -> Tensor:
        """The most uncertain of the candidates, then uniform points, (N, P, 2)."""
        return uncertain_points(logits, self.num_candidates, self.num_uncertain, self.num_points)


def judged_points(regions: Tensor, index: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Where masks are judged: everywhere but in a crowd's region; an object's own pixels there are its own.

    Args:
        regions: (r, H, W) bool.
        index: (N,) int64, the region of each mask.
        points: (N, P, 2) as (x, y); 0 and 1 are the outer edges.
        labels: (N, P) in [0, 1], the object's mask at the points.

    Returns:
        (N, P) float32, 1 where a point counts, else 0.
    """
    return ((sample_binary_masks(regions, index, points) < 0.5) | (labels >= 0.5)).float()
