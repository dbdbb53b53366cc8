"""The moving average of the weights: its arithmetic, its place in evaluation, files and resumed runs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dimaskdino.config import Config
from dimaskdino.engine import Trainer, evaluate
from dimaskdino.engine.ema import AveragedWeights
from dimaskdino.errors import ConfigError
from dimaskdino.solver import check_solver
from tests.engine import killing
from tests.engine.killing import Killed


@pytest.fixture
def cfg(toy_cfg: Config) -> Config:
    """Six iterations with the average."""
    toy_cfg.merge_from_list(["SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 2])
    toy_cfg.merge_from_list(["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5])
    return toy_cfg


def test_average_by_hand() -> None:
    model = nn.BatchNorm1d(1)
    model.bias.requires_grad_(False)
    average = AveragedWeights(model, decay=0.25)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.bias.fill_(7.0)
        model.running_mean.fill_(5.0)
    # From 1 to 3 with decay 1 / 10 in iteration 0, then 0.25.
    average.update(0)
    assert average.state_dict()["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 3)
    average.update(100)
    expected = 0.25 * 2.8 + 0.75 * 3
    found = average.state_dict()
    assert found["weight"].item() == pytest.approx(expected)
    assert (found["bias"].item(), found["running_mean"].item()) == (7.0, 5.0)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 3.0


def test_average_is_evaluated_and_saved_beside_the_weights(cfg: Config) -> None:
    cfg.merge_from_list(["TEST.BEST_METRIC", "ema/bbox/AP", "TEST.EVAL_PERIOD", 3])
    trainer = Trainer(cfg)
    trainer.train()
    folder = Path(cfg.OUTPUT_DIR)
    weights = trainer.step.model.state_dict()
    average = trainer._average.state_dict()
    assert not torch.equal(weights["box_head.weight"], average["box_head.weight"])
    assert set(trainer._last_eval_results) == {"bbox", "segm", "ema"}
    results = json.loads((folder / "ema/inference/results.json").read_text())
    assert results["bbox"]["AP"] == pytest.approx(trainer._last_eval_results["ema"]["bbox"]["AP"], nan_ok=True)
    assert "ema/bbox/AP" in (folder / "metrics.json").read_text()
    content = torch.load(folder / "model_final.pth")
    torch.testing.assert_close(content["model"], dict(weights), rtol=0, atol=0)
    torch.testing.assert_close(content["model_ema"], average, rtol=0, atol=0)
    assert (folder / "model_best_ema.pth").is_file()
    cfg.MODEL.WEIGHTS = str(folder / "model_final_ema.pth")
    other = Trainer(cfg)
    other.resume_or_load(resume=False)
    torch.testing.assert_close(dict(other.model.state_dict()), average, rtol=0, atol=0)
    torch.testing.assert_close(other._average.state_dict(), average, rtol=0, atol=0)


def test_evaluation_of_a_run_gives_both(cfg: Config) -> None:
    cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(cfg)
    trainer.train()
    evaluated = evaluate(cfg, resume=True)
    for found, expected in (
        (evaluated, trainer._last_eval_results),
        (evaluated["ema"], trainer._last_eval_results["ema"]),
    ):
        assert found["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)


def test_resumed_run_has_the_average_of_an_uninterrupted_one(cfg: Config) -> None:
    cfg.DATASETS.TEST = ()
    whole = killing.train(cfg)
    cfg.OUTPUT_DIR += "_killed"
    with pytest.raises(Killed):
        killing.train(cfg, kill_at=5)
    resumed = killing.train(cfg, resume=True)
    assert resumed.start_iter == 4
    torch.testing.assert_close(resumed._average.state_dict(), whole._average.state_dict(), rtol=0, atol=0)


def test_training_does_not_see_the_average(cfg: Config) -> None:
    cfg.TEST.EVAL_PERIOD = 2
    averaged = killing.train(cfg)
    cfg.merge_from_list(["SOLVER.EMA.ENABLED", False, "OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_plain"])
    plain = killing.train(cfg)
    torch.testing.assert_close(averaged.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    assert not list(Path(cfg.OUTPUT_DIR).glob("*ema*"))


def test_bad_decay_is_refused(cfg: Config) -> None:
    cfg.SOLVER.EMA.DECAY = 1.0
    with pytest.raises(ConfigError, match=r"SOLVER\.EMA\.DECAY is 1\.0"):
        check_solver(cfg, 1)
