"""What users rely on: keys, registered names, command lines, README's imports, and checkpoint keys.

``python -m tests.contract`` adds what is new to tests/data/contract.json. What the file holds never changes.
"""

import argparse
import gc
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model
from fvcore.common.registry import Registry
from torch import nn

import dimaskdino.engine  # noqa: F401  (imports every part and its registry)
from dimaskdino.config import get_cfg
from dimaskdino.data import datasets
from tests.tiny_model import ONE_STAGE, tiny_model

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "data" / "contract.json"
COMMANDS = ("train_net.py", *(f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py"))))
# Options below MODEL.MaskDINO of the tiny models whose keys and shapes are recorded.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "dimaskdino": {},
    "maskdino": {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"},
    "one_stage": ONE_STAGE,
    "triple_selection": {"DI__NUM_SELECTED": [12, 10, 8], "LEARN_TGT": True},
}
# Configurations at full size whose keys are recorded without their shapes.
FULL_MODELS = ("coco/dimaskdino_r50_12ep", "coco/maskdino_r50_50ep", "dino/dino_r50_4scale_12ep")


def keys() -> dict[str, Any]:
    """Every configuration key with its default as YAML holds it."""
    return _flat(yaml.safe_load(get_cfg().dump()))


def _own_keys() -> dict[str, Any]:
    """Without detectron2's, which differ from version to version."""
    theirs = _flat(yaml.safe_load(get_detectron2_cfg().dump()))
    return {key: value for key, value in keys().items() if key not in theirs}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return leaves


def registered_names() -> dict[str, list[str]]:
    """The names that this package registers, by registry, wherever the registry lives."""
    found: dict[str, set[str]] = {}
    for registry in (thing for thing in gc.get_objects() if type(thing) is Registry):
        ours = {name for name, part in registry if part.__module__.startswith("dimaskdino.")}
        if ours:
            found.setdefault(registry._name, set()).update(ours)
    return {name: sorted(found[name]) for name in sorted(found)}


class _ParserError(Exception):
    """Carries a command's parser out of it."""


def command_lines() -> dict[str, dict[str, Any]]:
    """The arguments of every command: by name, the default and the choices."""
    environment = {name: value for name, value in os.environ.items() if name != "DETECTRON2_DATASETS"}
    # Neither the environment nor another test decides where datasets lie.
    with mock.patch.dict(os.environ, environment, clear=True), mock.patch.object(datasets, "_given_root", None):
        return {command: _arguments(command) for command in COMMANDS}


def _arguments(command: str) -> dict[str, Any]:
    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _ParserError(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]),
        mock.patch.object(sys, "argv", [command, "--some-argument"]),
    ):
        try:
            runpy.run_path(str(ROOT / command), run_name="__main__")
        except _ParserError as parsed:
            (parser,) = parsed.args
            return {
                name: {"default": _plain(_default(action)), "choices": _plain(action.choices)}
                for action in parser._actions
                for name in action.option_strings or [action.dest]
                if action.dest != "help"
            }
    return {}


def _default(action: argparse.Action) -> Any:
    return None if action.default == argparse.SUPPRESS else action.default


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it."""
    if isinstance(value, list | tuple | dict):
        return [_plain(each) for each in value]
    plain = value is None or isinstance(value, bool | int | float)
    return value if plain else str(value).removeprefix(f"{ROOT}{os.sep}")


def imports() -> list[str]:
    """The import statements of this package that README.md shows."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return sorted({line for block in blocks for line in re.findall(r"^from dimaskdino\S* import .+$", block, re.M)})


def checkpoint_model(name: str) -> nn.Module:
    """One of TINY_MODELS with random weights, or one of FULL_MODELS without any."""
    if name in TINY_MODELS:
        return tiny_model(**TINY_MODELS[name])
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return build_model(cfg)


def checkpoint_keys() -> dict[str, Any]:
    """The state keys of every model as a tree; the leaves are shapes, or null for a model of full size."""
    trees = {}
    for name in (*TINY_MODELS, *FULL_MODELS):
        trees[name] = tree = {}
        for key, value in checkpoint_model(name).state_dict().items():
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = list(value.shape) if name in TINY_MODELS else None
    return trees


def recorded() -> dict[str, Any]:
    """What the file holds."""
    return json.loads(FILE.read_text())


def recorded_state(name: str) -> dict[str, list[int] | None]:
    """The recorded state keys of a model, with their shapes where these are recorded."""
    return _flat(recorded()["checkpoints"][name])


def main() -> None:
    """Add to the file what it lacks, one line for each key, registry, command and model."""
    earlier = recorded()
    names, commands = registered_names(), command_lines()
    content = {
        "keys": _own_keys() | earlier["keys"],
        "registered": {name: sorted({*names[name], *earlier["registered"].get(name, [])}) for name in names},
        "commands": {name: commands[name] | earlier["commands"].get(name, {}) for name in commands},
        "imports": sorted({*imports(), *earlier["imports"]}),
        "checkpoints": checkpoint_keys() | earlier["checkpoints"],
    }
    FILE.write_text(_lines(content, depth=2) + "\n")


def _lines(value: Any, depth: int, indent: str = "") -> str:
    if not (depth and isinstance(value, dict)):
        return json.dumps(value, separators=(",", ":"))
    inner = indent + " "
    entries = [f"{inner}{json.dumps(name)}: {_lines(each, depth - 1, inner)}" for name, each in value.items()]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


if __name__ == "__main__":
    main()
