"""Training: the launcher, the set-up of a run, the trainer and its hooks."""

from dimaskdino.command_line import argument_parser
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.engine.hooks import HOOK_REGISTRY
from dimaskdino.engine.launch import launch
from dimaskdino.engine.setup import setup
from dimaskdino.engine.train_step import TrainStep
from dimaskdino.engine.trainer import Trainer, evaluate, train_or_evaluate
from dimaskdino.solver import GradientClipper, build_lr_scheduler, build_optimizer

__all__ = [
    "HOOK_REGISTRY",
    "GradientClipper",
    "TrainStep",
    "Trainer",
    "argument_parser",
    "build_lr_scheduler",
    "build_optimizer",
    "evaluate",
    "keep_freed_memory",
    "launch",
    "setup",
    "train_or_evaluate",
]
