"""The releases' R50 recipe: optimizer settings, schedules, and the parameter groups of the real model."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.solver import GradientClipper, build_lr_scheduler, build_optimizer

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
