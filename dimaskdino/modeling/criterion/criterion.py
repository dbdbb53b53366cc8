"""The training loss: every supervised stage, matched and weighed by a short list of terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.criterion.matcher import BoxCost, CostTerm, FocalClassCost, HungarianMatcher, MaskCost
from dimaskdino.modeling.criterion.points import PointSampler, RandomPointSampler
from dimaskdino.modeling.criterion.terms import (
    BoxLoss,
    ClassOptions,
    FocalClassLoss,
    LossTerm,
    MaskLoss,
    SoftmaxClassLoss,
    SupervisedStages,
    Supervision,
)
from dimaskdino.modeling.registry import COST_REGISTRY, LOSS_REGISTRY, build_registered
from dimaskdino.modeling.transformer_decoder.checks import uses_no_object_class
from dimaskdino.structures import DecoderOutput, DenoisingQueries, Matches, Stage, StagePrediction, Targets


@dataclass(frozen=True)
class StepObjects:
    """The objects of all images of an optimization step, where a batch is a part of it."""

    of_images: Sequence[int]  # objects of each image
    denoised: Sequence[int]  # those that one group of denoising queries has room for


class Criterion(nn.Module):
    """Weighted losses of every stage.

    Attributes:
        step: what the losses are divided by instead of the objects of their batch; None unless gradients accumulate.

    Args:
        terms: of the loss, in the order of their names in the logs.
        matcher: pairs queries and objects.
        denoising: ``no``, ``standard`` (class and box) or ``seg`` (mask as well).
        deep_supervision: supervise every decoder layer; otherwise the last one, and selection, alone.
        learned_queries_skip_first: leave out the first stage of denoising where queries are learned, as in Mask DINO.
    """

    @configurable
    def __init__(
        self,
        *,
        terms: Sequence[LossTerm],
        matcher: HungarianMatcher,
        denoising: str,
        deep_supervision: bool,
        learned_queries_skip_first: bool = True,
    ) -> None:
        super().__init__()
        self.terms, self.matcher = list(terms), matcher
        self.denoising, self.deep_supervision = denoising, deep_supervision
        self.learned_queries_skip_first = learned_queries_skip_first
        self.step: StepObjects | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, sampler: PointSampler | None = None) -> dict[str, Any]:
        """Read the terms of MODEL.MaskDINO; ``sampler`` replaces the random one."""
        node = cfg.MODEL.MaskDINO
        at_points = {"sampler": sampler or RandomPointSampler(cfg), "ignore_crowd": cfg.MODEL.IGNORE_CROWD_SHARE > 0}
        focal = {"alpha": node.FOCAL_ALPHA, "gamma": node.FOCAL_GAMMA}
        costs: list[CostTerm] = [
            FocalClassCost(weight=node.COST_CLASS_WEIGHT, **focal),
            BoxCost(l1_weight=node.COST_BOX_WEIGHT, giou_weight=node.COST_GIOU_WEIGHT),
            MaskCost(ce_weight=node.COST_MASK_WEIGHT, dice_weight=node.COST_DICE_WEIGHT, **at_points),
            *extra_costs(cfg),
        ]
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        terms: list[LossTerm]
        if uses_no_object_class(cfg):
            no_object = {"no_object_weight": node.NO_OBJECT_WEIGHT}
            terms = [SoftmaxClassLoss(weight=node.CLASS_WEIGHT, num_classes=num_classes, **no_object)]
        else:
            options = ClassOptions.from_config(cfg)
            terms = [FocalClassLoss(weight=node.CLASS_WEIGHT, num_classes=num_classes, options=options, **focal)]
        if node.BOX_LOSS:
            terms.append(BoxLoss(l1_weight=node.BOX_WEIGHT, giou_weight=node.GIOU_WEIGHT))
        if node.PREDICT_MASKS:
            terms.append(MaskLoss(ce_weight=node.MASK_WEIGHT, dice_weight=node.DICE_WEIGHT, **at_points))
        elif not node.BOX_LOSS:
            raise ConfigError("MODEL.MaskDINO.BOX_LOSS and PREDICT_MASKS are both False; set one of them.")
        return {
            "terms": with_extra_terms(cfg, terms),
            "matcher": HungarianMatcher(costs),
            "denoising": node.DN,
            "deep_supervision": node.DEEP_SUPERVISION,
        }

    def forward(self, output: DecoderOutput, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Weighted losses.

        Args:
            output: of the decoder, in training.
            targets: of each image.

        Returns:
            Scalar per term and stage: loss_ce, loss_bbox, loss_giou, loss_mask, loss_dice, with the ending of the
            stage (:attr:`dimaskdino.structures.Stage.loss_suffix`). The names depend on the configuration alone, so
            that all processes log the same ones.
        """
        supervisions = self._supervise(output, targets)
        losses: dict[str, Tensor] = {}
        for term in self.terms:
            chosen = [each for each in supervisions if each.use_masks or not term.needs_masks]
            for name, values in _losses_of(term, chosen, targets).items() if chosen else ():
                losses |= {f"{name}{_suffix(each)}": x for each, x in zip(chosen, values.unbind(), strict=True)}
        if not any("loss_bbox" in term.names for term in self.terms):
            # A zero gradient for the parameters that make boxes, as data-parallel training needs.
            for each in supervisions:
                name = f"loss_ce{_suffix(each)}"
                losses[name] = losses[name] + 0.0 * each.prediction.boxes.sum()
        return losses | self._zero_denoising_losses(output, supervisions)

    def _supervise(self, output: DecoderOutput, targets: Sequence[Targets]) -> list[Supervision]:
        """Every stage to supervise, with its matches."""
        objects, denoised = _count_objects(targets, output.denoising, self.step)
        stages = [each for each in output.stages if self._is_supervised(each.stage)]
        matches = self.matcher(stages, targets)
        supervisions = [
            Supervision(
                stage, of_stage, objects, use_masks=stage.masks is not None, elsewhere=self._elsewhere(stage, of_stage)
            )
            for stage, of_stage in zip(stages, matches, strict=True)
        ]
        if output.denoising is None:
            return supervisions
        total = denoised * output.denoising.num_groups
        return supervisions + [
            Supervision(
                each,
                output.denoising.matches,
                total,
                use_masks=self.denoising == "seg" and each.masks is not None,
                elsewhere=self._elsewhere(each, output.denoising.matches, output.denoising.num_groups),
            )
            for each in output.denoising_stages
            if self._is_denoised(each.stage, output)
        ]

    def _elsewhere(self, prediction: StagePrediction, matches: Matches, num_groups: int = 0) -> tuple[int, int]:
        """Queries and matched pairs of a stage in the other batches of the step."""
        if self.step is None:
            return 0, 0
        num_queries = prediction.logits.shape[1]
        in_step = [min(count, num_queries) for count in self.step.of_images]
        pairs = num_groups * sum(self.step.denoised) if num_groups else sum(in_step)
        others = len(in_step) - len(matches)
        return others * num_queries, pairs - sum(len(query) for query, _ in matches)

    def _is_supervised(self, stage: Stage) -> bool:
        return self.deep_supervision or stage.place is None

    def _is_denoised(self, stage: Stage, output: DecoderOutput) -> bool:
        """Whether denoising queries are supervised."""
        learned_queries = all(each.stage.is_refined for each in output.stages)
        skips_first = learned_queries and self.learned_queries_skip_first
        return self._is_supervised(stage) and not (skips_first and stage.place == 0)

    def _zero_denoising_losses(self, output: DecoderOutput, supervisions: list[Supervision]) -> dict[str, Tensor]:
        """The losses of denoising, all zero, where this batch denoises nothing."""
        if self.denoising == "no" or output.denoising is not None:
            return {}
        return {
            f"{name}{each.prediction.stage.of_denoising().loss_suffix}": each.num_objects.new_zeros(())
            for each in supervisions
            if each.prediction.stage.is_refined and self._is_denoised(each.prediction.stage, output)
            for term in self.terms
            if not term.needs_masks or (self.denoising == "seg" and each.use_masks)
            for name in term.names
        }


