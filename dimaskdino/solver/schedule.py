"""Learning-rate schedules: detectron2's, and the polynomial one of the releases' semantic configurations."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer

from dimaskdino.compat import lr_schedules

logger = logging.getLogger(__name__)

_POLYNOMIAL = "WarmupPolyLR"


class WarmupPolynomial(ParamScheduler):
    """Factor on the learning rate: (1 - progress) ** SOLVER.POLY_LR_POWER.

    It is scaled up linearly from WARMUP_FACTOR during WARMUP_ITERS, and then at least POLY_LR_CONSTANT_ENDING.
    """

    def __init__(self, solver: CfgNode) -> None:
        self._solver = solver
        self._warmup_share = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)

    def __call__(self, where: float) -> float:
        """The factor at progress ``where`` in [0, 1)."""
        decay = (1.0 - where) ** self._solver.POLY_LR_POWER
        if where >= self._warmup_share:
            return max(decay, self._solver.POLY_LR_CONSTANT_ENDING)
        start = self._solver.WARMUP_FACTOR
        return decay * (start + (1.0 - start) * (where / self._warmup_share))


def batch_factor(solver: Mapping[str, Any]) -> float:
    """What SOLVER.REFERENCE_BATCH_SIZE multiplies the learning rate by; 1 where it is not set."""
    reference = solver.get("REFERENCE_BATCH_SIZE", 0)
    return solver["IMS_PER_BATCH"] / reference if reference else 1.0


def scale_learning_rate(cfg: CfgNode) -> CfgNode:
    """``cfg`` with SOLVER.BASE_LR in proportion to the images per iteration, if SOLVER.REFERENCE_BATCH_SIZE is set."""
    if (factor := batch_factor(cfg.SOLVER)) == 1:
        return cfg
    scaled = cfg.clone()
    scaled.defrost()
    scaled.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR * factor
    if cfg.is_frozen():
        scaled.freeze()
    logger.info(
        "SOLVER.BASE_LR %g is for %d images per iteration (SOLVER.REFERENCE_BATCH_SIZE); with %d, it is %g.",
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.REFERENCE_BATCH_SIZE,
        cfg.SOLVER.IMS_PER_BATCH,
        scaled.SOLVER.BASE_LR,
    )
    return scaled


def take_configured_rates(scheduler: LRMultiplier, rates: Sequence[float]) -> None:
    """Go on with other initial rates of the groups than the checkpoint's, at the same place of the schedule."""
    groups = scheduler.optimizer.param_groups
    logger.info(
        "--resume: the images per iteration are others than before, so the learning rates are those of the "
        "configuration (SOLVER.REFERENCE_BATCH_SIZE): %s -> %s.",
        [group["initial_lr"] for group in groups],
        list(rates),
    )
    scheduler.base_lrs = list(rates)
    for group, initial, now in zip(groups, rates, scheduler.get_lr(), strict=True):
        group["initial_lr"], group["lr"] = initial, now


def schedule_names(cfg: CfgNode) -> list[str]:
    """The values of SOLVER.LR_SCHEDULER_NAME."""
    return [*lr_schedules(cfg), _POLYNOMIAL]


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
    """The schedule that SOLVER.LR_SCHEDULER_NAME names, stepped once per iteration."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != _POLYNOMIAL:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    return LRMultiplier(optimizer, WarmupPolynomial(cfg.SOLVER), cfg.SOLVER.MAX_ITER)
