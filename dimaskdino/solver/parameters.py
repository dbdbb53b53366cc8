"""Which parameters train, and with which learning rate and weight decay."""

import difflib
import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers.blocks import blocks_of

logger = logging.getLogger(__name__)

ParameterGroups = list[dict[str, Any]]

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch, synchronised batch and instance norm of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
# Position tables of Swin: learned offsets that neither release decays.
UNDECAYED_NAMES = ("relative_position_bias_table", "absolute_pos_embed")


@dataclass(frozen=True)
class ParameterRule:
    """An entry of SOLVER.PARAM_GROUPS; what is None stays as it is without the entry."""

    pattern: str  # the name of a module, or names of parameters with ``*``, ``?`` and ``[...]``
    lr_factor: float | None = None  # on the learning rate, at least 0
    weight_decay: float | None = None  # at least 0
    frozen: bool | None = None  # whether the parameters keep their values

    def matches(self, name: str) -> bool:
        """Whether the rule is about the parameter of this name."""
        return name.startswith(f"{self.pattern}.") or fnmatch.fnmatchcase(name, self.pattern)


def parameter_rules(cfg: CfgNode) -> list[ParameterRule]:
    """The entries of SOLVER.PARAM_GROUPS; a ConfigError names the entry and what it may hold."""
    return [_read_rule(entry) for entry in cfg.SOLVER.PARAM_GROUPS]


def _read_rule(entry: Any) -> ParameterRule:
    known = [field.name for field in fields(ParameterRule)]
    if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str) or {*entry} - {*known}:
        raise ConfigError(f"SOLVER.PARAM_GROUPS holds {entry!r}; an entry is a mapping with pattern and {known[1:]}.")
    for name in ("lr_factor", "weight_decay"):
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise ConfigError(
                f"SOLVER.PARAM_GROUPS: {name} of {entry['pattern']!r} is {value!r}; it must be at least 0."
            )
    if not isinstance(entry.get("frozen", False), bool):
        raise ConfigError(f"SOLVER.PARAM_GROUPS: frozen of {entry['pattern']!r} must be True or False.")
    return ParameterRule(**entry)


def freeze_parameters(cfg: CfgNode, model: nn.Module) -> None:
    """Freeze what SOLVER.PARAM_GROUPS freezes, with its norms' running statistics; ConfigError if nothing is left."""
    rules = parameter_rules(cfg)
    frozen = [p for name, p in model.named_parameters() if _setting(rules, name, "frozen", default=False)]
    _check_all_match(rules, model)
    if not frozen:
        return
    for parameter in frozen:
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and {*module.parameters()} & {*frozen}:
            module.momentum = 0.0
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("SOLVER.PARAM_GROUPS freezes all parameters; nothing is left to train.")
    logger.info("%d parameters are frozen.", len(frozen))


def parameter_groups(cfg: CfgNode, model: nn.Module) -> ParameterGroups:
    """Trainable parameters grouped by learning rate and weight decay; a shared one belongs to its first module.

    The groups ``{"params": [...], "lr": float, "weight_decay": float}`` are in the order in which the model names their
    first members, so that a saved optimizer state fits the same model again. Raises ConfigError if a pattern of
    SOLVER.PARAM_GROUPS matches no parameter, or SOLVER.LAYER_DECAY finds no layers.
    """
    rules = parameter_rules(cfg)
    _check_all_match(rules, model)
    depth = _layer_factors(cfg, model)
    by_setting: dict[tuple[float, float], list[nn.Parameter]] = {}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module_name, _, name = full_name.rpartition(".")
        rate = cfg.SOLVER.BASE_LR * (cfg.SOLVER.BACKBONE_MULTIPLIER if "backbone" in module_name else 1.0)
        factor = depth.get(parameter, 1.0) * _setting(rules, full_name, "lr_factor", default=1.0)
        decay = _weight_decay(cfg, model.get_submodule(module_name), name)
        decay = _setting(rules, full_name, "weight_decay", default=decay)
        by_setting.setdefault((rate * factor, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in by_setting.items()]


def _setting(rules: Sequence[ParameterRule], name: str, setting: str, *, default: Any) -> Any:
    values = [getattr(rule, setting) for rule in rules if rule.matches(name)]
    return next((value for value in reversed(values) if value is not None), default)


def _check_all_match(rules: Sequence[ParameterRule], model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            modules = {name.rpartition(".")[0] for name in names}
            close = difflib.get_close_matches(rule.pattern, [*names, *sorted(modules)], n=3, cutoff=0.0)
            raise ConfigError(
                f"SOLVER.PARAM_GROUPS: no parameter is named {rule.pattern!r}; the closest names are "
                f"{', '.join(close)}."
            )


def _layer_factors(cfg: CfgNode, model: nn.Module) -> dict[nn.Parameter, float]:
    """SOLVER.LAYER_DECAY to the power of how many blocks of the backbone follow each of its parameters, plus one.

    What precedes the first block counts as one more block, and what is between two belongs to the former; after the
    last block, the factor is 1.
    """
    decay = cfg.SOLVER.LAYER_DECAY
    if decay == 1.0:
        return {}
    backbone = getattr(model, "backbone", nn.Module())
    backbone = getattr(backbone, "bottom_up", backbone)  # of a feature pyramid
    blocks = blocks_of(backbone)
    if not blocks:
        raise ConfigError(f"SOLVER.LAYER_DECAY is {decay}, but this backbone repeats no blocks; set it to 1.")
    number = {parameter: index for index, block in enumerate(blocks, 1) for parameter in block.parameters()}
    factors, latest = {}, 0
    for parameter in backbone.parameters():
        own = number.get(parameter)
        latest = own or latest
        follow = len(blocks) - latest if own or latest < len(blocks) else -1
        factors[parameter] = decay ** (follow + 1)
    return factors


def _weight_decay(cfg: CfgNode, module: nn.Module, name: str) -> float:
    if isinstance(module, nn.Embedding):
        return cfg.SOLVER.WEIGHT_DECAY_EMBED
    if isinstance(module, NORMS):
        return cfg.SOLVER.WEIGHT_DECAY_NORM
    return 0.0 if name in UNDECAYED_NAMES else cfg.SOLVER.WEIGHT_DECAY
