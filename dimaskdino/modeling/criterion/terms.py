"""The terms of the criterion: each computes its losses for all supervised stages at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from dimaskdino.errors import ConfigError
from dimaskdino.layers.points import sample_binary_masks, sample_points, sums_at_points
from dimaskdino.layers.precision import to_autocast_dtype
from dimaskdino.modeling.criterion.losses import box_losses, focal_loss, mask_losses, mask_losses_of_sums
from dimaskdino.modeling.criterion.points import PointSampler, judged_points
from dimaskdino.structures import JoinedTargets, Matches, StagePrediction, Targets, group_by_mask_features, mask_logits
from dimaskdino.structures.targets import CrowdRegions

# Bounds the mask logits and the candidate points that are in memory beside those kept for the backward pass.
_MASKS_PER_CHUNK = 256


@dataclass(frozen=True)
class Supervision:
    """One stage with the objects that its queries stand for."""

    prediction: StagePrediction  # of the stage
    matches: Matches  # (query, object) indices of each image
    num_objects: Tensor  # scalar that its losses are divided by
    use_masks: bool  # whether its masks are supervised
    # its queries and matched pairs in the other batches of the same optimization step
    elsewhere: tuple[int, int] = (0, 0)


class SupervisedStages:
    """Stages (S) whose queries and matched pairs (N) stand in one row, stage after stage.

    Args:
        supervisions: of the stages.
        targets: of each image.

    Attributes:
        predictions: of the stages.
        matches: of the stages.
        of_images: the objects of each image.
        targets: the objects of the batch in one row.
        num_objects: (S,) what the losses of each stage are divided by.
        elsewhere: of the stages.
        image: (N,) int64, image of each pair.
        query: (N,) int64, its query in the row of all queries.
        object: (N,) int64, its object in ``targets``.
    """

    def __init__(self, supervisions: Sequence[Supervision], targets: Sequence[Targets]) -> None:
        self.predictions = [supervision.prediction for supervision in supervisions]
        self.matches = [supervision.matches for supervision in supervisions]
        self.of_images, self.targets = targets, JoinedTargets(targets)
        self.num_objects = torch.stack([supervision.num_objects for supervision in supervisions])
        self.elsewhere = [supervision.elsewhere for supervision in supervisions]
        self._num_pairs = [sum(len(query) for query, _ in matches) for matches in self.matches]
        self._num_queries = [prediction.logits.shape[1] for prediction in self.predictions]
        starts = [sum(self._num_queries[:index]) for index in range(len(self._num_queries))]
        of_image = [
            (image, query + start)
            for matches, start in zip(self.matches, starts, strict=True)
            for image, (query, _) in enumerate(matches)
        ]
        self.image = torch.cat([torch.full_like(query, image) for image, query in of_image])
        self.query = torch.cat([query for _, query in of_image])
        self.object = torch.cat([self.targets.objects(matches) for matches in self.matches])

    def logits(self) -> Tensor:
        """(B, Q of all stages, K) float32."""
        return torch.cat([prediction.logits for prediction in self.predictions], dim=1).float()

    def boxes(self) -> Tensor:
        """(N, 4) float32 cxcywh of the matched queries."""
        boxes = torch.cat([prediction.boxes for prediction in self.predictions], dim=1).float()
        return boxes[self.image, self.query]

    def extra(self, head: str) -> Tensor:
        """(N, ...) float32: what a head of MODEL.EXTRA_HEADS gives for the matched queries."""
        values = torch.cat([prediction.extra[head] for prediction in self.predictions], dim=1).float()
        return values[self.image, self.query]

    def field(self, name: str) -> Tensor:
        """(N, ...) float32: a field of INPUT.ANNOTATION_FIELDS of the matched objects; NaN where it is missing."""
        values = self.targets.fields.get(name)
        if values is None and len(self.targets.labels):
            raise ConfigError(f"A loss reads the field {name!r} of objects; add it to INPUT.ANNOTATION_FIELDS.")
        return self.targets.boxes.new_zeros(0) if values is None else values[self.object]

    def labels(self, no_object: int) -> Tensor:
        """(B, Q of all stages) int64: the class of each query's object, or ``no_object``."""
        images = len(self.predictions[0].logits)
        labels = self.query.new_full((images, sum(self._num_queries)), no_object)
        return labels.index_put((self.image, self.query), self.targets.labels[self.object])

    def not_negative(self, num_classes: int, crowd_share: float) -> Tensor | None:
        """(B, Q of all stages, K) bool: predictions that are no mistake, as nobody labeled the class there; or None.

        Args:
            num_classes: K.
            crowd_share: share of a box, or of a mask where there are masks, in a crowd region from which on its class
                is not judged; 0 judges it.
        """
        if not any(each.unlabeled is not None or (each.crowd and crowd_share) for each in self.of_images):
            return None
        boxes = torch.cat([prediction.boxes for prediction in self.predictions], dim=1).detach().float()
        excused = torch.zeros(*boxes.shape[:2], num_classes, dtype=torch.bool, device=boxes.device)
        for image, (of_image, box, target) in enumerate(zip(excused, boxes, self.of_images, strict=True)):
            if target.unlabeled is not None:
                of_image |= target.unlabeled
            if target.crowd and crowd_share:
                share = torch.maximum(target.crowd.share(box), self._share_of_masks(image, target.crowd))
                inside = share >= crowd_share
                for label, of_region in zip(target.crowd.labels.tolist(), inside.unbind(1), strict=True):
                    columns = slice(None) if label < 0 else slice(label, label + 1)
                    of_image[:, columns] |= of_region[:, None]
        return excused

    @torch.no_grad()
    def _share_of_masks(self, image: int, crowd: CrowdRegions) -> Tensor:
        """(Q of all stages, m) share of each predicted mask of an image in each region; 0 in stages without masks."""
        shares = []
        for prediction in self.predictions:
            masks = prediction.masks
            if masks is None:
                shares.append(crowd.integral.new_zeros(prediction.logits.shape[1], len(crowd.labels)))
                continue
            features = masks.features[image].float()
            chunks = masks.embed[image].float().split(_MASKS_PER_CHUNK)
            shares += [crowd.share_of_masks(mask_logits(embed, features)) for embed in chunks]
        return torch.cat(shares)

    def sum_queries(self, values: Tensor) -> Tensor:
        """(S,) sums by stage of values (B, Q of all stages)."""
        return torch.stack([of_stage.sum() for of_stage in values.split(self._num_queries, dim=1)])

    def sum_pairs(self, values: Tensor) -> Tensor:
        """(S,) sums by stage of values (N,)."""
        return torch.stack([of_stage.sum() for of_stage in values.split(self._num_pairs)])


