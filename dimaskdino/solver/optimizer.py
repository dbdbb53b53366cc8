"""The optimizer of the releases (AdamW, a slower backbone, no decay on norms and embeddings), and checks of SOLVER."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim import Optimizer

from dimaskdino.errors import CheckpointError, ConfigError, check_choice, check_range
from dimaskdino.layers.shards import is_sharded, local, part_of
from dimaskdino.solver.parameters import parameter_groups, parameter_rules
from dimaskdino.solver.schedule import schedule_names

logger = logging.getLogger(__name__)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "ADAMW": lambda groups, cfg: torch.optim.AdamW(groups, cfg.SOLVER.BASE_LR, fused=True),
    "SGD": lambda groups, cfg: torch.optim.SGD(
        groups, cfg.SOLVER.BASE_LR, momentum=cfg.SOLVER.MOMENTUM, nesterov=cfg.SOLVER.NESTEROV
    ),
}
NEW_RUN = "start a new run with MODEL.WEIGHTS set to the checkpoint"
# Settings of a parameter group that a checkpoint restores: in words, and the keys that set them.
RESTORED = {
    "initial_lr": ("learning rates", "SOLVER.BASE_LR and its factors (BACKBONE_MULTIPLIER, LAYER_DECAY, PARAM_GROUPS)"),
    "weight_decay": ("weight decays", "SOLVER.WEIGHT_DECAY, WEIGHT_DECAY_NORM and WEIGHT_DECAY_EMBED"),
    "momentum": ("momenta", "SOLVER.MOMENTUM"),
}

WARMUP_METHODS = ("linear", "constant")
POSITIVE = ("MAX_ITER", "IMS_PER_BATCH", "ACCUMULATION_STEPS")
NOT_NEGATIVE = ["BASE_LR", "BACKBONE_MULTIPLIER", "LAYER_DECAY", "MOMENTUM", "WARMUP_FACTOR", "WARMUP_ITERS"]
NOT_NEGATIVE += ["WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_EMBED", "CHECKPOINT_PERIOD"]
NOT_NEGATIVE += ["REFERENCE_WORLD_SIZE", "REFERENCE_BATCH_SIZE"]
MEANINGS = {
    "IMS_PER_BATCH": "images per step over all processes",
    "CHECKPOINT_PERIOD": "0 saves the last checkpoint only",
}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """The optimizer that SOLVER.OPTIMIZER names, over :func:`parameter_groups`."""
    groups = parameter_groups(cfg, model)
    build: Any = functools.partial(OPTIMIZERS[cfg.SOLVER.OPTIMIZER], cfg=cfg)
    for group in groups:
        logger.info("%d parameters: lr %g, weight decay %g", len(group["params"]), group["lr"], group["weight_decay"])
    if cfg.SOLVER.SHARDING == "optimizer" and comm.get_world_size() > 1:
        from dimaskdino.solver.sharded import ShardedOptimizer  # takes a second to import

        return ShardedOptimizer(groups, build)
    return build(groups)


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


class GradientClipper:
    """Clips gradients as SOLVER.CLIP_GRADIENTS says, and measures their norm before that.

    CLIP_TYPE ``full_model`` scales all gradients by one factor so that their global norm is at most CLIP_VALUE (the
    releases' choice); ``norm`` does so for each parameter separately; ``value`` clamps each element.
    """

    TYPES = ("full_model", "norm", "value")

    def __init__(self, *, clip_type: str, limit: float, norm_type: float = 2.0) -> None:
        check_choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type, self.TYPES)
        self.clip_type = clip_type
        self.limit = limit
        self.norm_type = norm_type

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "GradientClipper":
        """The clipper of SOLVER.CLIP_GRADIENTS; one that never clips if clipping is disabled."""
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED:
            return cls(clip_type="full_model", limit=float("inf"))
        return cls(clip_type=clip.CLIP_TYPE, limit=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)

    def __call__(self, parameters: list[nn.Parameter]) -> Tensor:
        """Clip the gradients of ``parameters`` in place; returns their global norm before that, a scalar."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        parts = [local(gradient) for gradient in gradients]
        norms = _norms(parts, self.norm_type, sharded=any(map(is_sharded, gradients)))
        norm = torch.linalg.vector_norm(norms, self.norm_type)
        if self.clip_type == "value":
            torch._foreach_clamp_min_(parts, -self.limit)
            torch._foreach_clamp_max_(parts, self.limit)
        elif self.limit < math.inf:
            too_long = norms if self.clip_type == "norm" else norm
            factors = (self.limit / (too_long + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(parts, list(factors.unbind()) if self.clip_type == "norm" else factors)
        return norm


def _norms(parts: list[Tensor], norm_type: float, *, sharded: bool) -> Tensor:
    """The norm of each gradient; of those that are ``sharded``, from the parts of all processes."""
    if not sharded:
        return torch.stack(torch._foreach_norm(parts, norm_type))
    if math.isinf(norm_type):
        norms = torch.stack([part.abs().max() if part.numel() else part.new_zeros(()) for part in parts])
        dist.all_reduce(norms, dist.ReduceOp.MAX)
        return norms
    powers = torch.stack(torch._foreach_norm(parts, norm_type)) ** norm_type
    dist.all_reduce(powers)
    return powers ** (1 / norm_type)


def reorder_state(
    optimizer: Optimizer, model: nn.Module, state: dict[str, Any], saved_names: Sequence[str]
) -> dict[str, Any]:
    """Match a saved state to parameters that the model now has in another order; torch numbers them by their order.

    The parameters are named in the order of the model that was saved; other names are skipped. A state whose groups are
    not those of ``optimizer`` stays as it is.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    saved: dict[int, dict[nn.Parameter, None]] = {}  # by group, in the order of the saved model
    for parameter in (parameters[name] for name in saved_names if name in parameters):
        if parameter in group_of:
            saved.setdefault(group_of[parameter], {})[parameter] = None
    groups = state["param_groups"]
    if [len(members) for members in saved.values()] != [len(group["params"]) for group in groups]:
        return state
    number: dict[nn.Parameter, int] = {}
    for members, group in zip(saved.values(), groups, strict=True):
        number |= zip(members, group["params"], strict=True)
    saved_group = dict(zip(saved, groups, strict=True))
    return {
        "param_groups": [
            {**saved_group[index], "params": [number[p] for p in group["params"]]}
            for index, group in enumerate(optimizer.param_groups)
        ],
        "state": state["state"],
    }


def sharded_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The part that this process has of a whole ``state_dict``, where the parameters are sharded; else all of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parts = {
        number: {
            name: part_of(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in state["state"].get(number, {}).items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if is_sharded(parameter) and number in state["state"]
    }
    return {**state, "state": {**state["state"], **parts}}


def check_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise CheckpointError unless a saved state is of the same kind of optimizer, over the same groups."""
    groups, saved = optimizer.param_groups, state["param_groups"]
    # A newer torch adds settings; optimizers of different kinds each have settings that the other lacks.
    here, there = ({name for group in each for name in group} for each in (groups, saved))
    if here - there and there - here:
        ours, theirs = (", ".join(sorted(names)) for names in (here - there, there - here))
        raise CheckpointError(
            f"its optimizer is not the one that SOLVER.OPTIMIZER names: it has {theirs} and lacks {ours}; {NEW_RUN}."
        )
    sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (groups, saved))
    if sizes != saved_sizes:
        raise CheckpointError(
            f"its optimizer has groups of {saved_sizes} parameters, the configured one has groups of {sizes}: other "
            f"parameters are trainable, or other ones share a learning rate and weight decay "
            f"({RESTORED['initial_lr'][1]}; {RESTORED['weight_decay'][1]}); {NEW_RUN}."
        )


def restored_settings(optimizer: Optimizer) -> dict[str, list[float]]:
    """The settings of :data:`RESTORED` for each parameter group."""
    groups = optimizer.param_groups
    return {name: [group[name] for group in groups] for name in RESTORED if all(name in group for group in groups)}


def warn_of_kept_settings(configured: dict[str, list[float]], restored: dict[str, list[float]]) -> None:
    """Warn of settings (:func:`restored_settings`) that a resumed run keeps although the configuration sets others."""
    for name, asked in configured.items():
        if (kept := restored.get(name, asked)) != asked:
            what, keys = RESTORED[name]
            logger.warning(
                "--resume keeps the %s of the run, %s, although %s now give %s. To train with those, %s.",
                what,
                kept,
                keys,
                asked,
                NEW_RUN,
            )
