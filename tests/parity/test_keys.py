"""Our models have exactly the releases' parameters, and the releases' files load with nothing left over."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

import dimaskdino.modeling.meta_arch  # noqa: F401  (registers the model)
from dimaskdino.checkpoint import Checkpointer, from_release, is_release, to_release
from tests.parity.releases import NAMES, release

TINY = tuple(name for name in NAMES if name.endswith("_tiny"))


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_exactly_the_releases_parameters_and_buffers(name: str) -> None:
    expected = {key: torch.empty(shape) for key, shape in release(name).keys.items() if key not in release(name).alias}
    assert shapes(build_model(release(name).cfg()).state_dict()) == shapes(from_release(expected))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_release_maps_there_and_back(name: str) -> None:
    recorded = release(name)
    state = {
        key: torch.zeros(shape, device="meta") for key, shape in recorded.keys.items() if key not in recorded.alias
    }
    ours = from_release(state)
    assert not is_release(ours)
    assert from_release(ours).keys() == ours.keys()
    assert {key: list(value.shape) for key, value in to_release(ours).items()} == recorded.keys


@pytest.mark.parametrize("name", TINY)
def test_aliases_of_a_release_stay_one_tensor(name: str) -> None:
    recorded = release(name)
    back = to_release(from_release(recorded.state_dict()))
    for key, principal in recorded.alias.items():
        assert back[key] is back[principal]
    for key, value in recorded.state_dict().items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", TINY)
def test_releases_file_fills_all_of_the_matching_model(name: str, tmp_path: Path) -> None:
    recorded = release(name)
    torch.save({"model": recorded.state_dict(), "iteration": 7}, tmp_path / "release.pth")
    model = build_model(recorded.cfg())
    rest = Checkpointer(model).load(str(tmp_path / "release.pth"))
    assert rest["iteration"] == 7
    expected = from_release(recorded.state_dict())
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
