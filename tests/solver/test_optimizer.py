"""Parameter groups, gradient clipping, and saved optimizer states, on small modules."""

import logging
import math

import pytest
import torch
from torch import nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.errors import CheckpointError, ConfigError
from dimaskdino.solver import GradientClipper, build_optimizer, check_solver, parameter_groups
from dimaskdino.solver.optimizer import (
    check_optimizer_state,
    reorder_state,
    restored_settings,
    warn_of_kept_settings,
)


class Parts(nn.Module):
    """One of everything that the groups distinguish; ``tied`` shares its weight with ``head``."""

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


def cfg_with(*pairs: object) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e-4, "SOLVER.WEIGHT_DECAY", 0.05, *pairs])
    return cfg


def settings_by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_groups_follow_backbone_norms_embeddings_and_position_tables() -> None:
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


def test_each_trainable_parameter_is_in_one_group() -> None:
    model = Parts()
    groups = parameter_groups(cfg_with(), model)
    assert len(groups) == 4
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len([p for p in model.parameters() if p.requires_grad])


def test_norms_and_embeddings_have_decay_keys() -> None:
    model = Parts()
    decays = ("SOLVER.WEIGHT_DECAY_NORM", 0.01, "SOLVER.WEIGHT_DECAY_EMBED", 0.02)
    cfg = cfg_with(*decays, "SOLVER.BACKBONE_MULTIPLIER", 0.5)
    settings = settings_by_name(model, parameter_groups(cfg, model))
    assert settings["norm.weight"] == (1e-4, 0.01)
    assert settings["labels.weight"] == (1e-4, 0.02)
    assert settings["backbone.1.bias"] == (5e-5, 0.01)


