"""One-to-one matching of predictions and objects."""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dimaskdino.errors import ConfigError
from dimaskdino.layers.boxes import cxcywh_to_xyxy, generalized_iou
from dimaskdino.layers.points import sample_binary_masks, sample_points, sigmoid_and_sums
from dimaskdino.layers.precision import float32_block
from dimaskdino.modeling.criterion.points import PointSampler, judged_points
from dimaskdino.structures import Matches, StagePrediction, Targets, group_by_mask_features
from dimaskdino.structures.targets import unjudged_regions

# Queries whose masks are compared at a time: at 12,544 points each, what a processor's last cache holds.
_QUERIES_PER_CHUNK = 256


class CostTerm(Protocol):
    """A part of the matching cost."""

    def __call__(self, stages: Sequence[StagePrediction], image: int, target: Targets) -> Tensor:
        """Weighted cost (Q of all stages, n) float32 of pairing each query of one image with each of its objects."""


class FocalClassCost:
    """What predicting an object's class changes in the focal loss."""

    def __init__(self, *, weight: float, alpha: float, gamma: float) -> None:
        self.weight, self.alpha, self.gamma = weight, alpha, gamma

    def __call__(self, stages: Sequence[StagePrediction], image: int, target: Targets) -> Tensor:
        """Weighted cost (Q of all stages, n)."""
        logits = torch.cat([stage.logits[image] for stage in stages]).float()
        probability = logits.sigmoid()
        positive = self.alpha * (1 - probability) ** self.gamma * F.softplus(-logits)
        negative = (1 - self.alpha) * probability**self.gamma * F.softplus(logits)
        return self.weight * (positive - negative)[:, target.labels]


class BoxCost:
    """L1 distance of cxcywh boxes, and their negative generalized IoU."""

    def __init__(self, *, l1_weight: float, giou_weight: float) -> None:
        self.l1_weight, self.giou_weight = l1_weight, giou_weight

    def __call__(self, stages: Sequence[StagePrediction], image: int, target: Targets) -> Tensor:
        """Weighted cost (Q of all stages, n)."""
        boxes = torch.cat([stage.boxes[image] for stage in stages]).float()
        distance = torch.cdist(boxes, target.boxes, p=1)
        overlap = generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes)[None])
        return self.l1_weight * distance - self.giou_weight * overlap


class MaskCost:
    """Cross entropy and dice loss of masks at points that all masks of an image share.

    Stages without masks, and objects without them, cost nothing. With ``ignore_crowd``, the points of
    :func:`judged_points` are left out.

    Deviation: the releases draw new points for every stage; here the stages of an image share them.
    """

    def __init__(
        self, *, ce_weight: float, dice_weight: float, sampler: PointSampler, ignore_crowd: bool = False
    ) -> None:
        self.ce_weight, self.dice_weight, self.sampler = ce_weight, dice_weight, sampler
        self.ignore_crowd = ignore_crowd

    def __call__(self, stages: Sequence[StagePrediction], image: int, target: Targets) -> Tensor:
        """Weighted cost (Q of all stages, n)."""
        costs = [stage.boxes.new_zeros(stage.boxes.shape[1], len(target), dtype=torch.float32) for stage in stages]
        groups = group_by_mask_features(stages)
        if target.masks is None or not groups:
            return torch.cat(costs)
        points = self.sampler.shared(target.labels.device)
        everything = torch.arange(len(target), device=points.device)
        points_of_each = points.expand(len(target), -1, -1)
        labels = sample_binary_masks(target.masks, everything, points_of_each)
        regions, region_of = unjudged_regions([target]) if self.ignore_crowd else (None, everything)
        judged = None if regions is None else judged_points(regions, region_of, points_of_each, labels)
        for group in groups:
            masks = [masks for index in group if (masks := stages[index].masks) is not None]
            features = sample_points(masks[0].features[image][None].float(), points[None])[0]
            embeds = torch.cat([each.embed[image] for each in masks]).float()
            chunks = embeds.split(_QUERIES_PER_CHUNK)
            cost = torch.cat([self._cost(embed @ features, labels, judged) for embed in chunks])
            cost = cost if target.mask_supervised is None else cost * target.mask_supervised
            for index, of_stage in zip(group, cost.split([each.embed.shape[1] for each in masks]), strict=True):
                costs[index] = of_stage
        return torch.cat(costs)

    def _cost(self, logits: Tensor, labels: Tensor, judged: Tensor | None) -> Tensor:
        """(Q, n) from mask logits (Q, P) and labels (n, P) at the points, of which those that ``judged`` has count."""
        # Cross entropy with label t is softplus(x) - x t.
        labels = labels if judged is None else labels * judged
        products = logits @ labels.T
        if judged is None:
            probability, softplus, total = sigmoid_and_sums(logits)
        else:
            probability = logits.sigmoid()
            softplus, total = F.softplus(logits) @ judged.T, probability @ judged.T
        cross_entropy = (softplus - products) / labels.shape[1]
        dice = 1 - (2 * (probability @ labels.T) + 1) / (total + labels.sum(-1) + 1)
        return self.ce_weight * cross_entropy + self.dice_weight * dice


