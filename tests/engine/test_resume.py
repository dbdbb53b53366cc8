"""A run that was killed and resumed has the batches, losses, records and weights of an uninterrupted one."""

import json
import logging
import multiprocessing
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dimaskdino.checkpoint.folder import damage
from dimaskdino.config import Config
from dimaskdino.engine import Trainer, run_folder
from dimaskdino.engine.writers import changed_settings, cut_records, last_record
from dimaskdino.errors import UserError
from tests.engine import killing
from tests.engine.killing import Killed

# What a clock measures.
TIMES = ("time", "data_time", "eta_seconds", "rank_data_time")


@pytest.fixture
def cfg(toy_cfg: Config) -> Config:
    """24 iterations of a model that draws random numbers, with random augmentations."""
    toy_cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "RandomToyDetector", "INPUT.MIN_SIZE_TRAIN", (32, 48, 64)),
            *("INPUT.RANDOM_FLIP", "horizontal", "DATALOADER.ASPECT_RATIO_GROUPING", True),
            *("SOLVER.MAX_ITER", 24, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 8, "SOLVER.STEPS", (15,)),
        ]
    )
    return toy_cfg


def train(cfg: Config, *, kill_at: int = -1, **options: Any) -> Trainer | None:
    if kill_at < 0:
        return killing.train(cfg, **options)
    with pytest.raises(Killed):
        killing.train(cfg, kill_at=kill_at, **options)
    return None


def records(cfg: Config) -> list[dict[str, float]]:
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def state(trainer: Trainer) -> dict[str, Any]:
    moments = {
        f"{index}.{name}": value
        for index, each in trainer.optimizer.state_dict()["state"].items()
        for name, value in each.items()
    }
    return {**trainer.model.state_dict(), **moments}


def assert_same_run(cfg: Config, trainer: Trainer, whole_cfg: Config, whole: Trainer) -> None:
    torch.testing.assert_close(state(trainer), state(whole), rtol=0, atol=0)
    assert records(cfg) == records(whole_cfg)


def elsewhere(cfg: Config, name: str, *options: Any) -> Config:
    other = cfg.clone()
    other.merge_from_list([*options, "OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_{name}"])
    return other


KILLS = [
    *((2, "step"), (13, "step"), (20, "step"), (7, "evaluation"), (15, "records"), (19, "records"), (23, "records")),
    (12, "error"),  # just after a checkpoint, where no record is due
]


def test_killed_run_goes_on_exactly(cfg: Config) -> None:
    whole = train(cfg)
    assert [record["iteration"] for record in records(cfg)] == [7, 15, 19, 23, 24]
    for kill_at, phase in KILLS:
        killed = elsewhere(cfg, f"{kill_at}_{phase}")
        train(killed, kill_at=kill_at, phase=phase)
        assert_same_run(killed, train(killed, resume=True), cfg, whole)


@pytest.mark.parametrize(("sampler", "parts"), [("TrainingSampler", 1), ("RepeatFactorTrainingSampler", 2)])
def test_accumulation_and_another_number_of_workers_change_nothing(cfg: Config, sampler: str, parts: int) -> None:
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.9])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (), "SOLVER.ACCUMULATION_STEPS", parts])
    whole = train(cfg)
    killed = elsewhere(cfg, "killed", "DATALOADER.NUM_WORKERS", 2)
    train(killed, kill_at=6)
    assert_same_run(killed, train(killed, resume=True), cfg, whole)
    assert multiprocessing.active_children() == []


def test_drawn_seed_is_kept(cfg: Config) -> None:
    cfg.SEED = -1
    train(cfg, kill_at=5)
    first, again = Trainer(cfg), Trainer(cfg)
    drawn = first.seed
    assert again.seed != drawn
    for trainer in (first, again):
        trainer.resume_or_load(resume=True)
    assert again.seed == first.seed != drawn


