"""Optimizer, learning-rate schedule and gradient clipping, from the SOLVER keys."""

from dimaskdino.solver.optimizer import GradientClipper, build_optimizer, check_solver
from dimaskdino.solver.parameters import freeze_parameters, parameter_groups
from dimaskdino.solver.schedule import build_lr_scheduler

__all__ = [
    "GradientClipper",
    "build_lr_scheduler",
    "build_optimizer",
    "check_solver",
    "freeze_parameters",
    "parameter_groups",
]
