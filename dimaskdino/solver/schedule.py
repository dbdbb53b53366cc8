"""Learning-rate schedules: detectron2's, and the polynomial one of the releases' semantic configurations."""

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer

from dimaskdino.compat import lr_schedules

_POLYNOMIAL = "WarmupPolyLR"


class WarmupPolynomial(ParamScheduler):
    """Factor on the learning rate: (1 - progress) ** power, with a warm-up before and a floor after.

    Args:
        power: exponent of the decay.
        floor: smallest factor after the warm-up; 0 for none.
        warmup_share: share of the training, in [0, 1], over which the factor is scaled up linearly.
        warmup_start: scale at the beginning of the warm-up.
    """

    def __init__(self, *, power: float, floor: float, warmup_share: float, warmup_start: float) -> None:
        self.power = power
        self.floor = floor
        self.warmup_share = warmup_share
        self.warmup_start = warmup_start

    def __call__(self, where: float) -> float:
        """The factor at progress ``where`` in [0, 1)."""
        decay = (1.0 - where) ** self.power
        if where >= self.warmup_share:
            return max(decay, self.floor)
        done = where / self.warmup_share
        return decay * (self.warmup_start + (1.0 - self.warmup_start) * done)


def schedule_names(cfg: CfgNode) -> list[str]:
    """The values of SOLVER.LR_SCHEDULER_NAME."""
    return [*lr_schedules(cfg), _POLYNOMIAL]


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
    """The schedule that SOLVER.LR_SCHEDULER_NAME names, stepped once per iteration."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != _POLYNOMIAL:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    schedule = WarmupPolynomial(
        power=solver.POLY_LR_POWER,
        floor=solver.POLY_LR_CONSTANT_ENDING,
        warmup_share=min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        warmup_start=solver.WARMUP_FACTOR,
    )
    return LRMultiplier(optimizer, schedule, solver.MAX_ITER)