def test_finished_run_says_so_and_goes_on_if_longer(cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    cfg.merge_from_list(["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", ()])
    train(cfg)
    before = records(cfg)
    with caplog.at_level(logging.WARNING):
        train(cfg, resume=True)
    assert "finished" in caplog.text
    assert "SOLVER.MAX_ITER" in caplog.text
    assert records(cfg) == before
    caplog.clear()
    cfg.SOLVER.MAX_ITER = 12
    assert train(cfg, resume=True).start_iter == 8
    assert "SOLVER.MAX_ITER: 8 -> 12" in caplog.text
    assert [record["iteration"] for record in records(cfg)] == [7, 11, 12]


def test_checkpoint_of_an_earlier_version_resumes(cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    train(cfg, kill_at=5)
    path = Path(cfg.OUTPUT_DIR) / "model_0000003.pth"
    content = torch.load(path)
    del content["trainer"]["run"]
    torch.save(content, path)
    with caplog.at_level(logging.WARNING):
        assert train(cfg, resume=True).start_iter == 4
    assert "earlier version" in caplog.text


def test_another_batch_size_goes_on_after_the_images_drawn(cfg: Config) -> None:
    train(cfg, kill_at=5)
    cfg.SOLVER.IMS_PER_BATCH = 4
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert (resumed.start_iter, resumed._first_batch) == (4, 2)


def test_rate_follows_another_batch_size(cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    cfg.merge_from_list(["SOLVER.REFERENCE_BATCH_SIZE", 4, "SOLVER.STEPS", (3,), "SOLVER.GAMMA", 0.1])
    train(cfg, kill_at=5)
    cfg.SOLVER.IMS_PER_BATCH = 4
    with caplog.at_level(logging.INFO):
        resumed = Trainer(cfg)
        resumed.resume_or_load(resume=True)
    # 0.01 is for 4 images, a tenth of it for the backbone, and a tenth of both after 3 iterations.
    assert resumed.scheduler.base_lrs == pytest.approx([0.001, 0.01, 0.01])
    assert [group["lr"] for group in resumed.optimizer.param_groups] == pytest.approx([0.0001, 0.001, 0.001])
    assert "SOLVER.REFERENCE_BATCH_SIZE" in caplog.text
    assert "--resume keeps" not in caplog.text


def test_another_seed_is_not_taken(cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    train(cfg, kill_at=5)
    cfg.SEED = 5
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.seed == 1
    assert "SEED: 1 -> 5" in caplog.text


def test_records_are_cut_after_the_checkpoint(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    assert last_record(metrics) == -1
    metrics.write_text('{"iteration": 3, "loss": 1}\n{"iteration": 7}\n{"iteration": 9}\n{"iterat')
    assert last_record(metrics) == 9
    cut_records(metrics, 7)
    assert metrics.read_text() == '{"iteration": 3, "loss": 1}\n{"iteration": 7}\n'
    cut_records(tmp_path / "absent.json", 7)


def test_changed_settings_give_both_values(cfg: Config) -> None:
    other = elsewhere(cfg, "other", "SOLVER.BASE_LR", 0.5, "INPUT.MIN_SIZE_TRAIN", (32,))
    changes = changed_settings(cfg.dump(), other.dump())
    assert changes == ["INPUT.MIN_SIZE_TRAIN: [32, 48, 64] -> [32]", "SOLVER.BASE_LR: 0.01 -> 0.5"]


def test_damaged_last_checkpoint_costs_only_time(cfg: Config) -> None:
    cfg.merge_from_list(["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", ()])
    whole = train(cfg)
    damaged = elsewhere(cfg, "damaged")
    train(damaged)
    final = Path(damaged.OUTPUT_DIR) / "model_final.pth"
    for name in ("model_final.pth", "model_0000007.pth"):
        (Path(damaged.OUTPUT_DIR) / name).write_bytes(b"")
        assert_same_run(damaged, train(damaged, resume=True), cfg, whole)
        assert not damage(final)


def test_full_disk_is_noticed_at_the_start(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda folder: Namespace(free=100))
    with pytest.raises(UserError, match=rf"OUTPUT_DIR {cfg.OUTPUT_DIR} has 0 MiB"):
        train(cfg)
