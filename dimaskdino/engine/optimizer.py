"""The optimiser of the releases: AdamW with a slower backbone and no decay on norms and embeddings."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from dimaskdino.errors import ConfigError, check_choice

logger = logging.getLogger(__name__)

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch, synchronised batch and instance norm of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
# Position tables of Swin: learned offsets, decayed by no release.
UNDECAYED_NAMES = ("relative_position_bias_table", "absolute_pos_embed")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER (ADAMW or SGD) over :func:`parameter_groups`.

    Raises:
        ConfigError: for any other name.
    """
    groups = parameter_groups(cfg, model)
    for group in groups:
        logger.info("%d parameters: lr %g, weight decay %g", len(group["params"]), group["lr"], group["weight_decay"])
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(groups, solver.BASE_LR, fused=True)
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(groups, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    raise ConfigError(f"SOLVER.OPTIMIZER {solver.OPTIMIZER!r} is unknown; use ADAMW or SGD.")


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters by their (learning rate, weight decay), each parameter once.

    Returns:
        Groups ``{"params": [...], "lr": float, "weight_decay": float}`` in the order in which the model names their
        first members, so that an optimiser state fits the same model again.
    """
    by_setting: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module_name, module, name, parameter in _trainable_parameters(model):
        setting = (_learning_rate(cfg, module_name), _weight_decay(cfg, module, name))
        by_setting.setdefault(setting, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in by_setting.items()]


def _trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (module name, module, name within it, parameter); a shared parameter belongs to its first module."""
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module_name, module, name, parameter


def _learning_rate(cfg: CfgNode, module_name: str) -> float:
    factor = cfg.SOLVER.BACKBONE_MULTIPLIER if "backbone" in module_name else 1.0
    return cfg.SOLVER.BASE_LR * factor


def _weight_decay(cfg: CfgNode, module: nn.Module, name: str) -> float:
    if isinstance(module, nn.Embedding):
        return cfg.SOLVER.WEIGHT_DECAY_EMBED
    if isinstance(module, NORMS):
        return cfg.SOLVER.WEIGHT_DECAY_NORM
    return 0.0 if name in UNDECAYED_NAMES else cfg.SOLVER.WEIGHT_DECAY


class GradientClipper:
    """Limits gradients as SOLVER.CLIP_GRADIENTS says, and measures their norm before that.

    CLIP_TYPE ``full_model`` scales all gradients by one factor so that their common norm is at most CLIP_VALUE (the
    releases' choice); ``norm`` does so for each parameter by itself; ``value`` clamps each element.
    """

    TYPES = ("full_model", "norm", "value")

    def __init__(self, *, clip_type: str, limit: float, norm_type: float = 2.0) -> None:
        check_choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type, self.TYPES)
        self.clip_type = clip_type
        self.limit = limit
        self.norm_type = norm_type

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "GradientClipper":
        """The clipper of SOLVER.CLIP_GRADIENTS; one that never clips where it is not enabled."""
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED:
            return cls(clip_type="full_model", limit=float("inf"))
        return cls(clip_type=clip.CLIP_TYPE, limit=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)

    def __call__(self, parameters: list[nn.Parameter]) -> Tensor:
        """Clip the gradients of ``parameters`` in place.

        Returns:
            The norm of all gradients together before clipping, a scalar.
        """
        limit = self.limit if self.clip_type == "full_model" else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit, self.norm_type)
        if self.clip_type == "norm":
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, self.limit, self.norm_type)
        elif self.clip_type == "value":
            nn.utils.clip_grad_value_(parameters, self.limit)
        return norm
