"""The end of a run, its best checkpoint, and the average of its weights."""

import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dimaskdino.config import Config
from dimaskdino.engine import Trainer, evaluate
from dimaskdino.engine.ema import AveragedWeights
from dimaskdino.engine.hooks import check_best
from dimaskdino.engine.run_folder import check_not_locked, folder_lock
from dimaskdino.errors import ConfigError, UserError
from dimaskdino.solver import check_solver
from tests.engine import killing, toy
from tests.engine.killing import Killed


class ScriptedTrainer(Trainer):
    """Gets a signal in one iteration, and returns the scores that a test sets."""

    scores: dict[int, float] = {}
    signals: dict[int, int] = {}

    def run_step(self) -> None:
        """Send this process a signal, then train."""
        if number := self.signals.get(self.iter):
            if number == signal.SIGKILL:
                raise Killed
            os.kill(os.getpid(), number)
        super().run_step()

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = {"bbox": {"AP": self.scores.get(self.iter, 0.0)}}
        return self._last_eval_results


train = functools.partial(toy.train, kind=ScriptedTrainer)


def recorded(cfg: Config) -> list[int]:
    return [json.loads(line)["iteration"] for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]


@pytest.fixture
def cfg(toy_cfg: Config) -> Config:
    """Twelve iterations, evaluated after each second one."""
    toy_cfg.merge_from_list(["SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 2])
    return toy_cfg


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signal_saves_and_the_run_goes_on(cfg: Config, number: int, status: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(cfg, signals={6: number})
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    folder = Path(cfg.OUTPUT_DIR)
    assert (folder / "last_checkpoint").read_text() == "model_0000006.pth"
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 7
    whole = cfg.clone()
    whole.OUTPUT_DIR += "_whole"
    torch.testing.assert_close(resumed.model.state_dict(), train(whole).model.state_dict(), rtol=0, atol=0)
    assert recorded(cfg) == recorded(whole)


def test_second_interrupt_ends_at_once(cfg: Config) -> None:
    class TwiceTrainer(ScriptedTrainer):
        def after_step(self) -> None:
            if self.iter == 6:
                os.kill(os.getpid(), signal.SIGINT)
            super().after_step()

    trainer = TwiceTrainer(cfg)
    trainer.signals = {6: signal.SIGINT}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000004.pth"


def test_signal_in_the_last_iteration_changes_nothing(cfg: Config) -> None:
    train(cfg, signals={11: signal.SIGTERM})
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_final.pth"


def test_last_checkpoints_are_kept(cfg: Config) -> None:
    cfg.merge_from_list(["SOLVER.CHECKPOINT_KEEP", 2, "SOLVER.CHECKPOINT_PERIOD", 2])
    with pytest.raises(Killed):
        train(cfg, signals={7: signal.SIGKILL})
    train(cfg, resume=True)
    names = {path.name for path in Path(cfg.OUTPUT_DIR).glob("*.pth")}
    assert names == {"model_0000009.pth", "model_0000011.pth", "model_final.pth"}


def best_of(cfg: Config) -> int:
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_best.pth")["iteration"]


def test_best_checkpoint_survives_a_resume(cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    cfg.TEST.BEST_METRIC = "bbox/AP"
    scores = {1: 3.0, 3: 7.0, 5: 5.0, 7: 6.0, 9: float("nan"), 12: 6.5}
    with pytest.raises(Killed):
        train(cfg, scores=scores, signals={6: signal.SIGKILL})
    assert best_of(cfg) == 3
    train(cfg, scores=scores, resume=True)
    assert best_of(cfg) == 3
    assert caplog.text.count("TEST.BEST_METRIC bbox/AP is not measured") == 1
    cfg.SOLVER.MAX_ITER = 16
    train(cfg, scores={13: 6.9, 16: 7.1}, resume=True)
    assert best_of(cfg) == 15


def test_run_without_gain_stops(cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    cfg.merge_from_list(["TEST.BEST_METRIC", "bbox/AP", "TEST.EARLY_STOP_PATIENCE", 2])
    scores = {1: 3.0, 3: 7.0, 5: 7.0, 7: 6.0, 9: 9.0}
    with pytest.raises(Killed):
        train(cfg, scores=scores, signals={6: signal.SIGKILL})
    assert train(cfg, scores=scores, resume=True).iter == 7
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_final.pth"
    assert "TEST.EARLY_STOP_PATIENCE" in caplog.text
    assert train(cfg, scores=scores, resume=True).iter == 8
    cfg.TEST.EARLY_STOP_PATIENCE = 3
    train(cfg, scores=scores, resume=True)
    assert best_of(cfg) == 9


def test_score_that_is_not_computed_names_the_others(cfg: Config) -> None:
    cfg.TEST.BEST_METRIC = "segm/AP"
    with pytest.raises(ConfigError, match=r"TEST\.BEST_METRIC is 'segm/AP'.*bbox/AP"):
        train(cfg)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["TEST.EARLY_STOP_PATIENCE", 2], r"EARLY_STOP_PATIENCE.*BEST_METRIC.*EVAL_PERIOD"),
        (["TEST.EARLY_STOP_PATIENCE", -1], "EARLY_STOP_PATIENCE is -1"),
        (["SOLVER.CHECKPOINT_KEEP", -1], "CHECKPOINT_KEEP is -1"),
        (["TEST.BEST_METRIC", "bbox/AP", "DATASETS.TEST", ()], r"BEST_METRIC.*DATASETS\.TEST"),
        (["TEST.BEST_METRIC", "ema/bbox/AP"], r"SOLVER\.EMA\.ENABLED"),
        (["TEST.BEST_METRIC", "loss/total_loss"], r"TEST\.LOSS"),
        (["TEST.BEST_METRIC", "segm/AP", "MODEL.META_ARCHITECTURE", "DINO"], "DINO .*no masks"),
        (["TEST.BEST_METRIC", "panoptic_seg/PQ"], "PANOPTIC_ON"),
        (["TEST.BEST_METRIC", "segm/AP", "MODEL.MaskDINO.TEST.INSTANCE_ON", False], "INSTANCE_ON is False"),
        (["TEST.BEST_METRIC", "two/loss/total_loss", "DATASETS.TEST", ("one", "two")], r"TEST\.LOSS"),
        (["TEST.BEST_METRIC", "bbox/AP", "DATASETS.TEST", ("one", "two")], "one, two"),
        (["TEST.BEST_METRIC", "one/bbox/AP", "DATASETS.TEST", ("one",)], "'bbox/AP'"),
    ],
)
def test_contradicting_keys_are_refused(cfg: Config, options: list[Any], keys: str) -> None:
    check_best(cfg)
    several = cfg.clone()
    several.merge_from_list(["DATASETS.TEST", ("one", "two"), "TEST.BEST_METRIC", "two/bbox/AP"])
    check_best(several)
    cfg.merge_from_list(options)
    with pytest.raises(ConfigError, match=keys):
        check_best(cfg)


def test_locked_folder_names_the_process(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    held = fork.Event()

    def hold() -> None:
        with folder_lock(tmp_path):
            held.set()
            time.sleep(60)

    other = fork.Process(target=hold)
    other.start()
    try:
        assert held.wait(60)
        for take in (lambda: check_not_locked(tmp_path), lambda: folder_lock(tmp_path).__enter__()):
            with pytest.raises(UserError, match=rf"process {other.pid} on .*OUTPUT_DIR"):
                take()
    finally:
        other.kill()
        other.join()
    check_not_locked(tmp_path)
    with folder_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def ema_cfg(toy_cfg: Config) -> Config:
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


def test_average_is_evaluated_and_saved_beside_the_weights(ema_cfg: Config) -> None:
    ema_cfg.merge_from_list(["TEST.BEST_METRIC", "ema/bbox/AP", "TEST.EVAL_PERIOD", 3])
    trainer = Trainer(ema_cfg)
    trainer.train()
    folder = Path(ema_cfg.OUTPUT_DIR)
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
    ema_cfg.MODEL.WEIGHTS = str(folder / "model_final_ema.pth")
    other = Trainer(ema_cfg)
    other.resume_or_load(resume=False)
    torch.testing.assert_close(dict(other.model.state_dict()), average, rtol=0, atol=0)
    torch.testing.assert_close(other._average.state_dict(), average, rtol=0, atol=0)


def test_evaluation_of_a_run_gives_both(ema_cfg: Config) -> None:
    ema_cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(ema_cfg)
    trainer.train()
    evaluated = evaluate(ema_cfg, resume=True)
    for found, expected in (
        (evaluated, trainer._last_eval_results),
        (evaluated["ema"], trainer._last_eval_results["ema"]),
    ):
        assert found["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)


def test_resumed_run_has_the_average_of_an_uninterrupted_one(ema_cfg: Config) -> None:
    ema_cfg.DATASETS.TEST = ()
    whole = killing.train(ema_cfg)
    ema_cfg.OUTPUT_DIR += "_killed"
    with pytest.raises(Killed):
        killing.train(ema_cfg, kill_at=5)
    resumed = killing.train(ema_cfg, resume=True)
    assert resumed.start_iter == 4
    torch.testing.assert_close(resumed._average.state_dict(), whole._average.state_dict(), rtol=0, atol=0)


def test_training_does_not_see_the_average(ema_cfg: Config) -> None:
    ema_cfg.TEST.EVAL_PERIOD = 2
    averaged = killing.train(ema_cfg)
    ema_cfg.merge_from_list(["SOLVER.EMA.ENABLED", False, "OUTPUT_DIR", f"{ema_cfg.OUTPUT_DIR}_plain"])
    plain = killing.train(ema_cfg)
    torch.testing.assert_close(averaged.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    assert not list(Path(ema_cfg.OUTPUT_DIR).glob("*ema*"))


def test_bad_decay_is_refused(ema_cfg: Config) -> None:
    ema_cfg.SOLVER.EMA.DECAY = 1.0
    with pytest.raises(ConfigError, match=r"SOLVER\.EMA\.DECAY is 1\.0"):
        check_solver(ema_cfg, 1)