def test_optimizer_is_the_named_one() -> None:
    model = Parts()
    assert type(build_optimizer(cfg_with(), model)) is torch.optim.AdamW
    sgd = build_optimizer(cfg_with("SOLVER.OPTIMIZER", "SGD"), model)
    assert type(sgd) is torch.optim.SGD
    assert sgd.defaults["momentum"] == 0.9


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("OPTIMIZER", "ADAM", "ADAMW, SGD"),
        ("LR_SCHEDULER_NAME", "WarmupMultistepLR", "WarmupMultiStepLR, WarmupCosineLR"),
        ("WARMUP_METHOD", "linaer", "linear, constant"),
        ("BASE_LR", -1e-4, "at least 0"),
        ("BASE_LR", math.nan, "at least 0"),
        ("WEIGHT_DECAY", -0.1, "at least 0"),
        ("MAX_ITER", 0, "at least 1"),
        ("IMS_PER_BATCH", 0, "at least 1"),
        ("CHECKPOINT_PERIOD", -1, "at least 0"),
        ("REFERENCE_WORLD_SIZE", -2, "at least 0"),
        *(("STEPS", steps, "increasing") for steps in [("60",), (60.5,), (100, 60), (60, 60), (0,), (True,)]),
    ],
)
def test_bad_value_is_refused_with_key_and_choices(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_solver(cfg_with(f"SOLVER.{key}", value), 1)
    for part in (f"SOLVER.{key} is", str(value), expected):
        assert part in str(error.value)


@pytest.mark.parametrize("steps", [(), (1,), (60, 100)])
def test_increasing_steps_are_accepted(steps: tuple[int, ...]) -> None:
    check_solver(cfg_with("SOLVER.STEPS", steps), 1)


def test_processes_must_share_the_batch() -> None:
    check_solver(cfg_with("SOLVER.IMS_PER_BATCH", 6), 3)
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH is 16 .* multiple of the 3 processes"):
        check_solver(cfg_with("SOLVER.IMS_PER_BATCH", 16), 3)
    # The trainer scales this batch to the number of processes.
    check_solver(cfg_with("SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8), 3)
    with pytest.raises(ConfigError, match="multiple of the 4 processes of SOLVER.REFERENCE_WORLD_SIZE"):
        check_solver(cfg_with("SOLVER.IMS_PER_BATCH", 6, "SOLVER.REFERENCE_WORLD_SIZE", 4), 3)


def with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        parameters.append(parameter)
    return parameters


@pytest.mark.parametrize(
    ("clip_type", "gradients", "norm", "clipped"),
    [
        # Norms 3 and 4, together 5: the limit 1 divides everything by 5.
        ("full_model", ([3.0, 0.0], [0.0, 4.0]), 5.0, ([0.6, 0.0], [0.0, 0.8])),
        # The first norm is 5, the second is below the limit.
        ("norm", ([3.0, 4.0], [0.5, 0.0]), math.sqrt(25.25), ([0.6, 0.8], [0.5, 0.0])),
        ("value", ([3.0, -4.0], [0.5, 0.0]), math.sqrt(25.25), ([1.0, -1.0], [0.5, 0.0])),
    ],
)
def test_clipping_limits_gradients_to_one(clip_type: str, gradients, norm: float, clipped) -> None:
    parameters = with_gradients(*gradients)
    assert GradientClipper(clip_type=clip_type, limit=1.0)(parameters).item() == pytest.approx(norm)
    for parameter, expected in zip(parameters, clipped, strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_gradients_below_the_limit_stay() -> None:
    for clipper in (GradientClipper.from_config(cfg_with()), GradientClipper(clip_type="full_model", limit=6.0)):
        parameters = with_gradients([3.0, 4.0])
        assert clipper(parameters).item() == pytest.approx(5.0)
        torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, 4.0]))


def test_unknown_clip_type_is_refused() -> None:
    cfg = cfg_with("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global")
    with pytest.raises(ConfigError, match="CLIP_TYPE is 'global'; it must be one of full_model"):
        check_solver(cfg, 1)


def saved(*pairs: object) -> dict:
    return build_optimizer(cfg_with(*pairs), Parts()).state_dict()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["SOLVER.BACKBONE_MULTIPLIER", 1.0], r"groups of \[10, 6\] .* groups of \[6, 4, 2, 4\].*BACKBONE_MULTIPLIER"),
        (["SOLVER.WEIGHT_DECAY_EMBED", 0.05], r"groups of \[5, 5, 2, 4\] .* \[6, 4, 2, 4\].*WEIGHT_DECAY_EMBED"),
        (["SOLVER.OPTIMIZER", "SGD"], "SOLVER.OPTIMIZER .* has .*momentum.* lacks .*betas"),
    ],
    ids=str,
)
def test_state_of_another_optimizer_is_refused(pairs: list[object], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*new run with MODEL.WEIGHTS"):
        check_optimizer_state(build_optimizer(cfg_with(), Parts()), saved(*pairs))


def test_state_of_another_torch_version_is_accepted() -> None:
    state = saved()
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    check_optimizer_state(build_optimizer(cfg_with(), Parts()), state)


class Reordered(Parts):
    """The same parameters in another order, in which the groups have another order as well."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("backbone", "head", "tied", "norm"):
            module = self._modules.pop(name)
            setattr(self, name, module)
        self._parameters = dict(reversed(self._parameters.items()))


def test_state_follows_the_names_of_the_parameters() -> None:
    old, new = Parts(), Reordered()
    optimizer, resumed = (build_optimizer(cfg_with(), model) for model in (old, new))
    for index, parameter in enumerate(old.parameters()):
        parameter.grad = torch.full_like(parameter, float(index))
    optimizer.step()
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = float(index)
    saved_state, names = optimizer.state_dict(), list(old.state_dict())
    assert names != list(new.state_dict())
    resumed.load_state_dict(reorder_state(resumed, new, saved_state, names))
    for name, parameter in old.named_parameters():
        if parameter.requires_grad:
            counterpart = dict(new.named_parameters(remove_duplicate=False))[name]
            torch.testing.assert_close(resumed.state[counterpart], optimizer.state[parameter], rtol=0, atol=0)
            assert learning_rate_of(resumed, counterpart) == learning_rate_of(optimizer, parameter)


def learning_rate_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    return next(group["lr"] for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["SOLVER.WEIGHT_DECAY", 0.5], ["weight decays", "0.05", "SOLVER.WEIGHT_DECAY", "0.5"]),
        (["SOLVER.MOMENTUM", 0.5], ["momenta", "0.9", "SOLVER.MOMENTUM", "0.5"]),
    ],
    ids=str,
)
def test_kept_settings_are_warned_of(pairs: list[object], message: list[str], caplog) -> None:
    sgd = ("SOLVER.OPTIMIZER", "SGD")
    kept = restored_settings(build_optimizer(cfg_with(*sgd), Parts()))
    with caplog.at_level(logging.WARNING, "dimaskdino"):
        caplog.clear()
        warn_of_kept_settings(kept, kept)
        assert not caplog.records
        warn_of_kept_settings(restored_settings(build_optimizer(cfg_with(*sgd, *pairs), Parts())), kept)
    assert len(caplog.records) == 1
    assert all(part in caplog.text for part in message)


def test_scaling_each_gradient_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(size)) for size in (3, 5, 2)] for _ in range(2))
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        one.grad = torch.randn(one.shape) * 10.0 ** (index - 1)
        other.grad = one.grad.clone()
        nn.utils.clip_grad_norm_(other, 0.5)
    GradientClipper(clip_type="norm", limit=0.5)([*ours, nn.Parameter(torch.zeros(1))])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
