"""What two processes shard (SOLVER.SHARDING) changes neither what a run computes nor what it saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dimaskdino.config import Config
from dimaskdino.engine import GradientClipper
from dimaskdino.engine.devices import check_sharding, distribute
from dimaskdino.errors import ConfigError
from tests.engine.sharded import CLIPPERS, GRADIENTS, KINDS

Results = Callable[[str], list[Any]]
# The norm of all gradients is a sum in another order: clipping scales all of them by a factor that is off by rounding.
ROUNDING = {"rtol": 1e-4, "atol": 1e-7}


@pytest.fixture
def saved(of_two_processes: Results, job_folder: Path) -> Callable[[str], dict[str, Any]]:
    """Reads the final checkpoint of one of the trainings."""
    of_two_processes("shard")
    return lambda name: torch.load(job_folder / name / "model_final.pth")


def state_of(content: dict[str, Any]) -> dict[str, Any]:
    """Weights, their average, and the optimizer's state with its settings."""
    return {name: content[name] for name in ("model", "model_ema")} | content["trainer"]["step"]["optimizer"]


def test_sharding_trains_and_saves_as_without(saved: Callable[[str], dict[str, Any]]) -> None:
    plain, optimizer, full = (saved(f"shared_{kind}") for kind in KINDS)
    torch.testing.assert_close(state_of(optimizer), state_of(plain), rtol=0, atol=0)
    torch.testing.assert_close(state_of(full), state_of(plain), **ROUNDING)
    assert plain.keys() == optimizer.keys() == full.keys()
    assert list(plain["model"]) == list(optimizer["model"]) == list(full["model"])


def test_parts_of_a_batch_in_bfloat16_add_up(saved: Callable[[str], dict[str, Any]]) -> None:
    torch.testing.assert_close(state_of(saved("parts_full")), state_of(saved("parts_")), **ROUNDING)


def test_run_goes_on_with_another_sharding(saved: Callable[[str], dict[str, Any]]) -> None:
    plain = state_of(saved("longer"))
    torch.testing.assert_close(state_of(saved("resumed_optimizer")), plain, rtol=0, atol=0)
    torch.testing.assert_close(state_of(saved("resumed_full")), plain, **ROUNDING)


def test_each_process_has_half_of_the_moments(of_two_processes: Results) -> None:
    found = of_two_processes("shard")
    whole = found[0][""]["moments"]
    for kind in ("optimizer", "full"):
        shares = [each[kind]["moments"] for each in found]
        assert sum(shares) == whole
        assert max(shares) < 0.6 * whole


def test_processes_evaluate_other_numbers_of_images(of_two_processes: Results) -> None:
    results = of_two_processes("shard")[0]["full"]["results"]
    assert {"bbox", "segm", "ema"} <= set(results)


def test_one_process_can_use_the_whole_weights_alone(of_two_processes: Results) -> None:
    found, expected = of_two_processes("shard")[0]["full"]["scores"]
    assert len(found) == 6
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_in_parts_are_clipped_as_whole_ones(of_two_processes: Results) -> None:
    for found in of_two_processes("clip_sharded"):
        given = iter(found)
        for kind, limit in CLIPPERS:
            for norm_type in (2.0, torch.inf):
                parameters = [nn.Parameter(torch.tensor(each)) for each in GRADIENTS]
                for parameter in parameters:
                    parameter.grad = parameter.detach().clone()
                norm = GradientClipper(clip_type=kind, limit=limit, norm_type=norm_type)(parameters)
                torch.testing.assert_close(next(given), (norm, [parameter.grad for parameter in parameters]))


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.COMPILE", ["encoder"]), ("MODEL.CHANNELS_LAST", True), ("SOLVER.NONFINITE", "skip")]
)
def test_keys_that_do_not_go_together_are_refused(key: str, value: object, toy_cfg: Config) -> None:
    toy_cfg.merge_from_list(["SOLVER.SHARDING", "full", key, value])
    with pytest.raises(ConfigError, match=rf"SOLVER\.SHARDING full does not go with {key}"):
        check_sharding(toy_cfg)
    toy_cfg.SOLVER.SHARDING = "optimizer"
    check_sharding(toy_cfg)


def test_loss_scaling_and_unknown_values_are_refused(toy_cfg: Config) -> None:
    toy_cfg.merge_from_list(["SOLVER.SHARDING", "full", "SOLVER.AMP.ENABLED", True])
    with pytest.raises(ConfigError, match="AMP.DTYPE to bfloat16"):
        check_sharding(toy_cfg)
    toy_cfg.SOLVER.SHARDING = "zero"
    with pytest.raises(ConfigError, match=r"SOLVER\.SHARDING"):
        check_sharding(toy_cfg)


def test_one_process_shares_nothing_out(toy_cfg: Config) -> None:
    toy_cfg.SOLVER.SHARDING = "full"
    model = nn.Linear(1, 1)
    assert distribute(toy_cfg, model) is model
