"""Nothing that users rely on is renamed, removed, or given another default; additions are fine.

tests/data/contract.json holds the list; ``python -m tests.contract`` adds to it what is new. Its keys are compared in
tests/config.
"""

import importlib
from pathlib import Path

import pytest
import torch

from dimaskdino.checkpoint import Checkpointer, from_release
from tests import contract

RECORDED = contract.recorded()


def test_registered_names_stay() -> None:
    current = contract.registered_names()
    for registry, names in RECORDED["registered"].items():
        assert set(names) <= set(current[registry]), registry


def test_commands_keep_arguments_and_defaults() -> None:
    current = contract.command_lines()
    for command, arguments in RECORDED["commands"].items():
        for name, recorded in arguments.items():
            assert name in current[command], f"{command} {name}"
            assert current[command][name]["default"] == recorded["default"], f"{command} {name}"
            choices = current[command][name]["choices"]
            assert choices is None or set(recorded["choices"] or []) <= set(choices), f"{command} {name}"


@pytest.mark.parametrize("statement", RECORDED["imports"])
def test_imports_of_the_readme_stay(statement: str) -> None:
    _, module, _, name = statement.split()
    assert hasattr(importlib.import_module(module), name)


def test_the_readme_shows_no_import_that_is_not_recorded() -> None:
    assert set(contract.imports()) <= set(RECORDED["imports"])


@pytest.mark.parametrize("name", contract.TINY_MODELS)
def test_recorded_checkpoints_load_completely(name: str, tmp_path: Path) -> None:
    # Each tensor holds a number of its own, so that a renamed key is found by what it holds.
    shapes = contract.recorded_state(name)
    state = {key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(shapes.items(), start=1)}
    torch.save({"model": state}, tmp_path / "recorded.pth")
    model = contract.checkpoint_model(name)
    Checkpointer(model).load(str(tmp_path / "recorded.pth"))
    loaded = sorted(float(value.flatten()[0]) for value in model.state_dict().values())
    assert loaded == list(range(1, len(shapes) + 1))


@pytest.mark.parametrize("name", contract.FULL_MODELS)
def test_full_models_have_a_place_for_every_recorded_key(name: str) -> None:
    recorded = from_release(dict.fromkeys(contract.recorded_state(name), torch.zeros(1)))
    assert recorded.keys() == contract.checkpoint_model(name).state_dict().keys()
