"""SOLVER.PARAM_GROUPS and SOLVER.LAYER_DECAY: which parameters they change, by how much."""

from typing import Any

import pytest
import torch
from torch import nn

from dimaskdino.errors import ConfigError
from dimaskdino.solver import check_solver, freeze_parameters, parameter_groups
from tests.solver.test_optimizer import Parts, cfg_with, settings_by_name


class Block(nn.Module):
    """A block of a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)


class Staged(nn.Module):
    """A backbone of two stages with two blocks and one, with something before, between and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(2))
        self.stage1 = nn.Sequential(Block(), Block())
        self.down = nn.Linear(2, 2, bias=False)
        self.stage2 = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(2, bias=False)


class Model(nn.Module):
    """That backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Staged()
        self.head = nn.Linear(2, 2, bias=False)


def settings(model: nn.Module, *pairs: Any) -> dict[str, tuple[float, float]]:
    return settings_by_name(model, parameter_groups(cfg_with(*pairs), model))


def rules(*entries: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    return "SOLVER.PARAM_GROUPS", list(entries)


def test_rules_change_what_they_match_and_nothing_else() -> None:
    model = Parts()
    plain = settings(model)
    changed = settings(
        model,
        *rules(
            {"pattern": "backbone", "lr_factor": 0.5},
            {"pattern": "*.bias", "weight_decay": 0.0},
            {"pattern": "backbone.0.*", "lr_factor": 3.0},
        ),
    )
    assert changed["backbone.0.weight"] == pytest.approx((3e-5, 0.05))
    assert changed["backbone.0.bias"] == pytest.approx((3e-5, 0.0))
    assert changed["backbone.1.weight"] == pytest.approx((5e-6, 0.0))
    assert changed["head.bias"] == pytest.approx((1e-4, 0.0))
    same = {name for name in plain if not name.startswith("backbone") and not name.endswith("bias")}
    assert {name: changed[name] for name in same} == {name: plain[name] for name in same}


def test_layer_decay_by_hand() -> None:
    found = settings(Model(), "SOLVER.LAYER_DECAY", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 1.0)
    assert {name: lr / 1e-4 for name, (lr, _) in found.items()} == pytest.approx(
        {
            "backbone.position": 0.5**5,
            "backbone.stage1.0.linear.weight": 0.5**4,
            "backbone.stage1.1.linear.weight": 0.5**3,
            "backbone.down.weight": 0.5**3,
            "backbone.stage2.0.linear.weight": 0.5**2,
            "backbone.stage2.1.linear.weight": 0.5,
            "backbone.norm.weight": 1.0,
            "head.weight": 1.0,
        }
    )


def test_layer_decay_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.LAYER_DECAY is 0\.5"):
        settings(Parts(), "SOLVER.LAYER_DECAY", 0.5)


def test_pattern_without_a_match_names_the_closest() -> None:
    model = Parts()
    cfg = cfg_with(*rules({"pattern": "bakbone", "frozen": True}))
    for check in (parameter_groups, freeze_parameters):
        with pytest.raises(ConfigError, match=r"SOLVER\.PARAM_GROUPS.*'bakbone'.* backbone\."):
            check(cfg, model)


@pytest.mark.parametrize(
    "entry",
    [
        {"lr_factor": 1.0},
        {"pattern": "head", "lr": 0.1},
        {"pattern": "head", "lr_factor": -1.0},
        {"pattern": "head", "weight_decay": "none"},
        {"pattern": "head", "frozen": "yes"},
        "head",
    ],
)
def test_bad_entry_is_refused(entry: Any) -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.PARAM_GROUPS"):
        check_solver(cfg_with("SOLVER.PARAM_GROUPS", [entry]), 1)


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.PARAM_GROUPS freezes all"):
        freeze_parameters(cfg_with(*rules({"pattern": "*", "frozen": True})), Parts())


def test_frozen_norm_keeps_its_statistics() -> None:
    model = Parts()
    freeze_parameters(cfg_with(*rules({"pattern": "backbone.1", "frozen": True})), model)
    model.backbone(torch.randn(2, 3, 4, 4))
    assert not model.backbone[1].running_mean.any()
    assert (model.backbone[1].running_var == 1).all()
