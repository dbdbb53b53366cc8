"""Optimizer, learning-rate schedule and gradient clipping, from the SOLVER keys."""

from dimaskdino.solver.checks import check_solver
from dimaskdino.solver.optimizer import (
    NEW_RUN,
    GradientClipper,
    build_optimizer,
    check_optimizer_state,
    reorder_state,
    restored_settings,
    sharded_state,
    warn_of_kept_settings,
)
from dimaskdino.solver.parameters import freeze_parameters, parameter_groups
from dimaskdino.solver.schedule import batch_factor, build_lr_scheduler, scale_learning_rate, take_configured_rates

__all__ = [
    "NEW_RUN",
    "GradientClipper",
    "batch_factor",
    "build_lr_scheduler",
    "build_optimizer",
    "check_optimizer_state",
    "check_solver",
    "freeze_parameters",
    "parameter_groups",
    "reorder_state",
    "restored_settings",
    "scale_learning_rate",
    "sharded_state",
    "take_configured_rates",
    "warn_of_kept_settings",
]
