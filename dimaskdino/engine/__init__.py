"""Training: the launcher, the command line's set-up, the trainer and its optimiser."""

from dimaskdino.engine.cpu_memory import keep_freed_memory
from dimaskdino.engine.launch import launch
from dimaskdino.engine.optimizer import GradientClipper, build_optimizer
from dimaskdino.engine.schedule import build_lr_scheduler
from dimaskdino.engine.setup import argument_parser, setup
from dimaskdino.engine.train_step import TrainStep
from dimaskdino.engine.trainer import Trainer, evaluate

__all__ = [
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
]
