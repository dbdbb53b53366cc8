"""One-to-one matching of predictions and objects."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dimaskdino.layers.boxes import cxcywh_to_xyxy, generalized_iou
from dimaskdino.layers.points import sample_binary_masks, sample_points
from dimaskdino.losses.functions import FOCAL_ALPHA, FOCAL_GAMMA
from dimaskdino.losses.points import PointSampler
from dimaskdino.modeling.heads import MaskLogits, StagePrediction
from dimaskdino.modeling.targets import Targets

Matches = list[tuple[Tensor, Tensor]]
"""For each image, (query, target) indices that belong together, each (m,) int64."""


@dataclass(frozen=True)
class CostWeights:
    """Weights of the matching costs: focal class, L1 and generalised IoU of boxes, cross entropy and dice of masks."""

    classes: float
    box: float
    giou: float
    mask: float
    dice: float


class HungarianMatcher:
    """Matches every stage on its own: least total cost per image.

    Args:
        weights: of the costs.
        sampler: gives the points at which masks are compared.

    Source: MaskDINO (Li et al., 2023), section 3.3; DETR for the assignment.
    Deviation: the releases draw new points for every stage; here the stages of an image share them, so that the masks
    are sampled once. Costs of the releases add 1e-8 inside logarithms; here they are computed from the logits. They
    are in float32 under autocast too: a sum over the points of a large object does not fit into float16.
    """

    def __init__(self, *, weights: CostWeights, sampler: PointSampler) -> None:
        self.weights, self.sampler = weights, sampler

    @torch.no_grad()
    def __call__(self, stages: Sequence[StagePrediction], targets: Sequence[Targets]) -> list[Matches]:
        """Match every stage.

        Args:
            stages: predictions; those without masks are matched on class and box alone.
            targets: of each image.

        Returns:
            One :data:`Matches` per stage, on the device of the predictions.

        Raises:
            FloatingPointError: when a cost is not finite; names stage and image.
        """
        with torch.autocast(stages[0].logits.device.type, enabled=False):
            return self._assign(self._costs(stages, targets), stages)

    def _costs(self, stages: Sequence[StagePrediction], targets: Sequence[Targets]) -> list[list[Tensor]]:
        """(Q, n) of each stage and image."""
        costs: list[list[Tensor]] = [[] for _ in stages]
        for image, target in enumerate(targets):
            points = self.sampler.shared(target.labels.device)
            everything = torch.arange(len(target), device=points.device)
            labels = sample_binary_masks(target.masks, everything, points.expand(len(target), -1, -1))
            sampled: dict[int, Tensor] = {}
            for stage, row, cost in zip(stages, costs, self._class_and_box_costs(stages, image, target), strict=True):
                if stage.masks is not None:
                    cost = cost + self._mask_cost(stage.masks, image, points, labels, sampled)
                row.append(cost)
        return costs

    def _class_and_box_costs(self, stages: Sequence[StagePrediction], image: int, target: Targets) -> Sequence[Tensor]:
        """(Q, n) of each stage, computed for all stages at once."""
        logits = torch.cat([stage.logits[image] for stage in stages]).float()
        probability = logits.sigmoid()
        positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * F.softplus(-logits)
        negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * F.softplus(logits)
        cost = self.weights.classes * (positive - negative)[:, target.labels]
        boxes = torch.cat([stage.boxes[image] for stage in stages]).float()
        distance = torch.cdist(boxes, target.boxes, p=1)
        overlap = generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes)[None])
        cost = cost + self.weights.box * distance - self.weights.giou * overlap
        return cost.split([stage.logits.shape[1] for stage in stages])

    def _mask_cost(
        self, masks: MaskLogits, image: int, points: Tensor, labels: Tensor, sampled: dict[int, Tensor]
    ) -> Tensor:
        """(Q, n) from the masks at (P, 2) ``points``, where the targets are ``labels`` (n, P)."""
        key = id(masks.features)
        if key not in sampled:
            sampled[key] = sample_points(masks.features[image][None].float(), points[None])[0]
        logits = masks.embed[image].float() @ sampled[key]
        # Cross entropy with label t is softplus(x) - x t.
        cross_entropy = (F.softplus(logits).sum(-1, keepdim=True) - logits @ labels.T) / len(points)
        probability = logits.sigmoid()
        total = probability.sum(-1, keepdim=True) + labels.sum(-1)
        dice = 1 - (2 * probability @ labels.T + 1) / (total + 1)
        return self.weights.mask * cross_entropy + self.weights.dice * dice

    def _assign(self, costs: list[list[Tensor]], stages: Sequence[StagePrediction]) -> list[Matches]:
        """Solve all problems on the host: one transfer there, and one back."""
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
