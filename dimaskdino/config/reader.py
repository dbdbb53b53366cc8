"""The configuration: detectron2's, with every key of this package and of the user, and errors in one line."""

import difflib
import functools
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import detectron2
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from dimaskdino.compat import NEWER_KEYS
from dimaskdino.config.keys import KEYS, MAY_BE_NO, add_dimaskdino_config, add_keys
from dimaskdino.config.yaml_files import IGNORED_KEYS, read_yaml
from dimaskdino.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

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
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)


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


class UnknownKeyError(ConfigError):
    """A key that the configuration does not have."""


class Config(CfgNode):
    """detectron2's CfgNode, limited to safe YAML, with one-line errors.

    Keys in :data:`IGNORED_KEYS` are accepted, dropped, and reported once. So are the keys of a newer detectron2
    (:data:`dimaskdino.compat.NEWER_KEYS`), at the values that the installed one follows anyway.

    Raises:
        ConfigError: an unknown key (the message names the closest known one), a value of the wrong type, or YAML that
            cannot be read.
    """

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file on top of the files that its ``_BASE_`` names; YAML that runs code is an error."""
        if allow_unsafe:
            raise ConfigError(f"{cfg_filename}: unsafe YAML is not supported; write the value as plain YAML.")
        loaded = read_yaml(str(cfg_filename))
        loaded.pop("VERSION", None)
        imports = loaded.get("IMPORTS")
        try:
            self.merge_from_other_cfg(type(self)(loaded))
        except UnknownKeyError as error:
            raise ConfigError(f"{cfg_filename}: {error}{_missing_imports(imports)}") from error
        except (ConfigError, AssertionError) as error:
            # yacs asserts that a value has one of its own types; a YAML date has none of them.
            raise ConfigError(f"{cfg_filename}: {_one_line(error)}") from error

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        """Merge another tree of keys."""
        self._merge_pairs(dict(flatten(cfg_other)))

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merge ``[KEY, VALUE, KEY, VALUE, ...]``, as on the command line."""
        flags = [option for option in cfg_list if str(option).startswith("--")]
        if flags:
            raise ConfigError(f"{flags[0]} follows KEY VALUE pairs; put flags before them.")
        if len(cfg_list) % 2:
            raise ConfigError(f"Options are KEY VALUE pairs, but {cfg_list[-1]!r} has no value.")
        self._merge_pairs(dict(zip(cfg_list[::2], cfg_list[1::2], strict=True)))

    def _merge_pairs(self, pairs: dict[str, Any]) -> None:
        known = dict(flatten(self))
        ignored = sorted(key for key in pairs if key in IGNORED_KEYS and key not in known)
        newer = sorted(key for key in pairs if key in NEWER_KEYS and key not in known)
        for key in newer:
            if (value := self._decode_cfg_value(pairs[key])) != NEWER_KEYS[key]:
                raise ConfigError(
                    f"Cannot set {key} to {value!r}: detectron2 {detectron2.__version__} lacks this key and behaves as "
                    f"with {NEWER_KEYS[key]!r}. Remove the key, or install a newer detectron2."
                )
        _report_ignored(tuple(ignored), "nothing reads them, nor did the releases")
        _report_ignored(tuple(newer), "the installed detectron2 lacks them but behaves as they ask")
        for key, value in pairs.items():
            if key in ignored or key in newer:
                continue
            if key not in known:
                raise UnknownKeyError(_unknown_key_message(key, list(known)))
            try:
                super().merge_from_list([key, self._as_meant(key, value, known[key])])
            except (ValueError, AssertionError, KeyError, RecursionError, MemoryError) as error:
                raise ConfigError(f"Cannot set {key} to {value!r}: {_one_line(error)}") from error

    def _as_meant(self, key: str, value: Any, default: Any) -> Any:
        """The value, but a whole number as a float where the key is one, and YAML's False of an unquoted no as "no"."""
        decoded = self._decode_cfg_value(value)
        if isinstance(default, float) and type(decoded) is int:
            return float(decoded)
        return "no" if key in MAY_BE_NO and decoded is False else value


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of nested nodes; an empty node counts as a leaf."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def _missing_imports(names: Any) -> str:
    """What a file says of the modules that its keys may be from; "" if all are imported."""
    missing = [str(name) for name in names if str(name) not in sys.modules] if isinstance(names, list) else []
    flags = " ".join(f"--import {name}" for name in missing)
    return f" The run that wrote this file had {flags}; give that again, or import the module." if missing else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unknown_key_message(key: str, known: list[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    closest = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[closest[0]]}?" if closest else " dimaskdino/config/keys.py lists all keys."
    return f"Unknown configuration key {key}.{hint}"


@functools.cache
def _report_ignored(keys: tuple[str, ...], reason: str) -> None:
    if keys:
        logger.info("Ignored keys (%s): %s", reason, ", ".join(keys))


def read_config(path: str | Path) -> Config:
    """The configuration of a YAML file, unfrozen; raises ConfigError as merging it does."""
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def config_of_run(folder: Path) -> Config:
    """The configuration of a run, unfrozen; raises UserError for a folder without one."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml.")
    return read_config(path)


def config_of_dump(text: str) -> Config:
    """The configuration that a dump holds, unfrozen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(text, encoding="utf-8")
        return read_config(path)


def get_cfg() -> Config:
    """Return a new, unfrozen configuration: detectron2's defaults, every key of dimaskdino, and registered ones."""
    cfg = Config(get_detectron2_cfg())
    add_dimaskdino_config(cfg)
    add_keys(cfg, own_keys())
    return cfg