class HungarianMatcher:
    """Matches every stage on its own: least total cost per image.

    Source: DETR (Carion et al., 2020); Mask DINO (Li et al., 2023), section 3.3, for the terms.

    Deviation: the releases add 1e-8 inside logarithms; here costs are computed from the logits.
    """

    def __init__(self, costs: Sequence[CostTerm]) -> None:
        self.costs = list(costs)

    @torch.no_grad()
    def __call__(self, stages: Sequence[StagePrediction], targets: Sequence[Targets]) -> list[Matches]:
        """Match every stage with the targets of each image.

        Returns:
            One :data:`dimaskdino.structures.Matches` per stage, on the device of the predictions.

        Raises:
            FloatingPointError: when a cost is not finite; names stage and image.
        """
        num_queries = [stage.logits.shape[1] for stage in stages]
        with float32_block("matching", stages[0].logits.device):
            by_image = [
                torch.stack([_cost_of(term, stages, image, target) for term in self.costs]).sum(0).split(num_queries)
                for image, target in enumerate(targets)
            ]
        return _assign([list(of_stage) for of_stage in zip(*by_image, strict=True)], stages)


def _cost_of(term: CostTerm, stages: Sequence[StagePrediction], image: int, target: Targets) -> Tensor:
    """The cost of a term, which must have a row for each query of all stages and a column for each object."""
    cost = term(stages, image, target)
    shape = sum(stage.logits.shape[1] for stage in stages), len(target)
    if not isinstance(cost, Tensor) or cost.shape != shape:
        found = tuple(cost.shape) if isinstance(cost, Tensor) else f"a {type(cost).__name__}"
        kind = type(term)
        raise ConfigError(
            f"The matching cost {kind.__module__}.{kind.__qualname__} gives {found} where {shape} is "
            "needed: a row for each query of all stages, and a column for each object."
        )
    return cost


def _assign(costs: list[list[Tensor]], stages: Sequence[StagePrediction]) -> list[Matches]:
    """Solve the problems of all stages and images on the host: one transfer there, and one back."""
    flat = torch.cat([cost.flatten() for row in costs for cost in row])
    on_host = flat.cpu()
    finite = bool(on_host.isfinite().all())
    solutions: list[np.ndarray] = []
    start = 0
    for row, stage in zip(costs, stages, strict=True):
        for image, cost in enumerate(row):
            matrix = on_host[start : start + cost.numel()].view(cost.shape)
            start += cost.numel()
            if not finite and not bool(matrix.isfinite().all()):
                raise FloatingPointError(
                    f"The predictions of stage {stage.name} for image {image} of the batch are not finite. "
                    "Training has diverged: lower SOLVER.BASE_LR or check the data."
                )
            solutions.append(np.stack(linear_sum_assignment(matrix.numpy())))
    pairs = torch.from_numpy(np.concatenate(solutions, axis=1)).to(flat.device)
    matches = iter(pairs.split([solution.shape[1] for solution in solutions], dim=1))
    return [[(queries, objects) for queries, objects in itertools.islice(matches, len(row))] for row in costs]
