"""The training loss: one loop over supervised stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers.points import sample_binary_masks, sample_points
from dimaskdino.losses.functions import box_losses, class_loss, mask_losses
from dimaskdino.losses.matcher import CostWeights, HungarianMatcher, Matches
from dimaskdino.losses.points import PointSampler, RandomPointSampler
from dimaskdino.losses.shared import FeaturesByImage, JoinedTargets, ObjectCounts
from dimaskdino.modeling.decoder import DecoderOutput
from dimaskdino.modeling.heads import StagePrediction, mask_logits
from dimaskdino.modeling.targets import Targets


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms, by the name that the term has in the logs."""

    loss_ce: float
    loss_bbox: float
    loss_giou: float
    loss_mask: float
    loss_dice: float


@dataclass(frozen=True)
class Supervision:
    """One stage with the objects that its queries stand for.

    Attributes:
        stage: the predictions.
        matches: (query, object) indices of each image.
        suffix: ending of the names of its losses.
        num_objects: scalar that its losses are divided by.
        use_masks: supervise the masks.
    """

    stage: StagePrediction
    matches: Matches
    suffix: str
    num_objects: Tensor
    use_masks: bool


class Criterion(nn.Module):
    """Weighted losses of every stage.

    Args:
        num_classes: K.
        weights: of the terms.
        matcher: pairs queries and objects.
        sampler: gives the points of the mask losses.
        use_boxes: supervise boxes.
        denoising: ``no``, ``standard`` (class and box) or ``seg`` (mask as well).
        deep_supervision: supervise every decoder layer; otherwise the last one, and selection, alone.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        weights: LossWeights,
        matcher: HungarianMatcher,
        sampler: PointSampler,
        use_boxes: bool,
        denoising: str,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.weights, self.matcher, self.sampler = num_classes, weights, matcher, sampler
        self.use_boxes, self.denoising, self.deep_supervision = use_boxes, denoising, deep_supervision

    @classmethod
    def from_config(cls, cfg: CfgNode, sampler: PointSampler | None = None) -> dict[str, Any]:
        """Read the weights of MODEL.MaskDINO; ``sampler`` replaces the random one."""
        node = cfg.MODEL.MaskDINO
        if node.TRAIN_NUM_POINTS < 1 or node.OVERSAMPLE_RATIO < 1 or not 0 <= node.IMPORTANCE_SAMPLE_RATIO <= 1:
            raise ConfigError(
                "MODEL.MaskDINO.TRAIN_NUM_POINTS and OVERSAMPLE_RATIO must be at least 1 and IMPORTANCE_SAMPLE_RATIO "
                f"in [0, 1]; they are {node.TRAIN_NUM_POINTS}, {node.OVERSAMPLE_RATIO}, {node.IMPORTANCE_SAMPLE_RATIO}."
            )
        sampler = sampler or RandomPointSampler(
            num_points=node.TRAIN_NUM_POINTS,
            oversample_ratio=node.OVERSAMPLE_RATIO,
            importance_ratio=node.IMPORTANCE_SAMPLE_RATIO,
        )
        costs = CostWeights(
            classes=node.COST_CLASS_WEIGHT,
            box=node.COST_BOX_WEIGHT,
            giou=node.COST_GIOU_WEIGHT,
            mask=node.COST_MASK_WEIGHT,
            dice=node.COST_DICE_WEIGHT,
        )
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "weights": LossWeights(
                loss_ce=node.CLASS_WEIGHT,
                loss_bbox=node.BOX_WEIGHT,
                loss_giou=node.GIOU_WEIGHT,
                loss_mask=node.MASK_WEIGHT,
                loss_dice=node.DICE_WEIGHT,
            ),
            "matcher": HungarianMatcher(weights=costs, sampler=sampler),
            "sampler": sampler,
            "use_boxes": node.BOX_LOSS,
            "denoising": node.DN,
            "deep_supervision": node.DEEP_SUPERVISION,
        }

    def forward(self, output: DecoderOutput, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Weighted losses.

        Args:
            output: of the decoder, in training.
            targets: of each image.

        Returns:
            Scalar per term and stage: loss_ce, loss_bbox, loss_giou, loss_mask, loss_dice, with the ending _interm,
            _di_i, _i (decoder, before layer i), none (last layer), and the same after _dn for denoising queries. The
            names depend on the configuration alone, so that all processes log the same ones.
        """
        suffixes = self._suffixes(output)
        counts = ObjectCounts(targets, output.denoising)
        losses: dict[str, Tensor] = {}
        joined, features = JoinedTargets(targets), FeaturesByImage()
        for supervision in self._supervise(output, targets, suffixes, counts):
            losses.update(self._stage_losses(supervision, joined, features))
        if self.denoising != "no" and output.denoising is None:
            terms, endings = self._terms(self.denoising == "seg"), _denoising_suffixes(output, suffixes).values()
            losses.update({f"{term}{end}": counts.objects.new_zeros(()) for end in endings for term in terms})
        return losses

    def _suffixes(self, output: DecoderOutput) -> dict[str, str]:
        """Ending of the loss names of each supervised decoder stage, "initial" and "layer.l", by stage name."""
        refined = [stage.name for stage in output.stages if is_refined(stage.name)]
        earlier = {name: f"_{index}" for index, name in enumerate(refined[:-1])} if self.deep_supervision else {}
        return earlier | {refined[-1]: ""}

    def _terms(self, use_masks: bool) -> list[str]:
        boxes = ["loss_bbox", "loss_giou"] if self.use_boxes else []
        return ["loss_ce", *boxes, *(["loss_mask", "loss_dice"] if use_masks else [])]

    def _supervise(
        self, output: DecoderOutput, targets: Sequence[Targets], suffixes: dict[str, str], counts: ObjectCounts
    ) -> list[Supervision]:
        """Every stage to supervise, with its matches."""
        stages = [stage for stage in output.stages if stage.name in suffixes or not is_refined(stage.name)]
        supervisions = [
            Supervision(
                stage,
                matches,
                suffixes.get(stage.name, "_" + stage.name.replace(".", "_")),
                counts.objects,
                stage.masks is not None,
            )
            for stage, matches in zip(stages, self.matcher(stages, targets), strict=True)
        ]
        if output.denoising is None:
            return supervisions
        matches, num_groups = output.denoising.matches, output.denoising.num_groups
        endings = _denoising_suffixes(output, suffixes)
        return supervisions + [
            Supervision(stage, matches, endings[name], counts.denoised * num_groups, self.denoising == "seg")
            for stage in output.denoising_stages
            if (name := stage.name.removeprefix("dn.")) in endings
        ]

    def _stage_losses(
        self, supervision: Supervision, targets: JoinedTargets, features: FeaturesByImage
    ) -> dict[str, Tensor]:
        stage = supervision.stage
        image, query, obj = targets.join(supervision.matches)
        labels = torch.full(stage.logits.shape[:2], self.num_classes, dtype=torch.int64, device=stage.logits.device)
        labels[image, query] = targets.labels[obj]
        terms = {"loss_ce": class_loss(stage.logits.float(), labels)}
        if self.use_boxes:
            terms["loss_bbox"], terms["loss_giou"] = box_losses(stage.boxes[image, query].float(), targets.boxes[obj])
        else:  # a zero gradient for the parameters that make boxes, as data-parallel training needs
            terms["loss_ce"] = terms["loss_ce"] + 0.0 * stage.boxes.sum()
        if supervision.use_masks:
            logits = self._matched_masks(stage, supervision.matches, features)
            points = self.sampler.per_mask(logits.detach())
            labels = sample_binary_masks(targets.masks, obj, points)
            terms["loss_mask"], terms["loss_dice"] = mask_losses(sample_points(logits[:, None], points)[:, 0], labels)
        return {
            f"{name}{supervision.suffix}": getattr(self.weights, name) * value / supervision.num_objects
            for name, value in terms.items()
        }

    @staticmethod
    def _matched_masks(stage: StagePrediction, matches: Matches, features: FeaturesByImage) -> Tensor:
        """Mask logits (N, h, w) float32 of the matched queries, image after image; no others are ever computed."""
        assert stage.masks is not None
        maps = features(stage.masks.features)
        masks = [mask_logits(stage.masks.embed[i, query], maps[i]) for i, (query, _) in enumerate(matches)]
        return torch.cat(masks).float()


def _denoising_suffixes(output: DecoderOutput, suffixes: dict[str, str]) -> dict[str, str]:
    """Ending of the denoising queries' loss names, by decoder stage.

    As in the releases, a model of learned queries (one-stage) does not denoise its first stage.
    """
    one_stage = all(is_refined(stage.name) for stage in output.stages)
    return {name: f"_dn{end}" for name, end in suffixes.items() if not (one_stage and end == "_0")}


def is_refined(name: str) -> bool:
    """Whether a stage belongs to the decoder proper: "initial" or "layer.l"."""
    return name == "initial" or name.startswith("layer.")
