"""Optimiser groups and gradient clipping, on modules made by hand."""

import math

import pytest
import torch
from torch import nn

from dimaskdino.config import get_cfg
from dimaskdino.engine import GradientClipper, build_optimizer
from dimaskdino.engine.optimizer import parameter_groups
from dimaskdino.errors import ConfigError


class Parts(nn.Module):
    """One of everything that the groups tell apart; ``tied`` shares its weight with ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.instance_norm = nn.InstanceNorm2d(4, affine=True)
        self.labels = nn.Embedding(5, 4)
        self.level_embed = nn.Parameter(torch.zeros(3, 4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def cfg_with(*pairs: object):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e-4, "SOLVER.WEIGHT_DECAY", 0.05, *pairs])
    return cfg


def settings_by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_groups_slow_the_backbone_and_spare_norms_embeddings_and_position_tables_from_decay() -> None:
    model = Parts()
    assert settings_by_name(model, parameter_groups(cfg_with(), model)) == {
        "backbone.0.weight": (1e-5, 0.05),
        "backbone.0.bias": (1e-5, 0.05),
        "backbone.1.weight": (1e-5, 0.0),
        "backbone.1.bias": (1e-5, 0.0),
        "backbone.2.weight": (1e-5, 0.0),
        "backbone.2.bias": (1e-5, 0.0),
        "relative_position_bias_table": (1e-4, 0.0),
        "head.weight": (1e-4, 0.05),
        "head.bias": (1e-4, 0.05),
        "norm.weight": (1e-4, 0.0),
        "norm.bias": (1e-4, 0.0),
        "instance_norm.weight": (1e-4, 0.0),
        "instance_norm.bias": (1e-4, 0.0),
        "labels.weight": (1e-4, 0.0),
        "level_embed": (1e-4, 0.05),
        "tied.bias": (1e-4, 0.05),
    }


def test_equal_settings_share_a_group_and_every_parameter_is_in_one_group_once() -> None:
    model = Parts()
    groups = parameter_groups(cfg_with(), model)
    assert len(groups) == 4
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len([p for p in model.parameters() if p.requires_grad])


def test_decay_of_norms_and_embeddings_follows_its_own_keys() -> None:
    model = Parts()
    decays = ("SOLVER.WEIGHT_DECAY_NORM", 0.01, "SOLVER.WEIGHT_DECAY_EMBED", 0.02)
    cfg = cfg_with(*decays, "SOLVER.BACKBONE_MULTIPLIER", 0.5)
    settings = settings_by_name(model, parameter_groups(cfg, model))
    assert settings["norm.weight"] == (1e-4, 0.01)
    assert settings["labels.weight"] == (1e-4, 0.02)
    assert settings["backbone.1.bias"] == (5e-5, 0.01)


def test_the_optimizer_is_the_one_that_is_named() -> None:
    model = Parts()
    assert type(build_optimizer(cfg_with(), model)) is torch.optim.AdamW
    sgd = build_optimizer(cfg_with("SOLVER.OPTIMIZER", "SGD"), model)
    assert type(sgd) is torch.optim.SGD
    assert sgd.defaults["momentum"] == 0.9
    with pytest.raises(ConfigError, match="ADAM' is unknown; use ADAMW or SGD"):
        build_optimizer(cfg_with("SOLVER.OPTIMIZER", "ADAM"), model)


def with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        parameters.append(parameter)
    return parameters


def test_full_model_clipping_scales_all_gradients_by_one_factor() -> None:
    # Norms 3 and 4, together 5: the limit 1 divides everything by 5.
    parameters = with_gradients([3.0, 0.0], [0.0, 4.0])
    norm = GradientClipper(clip_type="full_model", limit=1.0)(parameters)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]), atol=1e-6, rtol=1e-5)


def test_norm_clipping_treats_each_parameter_alone_and_value_clipping_each_element() -> None:
    parameters = with_gradients([3.0, 4.0], [0.5, 0.0])
    assert GradientClipper(clip_type="norm", limit=1.0)(parameters).item() == pytest.approx(math.sqrt(25.25))
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.8]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.5, 0.0]))
    parameters = with_gradients([3.0, -4.0], [0.5, 0.0])
    GradientClipper(clip_type="value", limit=1.0)(parameters)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.5, 0.0]))


def test_gradients_stay_as_they_are_where_clipping_is_off_or_not_needed() -> None:
    for clipper in (GradientClipper.from_config(cfg_with()), GradientClipper(clip_type="full_model", limit=6.0)):
        parameters = with_gradients([3.0, 4.0])
        assert clipper(parameters).item() == pytest.approx(5.0)
        torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, 4.0]))


def test_an_unknown_clip_type_is_named() -> None:
    cfg = cfg_with("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global")
    with pytest.raises(ConfigError, match="CLIP_TYPE is 'global'; it must be one of full_model"):
        GradientClipper.from_config(cfg)