def with_extra_terms(cfg: CfgNode, terms: Sequence[LossTerm]) -> list[LossTerm]:
    """The terms of a model, and those that MODEL.EXTRA_LOSSES names.

    Raises:
        ConfigError: one of the latter does not say what it computes, or has the name of another loss.
    """
    taken = {name for term in terms for name in term.names}
    extra = build_registered(LOSS_REGISTRY, cfg.MODEL.EXTRA_LOSSES, "MODEL.EXTRA_LOSSES", cfg)
    for registered, term in extra.items():
        if missing := [name for name in ("names", "needs_masks") if not hasattr(term, name)]:
            raise ConfigError(
                f"MODEL.EXTRA_LOSSES: {registered} has no {' and no '.join(missing)}; see docs/extend.md."
            )
        if not callable(term):
            raise ConfigError(f"MODEL.EXTRA_LOSSES: {registered} has no __call__; see docs/extend.md.")
        if isinstance(term.names, str) or not all(isinstance(name, str) for name in term.names):
            raise ConfigError(f'MODEL.EXTRA_LOSSES: {registered}.names is {term.names!r}; write ("loss_mine",).')
        if shared := sorted(taken & {*term.names}):
            raise ConfigError(
                f"MODEL.EXTRA_LOSSES: {registered} gives {', '.join(shared)}, which another loss of the model gives as "
                "well; choose another name."
            )
        taken |= {*term.names}
    return [*terms, *extra.values()]


