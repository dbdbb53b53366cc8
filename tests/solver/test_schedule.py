"""The learning rate in proportion to the images of an iteration."""

import logging

import pytest

from dimaskdino.errors import ConfigError
from dimaskdino.solver import check_solver, scale_learning_rate
from tests.solver.test_optimizer import cfg_with


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
