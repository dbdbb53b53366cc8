"""Groups of parameters, schedules, and the releases' recipe."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.errors import ConfigError
from dimaskdino.solver import (
    GradientClipper,
    build_lr_scheduler,
    build_optimizer,
    check_solver,
    freeze_parameters,
    parameter_groups,
)
from dimaskdino.solver.schedule import scale_learning_rate
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
    both = nn.Sequential(*(Parts() for _ in range(2)))
    freeze_parameters(cfg_with(*rules({"pattern": "0.backbone.1", "frozen": True})), both)
    assert [each.backbone[1].momentum for each in both] == [0.0, 0.1]


def test_learning_rate_follows_the_batch_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cfg = cfg_with("SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_BATCH_SIZE", 16)
    with caplog.at_level(logging.INFO):
        scaled = scale_learning_rate(cfg)
    assert (1e-4, pytest.approx(2.5e-5)) == (cfg.SOLVER.BASE_LR, scaled.SOLVER.BASE_LR)
    for part in ("SOLVER.BASE_LR 0.0001", "16 images", "SOLVER.REFERENCE_BATCH_SIZE", "2.5e-05"):
        assert part in caplog.text
    scaled.SOLVER.BASE_LR = 1e-4
    assert scaled == cfg


@pytest.mark.parametrize("reference", [0, 4])
def test_nothing_is_scaled_without_a_reference_or_at_it(reference: int) -> None:
    cfg = cfg_with("SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_BATCH_SIZE", reference)
    assert scale_learning_rate(cfg) is cfg


def test_two_references_are_refused() -> None:
    cfg = cfg_with("SOLVER.REFERENCE_BATCH_SIZE", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8)
    with pytest.raises(ConfigError, match=r"SOLVER\.REFERENCE_BATCH_SIZE and SOLVER\.REFERENCE_WORLD_SIZE"):
        check_solver(cfg, 8)


CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [f"{method}_r50_{epochs}ep.yaml" for method in ("dimaskdino", "maskdino") for epochs in (12, 24, 50)]
# The real model with fewer and narrower layers.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1, "MODEL.MaskDINO.DEC_LAYERS", 2),
    *("MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD", 32, "MODEL.MaskDINO.DIM_FEEDFORWARD", 32),
]
# GroupNorm after a projection, LayerNorm and GroupNorm by name, and the label embedding of denoising.
WITHOUT_DECAY = re.compile(r"(input_proj\.\d\.1|norm\d?|label_embed)\.(weight|bias)$")


def recipe(file: str) -> Config:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "coco" / file))
    return cfg


@pytest.mark.parametrize("file", FILES)
def test_r50_files_have_the_releases_settings(file: str) -> None:
    cfg = recipe(file)
    solver = cfg.SOLVER
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.BACKBONE_MULTIPLIER) == ("ADAMW", 1e-4, 0.1)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_EMBED) == (0.05, 0.0, 0.0)
    assert (solver.IMS_PER_BATCH, solver.AMP.ENABLED) == (16, True)
    assert (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE) == (1024, 0.1, 2.0)
    assert (cfg.INPUT.RANDOM_FLIP, cfg.INPUT.FORMAT, cfg.INPUT.DATASET_MAPPER_NAME) == (
        "horizontal",
        "RGB",
        "coco_instance_lsj",
    )
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.TEST.DETECTIONS_PER_IMAGE) == (800, 1333, 100)
    clipper = GradientClipper.from_config(cfg)
    assert (clipper.clip_type, clipper.limit, clipper.norm_type) == ("full_model", 0.01, 2.0)


@pytest.mark.parametrize("method", ["dimaskdino", "maskdino"])
def test_shorter_schedules_change_nothing_else(method: str) -> None:
    whole = recipe(f"{method}_r50_50ep.yaml")
    for epochs in (12, 24):
        shorter = recipe(f"{method}_r50_{epochs}ep.yaml")
        assert shorter.SOLVER.MAX_ITER < whole.SOLVER.MAX_ITER
        shorter.SOLVER.MAX_ITER, shorter.SOLVER.STEPS = whole.SOLVER.MAX_ITER, whole.SOLVER.STEPS
        assert shorter == whole


@pytest.mark.parametrize("file", ["dimaskdino_r50_12ep.yaml", "maskdino_r50_12ep.yaml"])
def test_parameters_have_the_releases_learning_rate_and_decay(file: str) -> None:
    cfg = recipe(file)
    cfg.merge_from_list(SMALL)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = {
        names.pop(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert not names
    assert any(WITHOUT_DECAY.search(name) for name in settings)
    for name, (lr, decay) in settings.items():
        assert lr == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4), name
        assert decay == (0.0 if WITHOUT_DECAY.search(name) else 0.05), name
    assert settings["sem_seg_head.pixel_decoder.level_embed"] == (1e-4, 0.05)
    assert len(optimizer.param_groups) == 3


def learning_rate_at(cfg: Config, iteration: int) -> float:
    """The learning rate of a step, as a run that resumes there has it."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    scheduler.last_epoch = iteration
    return scheduler.get_lr()[0]


def test_polynomial_schedule_warms_up_and_decays_to_its_floor() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 100, "SOLVER.BASE_LR", 1.0),
            *("SOLVER.WARMUP_ITERS", 10, "SOLVER.WARMUP_FACTOR", 0.1),
            *("SOLVER.POLY_LR_POWER", 2.0, "SOLVER.POLY_LR_CONSTANT_ENDING", 0.04),
        ]
    )
    assert learning_rate_at(cfg, 0) == pytest.approx(0.1)
    assert learning_rate_at(cfg, 5) == pytest.approx(0.95**2 * 0.55)
    assert learning_rate_at(cfg, 50) == pytest.approx(0.25)
    assert learning_rate_at(cfg, 95) == pytest.approx(0.04)


@pytest.mark.parametrize("method", ["dimaskdino", "maskdino"])
@pytest.mark.parametrize(
    ("epochs", "max_iter", "steps"),
    [(12, 88_500, [81_125]), (24, 177_000, [147_500]), (50, 368_750, [327_778, 355_092])],
)
def test_r50_schedules_drop_where_the_releases_do(method: str, epochs: int, max_iter: int, steps: list[int]) -> None:
    cfg = recipe(f"{method}_r50_{epochs}ep.yaml")
    assert max_iter == cfg.SOLVER.MAX_ITER
    expected = 1e-4
    # The warm-up of the releases starts at factor 1: there is none.
    assert learning_rate_at(cfg, 0) == learning_rate_at(cfg, 5) == pytest.approx(expected)
    for step in steps:
        assert learning_rate_at(cfg, step - 1) == pytest.approx(expected)
        expected /= 10
        assert learning_rate_at(cfg, step) == pytest.approx(expected)
    assert learning_rate_at(cfg, max_iter - 1) == pytest.approx(expected)
