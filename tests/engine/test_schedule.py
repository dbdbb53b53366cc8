"""Learning rates over the iterations."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.engine import build_lr_scheduler
from dimaskdino.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def learning_rate_at(cfg: Config, iteration: int) -> float:
    """Of the step with this index, as a run that resumed there would have it."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    scheduler.last_epoch = iteration
    return scheduler.get_lr()[0]


def test_polynomial_schedule_warms_up_then_decays_to_its_floor() -> None:
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


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultistepLR", "WarmupMultiStepLR, WarmupCosineLR, WarmupPolyLR"),
        ("SOLVER.WARMUP_METHOD", "linaer", "linear, constant"),
    ],
)
def test_a_schedule_that_there_is_not_is_refused_with_those_there_are(key: str, value: str, known: str) -> None:
    cfg = get_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError) as error:
        learning_rate_at(cfg, 0)
    message = str(error.value)
    assert message.startswith(f"{key} is '{value}'; it must be one of ")
    assert all(name in message for name in known.split(", "))


@pytest.mark.parametrize("method", ["dimaskdino", "maskdino"])
@pytest.mark.parametrize(
    ("epochs", "max_iter", "steps"),
    [(12, 88_500, [81_125]), (24, 177_000, [147_500]), (50, 368_750, [327_778, 355_092])],
)
def test_coco_r50_schedules_drop_the_learning_rate_where_the_releases_do(
    method: str, epochs: int, max_iter: int, steps: list[int]
) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "coco" / f"{method}_r50_{epochs}ep.yaml"))
    assert max_iter == cfg.SOLVER.MAX_ITER
    expected = 1e-4
    # The warm-up of the releases starts at factor 1: there is none.
    assert learning_rate_at(cfg, 0) == learning_rate_at(cfg, 5) == pytest.approx(expected)
    for step in steps:
        assert learning_rate_at(cfg, step - 1) == pytest.approx(expected)
        expected /= 10
        assert learning_rate_at(cfg, step) == pytest.approx(expected)
    assert learning_rate_at(cfg, max_iter - 1) == pytest.approx(expected)
