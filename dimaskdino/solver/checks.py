"""Checks of the SOLVER keys, for the start of a run: before any data is read."""

from detectron2.config import CfgNode

from dimaskdino.errors import ConfigError, check_choice, check_range
from dimaskdino.solver.optimizer import OPTIMIZERS, GradientClipper
from dimaskdino.solver.parameters import parameter_rules
from dimaskdino.solver.schedule import schedule_names

WARMUP_METHODS = ("linear", "constant")
POSITIVE = ("MAX_ITER", "IMS_PER_BATCH", "ACCUMULATION_STEPS")
NOT_NEGATIVE = ["BASE_LR", "BACKBONE_MULTIPLIER", "LAYER_DECAY", "MOMENTUM", "WARMUP_FACTOR", "WARMUP_ITERS"]
NOT_NEGATIVE += ["WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_EMBED", "CHECKPOINT_PERIOD"]
NOT_NEGATIVE += ["REFERENCE_WORLD_SIZE", "REFERENCE_BATCH_SIZE"]
MEANINGS = {
    "IMS_PER_BATCH": "images per step over all processes",
    "CHECKPOINT_PERIOD": "0 saves the last checkpoint only",
}


def check_solver(cfg: CfgNode, num_processes: int) -> None:
    """Check every SOLVER key that a training reads; a ConfigError names the key, its value and what it may be."""
    solver = cfg.SOLVER
    check_choice("SOLVER.OPTIMIZER", solver.OPTIMIZER, list(OPTIMIZERS))
    check_choice("SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, schedule_names(cfg))
    check_choice("SOLVER.WARMUP_METHOD", solver.WARMUP_METHOD, WARMUP_METHODS)
    for least, names in ((1, POSITIVE), (0, NOT_NEGATIVE)):
        for name in names:
            check_range(f"SOLVER.{name}", solver[name], least, meaning=MEANINGS.get(name, ""))
    steps = list(solver.STEPS)
    if any(type(step) is not int for step in steps) or steps != sorted({*steps}) or min(steps, default=1) < 1:
        raise ConfigError(
            f"SOLVER.STEPS is {tuple(steps)}; it must be iterations from 1 on in increasing order, or () for none."
        )
    _check_batch(cfg, num_processes)
    if solver.REFERENCE_BATCH_SIZE and solver.REFERENCE_WORLD_SIZE:
        raise ConfigError(
            "SOLVER.REFERENCE_BATCH_SIZE and SOLVER.REFERENCE_WORLD_SIZE both scale the learning rate; set one "
            "of them to 0."
        )
    if not 0 <= solver.EMA.DECAY < 1:
        raise ConfigError(f"SOLVER.EMA.DECAY is {solver.EMA.DECAY}; it must be at least 0 and below 1.")
    parameter_rules(cfg)
    GradientClipper.from_config(cfg)


def _check_batch(cfg: CfgNode, num_processes: int) -> None:
    """Check that the processes share a batch evenly; the trainer scales the batch from a reference number of them."""
    reference, steps = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.ACCUMULATION_STEPS
    sharing = reference or num_processes
    if cfg.SOLVER.IMS_PER_BATCH % (sharing * steps):
        of = "SOLVER.REFERENCE_WORLD_SIZE" if reference else "this job"
        parts = f" times the {steps} parts of SOLVER.ACCUMULATION_STEPS" if steps > 1 else ""
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH} ({MEANINGS['IMS_PER_BATCH']}); it must be a multiple "
            f"of the {sharing} processes of {of}{parts}."
        )