class LossTerm(Protocol):
    """A part of the criterion."""

    names: tuple[str, ...]
    """Names of its losses, without a stage's ending."""
    needs_masks: bool
    """Whether it supervises masks; it is then given those stages alone whose masks are supervised."""

    def __call__(self, stages: SupervisedStages) -> Mapping[str, Tensor]:
        """Weighted losses (S,) by name."""


@dataclass(frozen=True)
class ClassOptions:
    """What the class loss weighs differently."""

    class_weights: tuple[float, ...] = ()  # of each class; empty for 1
    crowd_share: float = 0.0  # see :meth:`SupervisedStages.not_negative`

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ClassOptions":
        """Read MODEL.CLASS_WEIGHTS and MODEL.IGNORE_CROWD_SHARE.

        Raises:
            ConfigError: there is not one weight of at least 0 for each class, or the share is none.
        """
        weights, share = tuple(cfg.MODEL.CLASS_WEIGHTS), cfg.MODEL.IGNORE_CROWD_SHARE
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        numbers = all(isinstance(each, int | float) and 0 <= each < math.inf for each in weights)
        if weights and (len(weights) != num_classes or not numbers):
            raise ConfigError(
                f"MODEL.CLASS_WEIGHTS has {len(weights)} numbers, and MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; "
                "give a number of at least 0 for each class."
            )
        if not 0 <= share <= 1:
            raise ConfigError(f"MODEL.IGNORE_CROWD_SHARE is {share}; give a share from 0 (off) to 1.")
        return cls(weights, share)

    def weights_of(self, stages: SupervisedStages, labels: Tensor, num_classes: int) -> Tensor | None:
        """(B, Q, K), or (K,), of the losses of the classes of queries with ``labels`` (B, Q); None where all are 1."""
        excused = stages.not_negative(num_classes, self.crowd_share)
        weights = torch.tensor(self.class_weights, device=labels.device) if self.class_weights else None
        if excused is None:
            return weights
        judged = ~excused | F.one_hot(labels, num_classes + 1)[..., :-1].bool()
        return judged.float() if weights is None else judged * weights


class FocalClassLoss:
    """Focal loss of every query; the target of one without an object is no class. Divided by the objects."""

    names: tuple[str, ...] = ("loss_ce",)
    needs_masks = False

    def __init__(
        self, *, weight: float, num_classes: int, alpha: float, gamma: float, options: ClassOptions = ClassOptions()
    ) -> None:
        self.weight, self.num_classes, self.alpha, self.gamma = weight, num_classes, alpha, gamma
        self.options = options

    def __call__(self, stages: SupervisedStages) -> Mapping[str, Tensor]:
        """Weighted losses (S,)."""
        logits, labels = stages.logits(), stages.labels(self.num_classes)
        weights = self.options.weights_of(stages, labels, self.num_classes)
        losses = focal_loss(logits, labels, alpha=self.alpha, gamma=self.gamma, weights=weights)
        return {"loss_ce": self.weight * stages.sum_queries(losses) / stages.num_objects}


