"""Configuration keys of a user's own, which a module given with --import adds."""

import sys
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from dimaskdino.config.keys import KEYS, add_keys
from dimaskdino.errors import ConfigError

# Key -> (its default, the module that registered it).
_REGISTERED: dict[str, tuple[Any, str]] = {}


def register_keys(keys: Mapping[str, Any]) -> None:
    """Add keys to every configuration that is made from now on; call it at the top of a module of yours.

    The keys stand in config.yaml like any other. A run that reads that file needs the same ``--import``.

    >>> register_keys({"MODEL.DEPTH_HEAD.CHANNELS": 64})

    Args:
        keys: full dotted name -> default. Missing nodes are made. A value given later has the type of its default.

    Raises:
        ConfigError: a key exists already, has the name of a node, lies below another key, has a part that is no name,
            or a default that YAML does not hold; the message names the module and the key.
    """
    module = sys._getframe(1).f_globals.get("__name__", "?")
    for key, default in keys.items():
        if any(part.split() != [part] for part in key.split(".")):  # empty, or with a space
            raise ConfigError(f"{module}: the configuration key {key!r} is not names with dots between them.")
        if isinstance(default, dict) or not _is_plain(default):
            raise ConfigError(f"{module}: the default of {key} is {default!r:.60}; give text, a number, or a list.")
        owner = _owner(key)
        if owner and owner != module:  # a module that is reloaded registers its keys once more
            raise ConfigError(f"{module} adds the configuration key {key}, which {owner} has; give it another name.")
    trial = get_detectron2_cfg()
    try:
        add_keys(trial, KEYS)
        add_keys(trial, own_keys() | dict(keys))
    except ConfigError as error:
        raise ConfigError(f"{module}: {error}") from error
    _REGISTERED.update({key: (default, module) for key, default in keys.items()})


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return (
        all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, str | int | float | None)
    )


def own_keys() -> dict[str, Any]:
    """The registered keys and their defaults."""
    return {key: default for key, (default, _) in _REGISTERED.items()}


def _owner(key: str) -> str:
    """Whose key this is already; "" for nobody's."""
    if key in _REGISTERED:
        return _REGISTERED[key][1]
    if key in KEYS:
        return "dimaskdino"
    node: Any = get_detectron2_cfg()
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return ""
        node = node[part]
    return "" if isinstance(node, CfgNode) else "detectron2"
