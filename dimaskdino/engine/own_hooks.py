"""Hooks of a user's own, by the names in SOLVER.HOOKS."""

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from fvcore.common.registry import Registry

from dimaskdino.errors import ConfigError, check_choice

HOOK_REGISTRY = Registry("HOOK")
HOOK_REGISTRY.__doc__ = """
Builders of hooks by the names in SOLVER.HOOKS. Each is called as ``builder(cfg)`` in every process and returns one of
detectron2's ``HookBase``. They run after evaluation and before the records are written, so what they put into
``self.trainer.storage`` is in metrics.json. A hook with ``state_dict`` and ``load_state_dict`` is resumed as well.
"""


def check_hooks(cfg: CfgNode) -> None:
    """Raise ConfigError if SOLVER.HOOKS names what is not registered."""
    for name in cfg.SOLVER.HOOKS:
        check_choice("An entry of SOLVER.HOOKS", name, [known for known, _ in HOOK_REGISTRY])


def build_own_hooks(cfg: CfgNode) -> list[HookBase]:
    """The hooks that SOLVER.HOOKS names.

    Raises:
        ConfigError: a name is not registered, or what is registered makes no hook.
    """
    check_hooks(cfg)
    hooks = [HOOK_REGISTRY.get(name)(cfg) for name in cfg.SOLVER.HOOKS]
    for name, hook in zip(cfg.SOLVER.HOOKS, hooks, strict=True):
        if not isinstance(hook, HookBase):
            raise ConfigError(
                f"SOLVER.HOOKS {name} ({HOOK_REGISTRY.get(name).__module__}) gives a {type(hook).__name__}, not one of "
                "detectron2's HookBase."
            )
    return hooks