class SoftmaxClassLoss:
    """Cross entropy over K classes and "no object": the weighted mean over all queries.

    Source: MaskFormer (Cheng et al., 2021); Mask DINO's semantic models.
    """

    names: tuple[str, ...] = ("loss_ce",)
    needs_masks = False

    def __init__(self, *, weight: float, num_classes: int, no_object_weight: float) -> None:
        self.weight, self.num_classes, self.no_object_weight = weight, num_classes, no_object_weight

    def __call__(self, stages: SupervisedStages) -> Mapping[str, Tensor]:
        """Weighted losses (S,)."""
        logits, labels = stages.logits(), stages.labels(self.num_classes)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        weights = torch.ones_like(losses).masked_fill(labels == self.num_classes, self.no_object_weight)
        total = stages.sum_queries(weights)
        if any(queries for queries, _ in stages.elsewhere):
            others = [pairs + (queries - pairs) * self.no_object_weight for queries, pairs in stages.elsewhere]
            total = total + total.new_tensor(others)
        # A batch without objects has no weight at all where no_object_weight is 0.
        total = total.clamp(min=1e-6)
        return {"loss_ce": self.weight * stages.sum_queries(weights * losses) / total}


class BoxLoss:
    """L1 and generalized IoU of the objects whose box is supervised. Divided by all objects."""

    names: tuple[str, ...] = ("loss_bbox", "loss_giou")
    needs_masks = False

    def __init__(self, *, l1_weight: float, giou_weight: float) -> None:
        self.l1_weight, self.giou_weight = l1_weight, giou_weight

    def __call__(self, stages: SupervisedStages) -> Mapping[str, Tensor]:
        """Weighted losses (S,)."""
        targets = stages.targets
        supervised = targets.box_supervised[stages.object]
        l1, giou = box_losses(stages.boxes(), targets.boxes[stages.object])
        if targets.box_weight is not None:
            supervised = supervised * targets.box_weight[stages.object]
        l1, giou = (stages.sum_pairs(losses * supervised) / stages.num_objects for losses in (l1, giou))
        return {"loss_bbox": self.l1_weight * l1, "loss_giou": self.giou_weight * giou}


class MaskLoss:
    """Cross entropy and dice loss of the matched masks at sampled points. Divided by all objects.

    No mask of another query is ever computed. With ``ignore_crowd``, the points of :func:`judged_points` are left out.
    """

    names: tuple[str, ...] = ("loss_mask", "loss_dice")
    needs_masks = True

    def __init__(
        self, *, ce_weight: float, dice_weight: float, sampler: PointSampler, ignore_crowd: bool = False
    ) -> None:
        self.ce_weight, self.dice_weight, self.sampler = ce_weight, dice_weight, sampler
        self.ignore_crowd = ignore_crowd

    def __call__(self, stages: SupervisedStages) -> Mapping[str, Tensor]:
        """Weighted losses (S,)."""
        sums: list[list[Tensor]] = [[] for _ in stages.predictions]
        for group in group_by_mask_features(stages.predictions):
            masks = stages.predictions[group[0]].masks
            assert masks is not None
            # Taken apart once: each image by itself would fill a whole batch with zeros in the backward pass.
            for image, features in enumerate(to_autocast_dtype(masks.features).unbind()):
                losses, counts = self._of_image(stages, group, image, features)
                for index, of_stage in zip(group, losses.split(counts, dim=1), strict=True):
                    sums[index].append(of_stage.sum(1))
        cross_entropy, dice = torch.stack([torch.stack(parts).sum(0) for parts in sums], dim=1) / stages.num_objects
        return {"loss_mask": self.ce_weight * cross_entropy, "loss_dice": self.dice_weight * dice}

    def _of_image(
        self, stages: SupervisedStages, group: list[int], image: int, features: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Losses (2, m) of the matched masks of one image, for stages that share its mask features; m of each stage."""
        embeds, places = [], []
        for index in group:
            masks, (query, obj) = stages.predictions[index].masks, stages.matches[index][image]
            assert masks is not None
            place = stages.targets.masks_of(image, obj)
            # Of an image without masks no row is taken, which leaves the weights of the masks a zero gradient.
            query, place = (query[:0], obj[:0]) if place is None else (query, place)
            embeds.append(masks.embed[image, query])
            places.append(place)
        chunks = zip(torch.cat(embeds).split(_MASKS_PER_CHUNK), torch.cat(places).split(_MASKS_PER_CHUNK), strict=True)
        losses = [self._of_masks(mask_logits(embed, features), stages.targets, place) for embed, place in chunks]
        return torch.cat(losses, dim=1), [len(place) for place in places]

    def _of_masks(self, logits: Tensor, targets: JoinedTargets, place: Tensor) -> Tensor:
        """Losses (2, m) of logits (m, h, w) against the masks at ``place`` (m,); zero for an object without a mask."""
        logits = logits.float()
        points = self.sampler.per_mask(logits.detach())
        regions, region_of = targets.unjudged if self.ignore_crowd else (None, place)
        if regions is None:
            sums = sums_at_points(logits, points, targets.masks, place)
            losses = torch.stack(mask_losses_of_sums(sums, points.shape[1]))
        else:
            labels = sample_binary_masks(targets.masks, place, points)
            judged = judged_points(regions, region_of[place], points, labels)
            losses = torch.stack(mask_losses(sample_points(logits[:, None], points)[:, 0], labels, judged))
        return losses * targets.mask_supervised[place]