def extra_costs(cfg: CfgNode) -> list[CostTerm]:
    """The costs that MODEL.EXTRA_COSTS names; raises ConfigError if one cannot be called."""
    costs = build_registered(COST_REGISTRY, cfg.MODEL.EXTRA_COSTS, "MODEL.EXTRA_COSTS", cfg)
    for name, cost in costs.items():
        if not callable(cost):
            raise ConfigError(f"MODEL.EXTRA_COSTS: {name} has no __call__; see docs/extend.md.")
    return list(costs.values())


def _losses_of(term: LossTerm, chosen: Sequence[Supervision], targets: Sequence[Targets]) -> Mapping[str, Tensor]:
    """The losses of a term, which must be those that it names, one number for each stage."""
    losses = term(SupervisedStages(chosen, targets))
    shapes: Any = type(losses).__name__
    if isinstance(losses, Mapping):
        shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in losses.items()}
    if shapes != dict.fromkeys(term.names, (len(chosen),)):
        kind = type(term)
        raise ConfigError(
            f"The loss {kind.__module__}.{kind.__qualname__} gives {shapes!s:.200}, but its names are "
            f"{tuple(term.names)}, and each needs one value for each of {len(chosen)} stages (see "
            "SupervisedStages.sum_pairs)."
        )
    return losses


def _suffix(supervision: Supervision) -> str:
    return supervision.prediction.stage.loss_suffix


def _count_objects(
    targets: Sequence[Targets], denoising: DenoisingQueries | None, step: StepObjects | None
) -> tuple[Tensor, Tensor]:
    """Objects, and those that are denoised (one group), per process: scalars, at least 1, that stay on the device."""
    if step is not None:
        objects, denoised = sum(step.of_images), sum(step.denoised)
    else:
        objects = sum(len(target) for target in targets)
        pairs = sum(len(query) for query, _ in denoising.matches) if denoising else 0
        denoised = pairs // denoising.num_groups if denoising else 0
    # Filled on the device: the host would have to wait for numbers that it copies there.
    device = targets[0].labels.device
    counts = torch.stack([torch.full((), float(count), device=device) for count in (objects, denoised)])
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(counts)
    objects_per_process, denoised_per_process = (counts / comm.get_world_size()).clamp(min=1).unbind()
    return objects_per_process, denoised_per_process
