"""Training runs of a toy detector: what they write, how they resume, what they refuse."""

import json
import logging
import re
import resource
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from dimaskdino.config import Config
from dimaskdino.engine import Trainer, evaluate
from dimaskdino.engine.hooks import progress_line
from dimaskdino.engine.run_folder import full_disk_in_one_line
from dimaskdino.errors import UserError
from tests.engine.toy import train


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


def test_run_writes_checkpoints_metrics_events_and_results(toy_cfg: Config) -> None:
    toy_cfg.TEST.EVAL_LAYERS = ["all"]
    trainer = train(toy_cfg)
    run = Path(toy_cfg.OUTPUT_DIR)
    assert (run / "last_checkpoint").read_text() == "model_final.pth"
    assert {"model_0000004.pth", "model_final.pth"} <= {path.name for path in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    last = json.loads((run / "metrics.json").read_text().splitlines()[0])
    assert last["iteration"] == 9
    assert {"total_loss", "loss_bbox", "loss_bbox_0", "grad_norm", "lr", "data_time"} <= set(last)
    results = json.loads((run / "inference" / "results.json").read_text())
    assert set(results) == {"bbox", "segm", "layers"}
    assert results["bbox"]["AP"] == trainer._last_eval_results["bbox"]["AP"]
    assert (run / "inference" / "coco_instances_results.json").is_file()
    assert (run / "inference" / "layers.csv").is_file()


def test_run_starts_anew_without_resume(toy_cfg: Config) -> None:
    train(toy_cfg)
    trainer = Trainer(toy_cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0


def iterations(metrics: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]


def test_new_run_sets_an_earlier_one_aside(toy_cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    train(toy_cfg)
    folder = Path(toy_cfg.OUTPUT_DIR)
    earlier = (folder / "metrics.json").read_text()
    (folder / "metrics.1.json").write_text("of a run before that")
    toy_cfg.SOLVER.MAX_ITER = 4
    with caplog.at_level(logging.WARNING):
        train(toy_cfg)
    assert f"{folder} holds an earlier run" in caplog.text
    assert "model_final.pth" in caplog.text
    assert (folder / "metrics.1.json").read_text() == "of a run before that"
    assert (folder / "metrics.2.json").read_text() == earlier
    assert set(iterations(folder / "metrics.json")) == {3, 4}


def test_earlier_run_is_not_resumed_after_a_new_start(toy_cfg: Config) -> None:
    train(toy_cfg)
    trainer = Trainer(toy_cfg)
    trainer.resume_or_load(resume=False)
    trainer.run_step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    resumed = Trainer(toy_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 0
    assert (Path(toy_cfg.OUTPUT_DIR) / "model_final.pth").is_file()


def test_failed_start_leaves_the_earlier_run(toy_cfg: Config) -> None:
    train(toy_cfg)
    folder = Path(toy_cfg.OUTPUT_DIR)
    records = (folder / "metrics.json").read_text()
    toy_cfg.MODEL.WEIGHTS = str(folder / "absent.pth")
    with pytest.raises(UserError, match="absent.pth"):
        train(toy_cfg)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert (folder / "metrics.json").read_text() == records


def test_unknown_model_is_refused(toy_cfg: Config) -> None:
    toy_cfg.MODEL.META_ARCHITECTURE = "ToyDetecter"
    with pytest.raises(UserError, match=r"MODEL\.META_ARCHITECTURE is 'ToyDetecter', but only these are .*ToyDetector"):
        Trainer(toy_cfg)


def test_resumed_run_keeps_its_learning_rate(toy_cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    train(toy_cfg)
    with caplog.at_level(logging.WARNING):
        Trainer(toy_cfg).resume_or_load(resume=True)
    assert "learning rate" not in caplog.text
    toy_cfg.SOLVER.BASE_LR = 0.02
    trainer = Trainer(toy_cfg)
    with caplog.at_level(logging.WARNING):
        trainer.resume_or_load(resume=True)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.01, 0.001}
    assert re.search(r"learning rates of the run, \[.*0\.01\b.*\], .*SOLVER.BASE_LR\b.* \[.*0\.02\b.*\]", caplog.text)


def test_checkpoint_period_zero_saves_the_last_only(toy_cfg: Config) -> None:
    toy_cfg.SOLVER.CHECKPOINT_PERIOD = 0
    train(toy_cfg)
    assert [path.name for path in Path(toy_cfg.OUTPUT_DIR).glob("*.pth")] == ["model_final.pth"]


def test_failure_in_the_last_iteration_is_not_evaluated(toy_cfg: Config) -> None:
    trainer = Trainer(toy_cfg)
    step = trainer.run_step
    trainer.run_step = lambda: 1 / 0 if trainer.iter == toy_cfg.SOLVER.MAX_ITER - 1 else step()
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (Path(toy_cfg.OUTPUT_DIR) / "inference").exists()


def test_finished_run_is_evaluated_when_resumed(toy_cfg: Config) -> None:
    toy_cfg.SOLVER.MAX_ITER, toy_cfg.SOLVER.STEPS = 2, ()
    train(toy_cfg)
    results = Path(toy_cfg.OUTPUT_DIR) / "inference" / "results.json"
    results.unlink()
    train(toy_cfg, resume=True)
    assert results.is_file()


def test_resume_without_a_checkpoint_starts_at_zero(toy_cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(toy_cfg)
    with caplog.at_level(logging.WARNING):
        trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert "no checkpoint in" in caplog.text


def test_evaluation_repeats_that_of_the_training(toy_cfg: Config) -> None:
    trained = train(toy_cfg)._last_eval_results
    evaluated = evaluate(toy_cfg, resume=True)
    assert set(evaluated) == {"bbox", "segm"}
    for task, scores in evaluated.items():
        assert scores == pytest.approx(trained[task], nan_ok=True)


def test_results_of_several_views_stand_beside_those_of_one(toy_cfg: Config) -> None:
    toy_cfg.TEST.AUG.ENABLED, toy_cfg.TEST.AUG.MIN_SIZES = True, (32, 64)
    toy_cfg.SOLVER.EMA.ENABLED, toy_cfg.TEST.EVAL_PERIOD = True, 5
    trained = train(toy_cfg)._last_eval_results
    assert set(trained) == {"bbox", "segm", "bbox_TTA", "segm_TTA", "ema"}
    assert set(trained["ema"]) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    folder = Path(toy_cfg.OUTPUT_DIR)
    assert set(json.loads((folder / "inference" / "results.json").read_text())) == {"bbox", "segm"}
    of_views = json.loads((folder / "tta" / "inference" / "results.json").read_text())
    assert of_views["bbox"]["AP"] == trained["bbox_TTA"]["AP"]
    assert (folder / "ema" / "tta" / "inference" / "coco_instances_results.json").is_file()
    # The views are looked at once, after the training.
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert "bbox/AP" in records[0]
    assert [record["iteration"] for record in records if "bbox_TTA/AP" in record] == [records[-1]["iteration"]]
    assert set(evaluate(toy_cfg, resume=True)) == set(trained)


def test_evaluation_verifies_expected_results(toy_cfg: Config) -> None:
    toy_cfg.SOLVER.MAX_ITER, toy_cfg.SOLVER.STEPS = 1, ()
    ap = train(toy_cfg)._last_eval_results["bbox"]["AP"]
    toy_cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", ap, 0.01]]
    evaluate(toy_cfg, resume=True)
    toy_cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", ap + 1, 0.01]]
    with pytest.raises(SystemExit) as stopped:
        evaluate(toy_cfg, resume=True)
    assert stopped.value.code == 1


def test_evaluation_by_stage_keeps_the_speed_file(toy_cfg: Config) -> None:
    toy_cfg.DATASETS.SHAPES.NUM_VAL = 7
    train(toy_cfg)
    file = Path(toy_cfg.OUTPUT_DIR) / "inference" / "speed.json"
    speed = json.loads(file.read_text())
    assert (speed["images"], speed["images_per_batch"], speed["processes"]) == (2, 1, 1)
    assert speed["images_per_second"] > 0
    written = file.read_text()
    toy_cfg.TEST.EVAL_LAYERS = ["all"]
    assert set(evaluate(toy_cfg, resume=True)) == {"bbox", "segm", "layers"}
    assert file.read_text() == written


def test_evaluation_without_weights_is_refused(toy_cfg: Config) -> None:
    with pytest.raises(UserError, match=r"^--eval-only needs .*MODEL\.WEIGHTS"):
        evaluate(toy_cfg)
    with pytest.raises(UserError, match="no checkpoint in"):
        evaluate(toy_cfg, resume=True)


def test_amp_is_off_on_the_cpu(toy_cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    toy_cfg.SOLVER.AMP.ENABLED = True
    with caplog.at_level(logging.INFO):
        trainer = Trainer(toy_cfg)
    assert trainer.step.autocast_to is None
    assert "SOLVER.AMP.ENABLED has no effect on the CPU" in caplog.text


def test_progress_line_shows_the_final_stage() -> None:
    with EventStorage() as storage:
        storage.put_scalars(total_loss=9.0, loss_ce=1.5, loss_ce_0=2.0, loss_mask_interm=3.0, loss_dice_dn_1=2.5)
        storage.put_scalars(time=2.0)
        line = progress_line(storage, done=10, max_iter=70)
    assert line.startswith("eta 0:02:00  10/70  total_loss 9  loss_ce 1.5  time 2")
    for other_stage in ("interm", "dn", "loss_ce_0"):
        assert other_stage not in line


@pytest.mark.parametrize("full", ["config.yaml", "model_0000004.pth"])
def test_full_disk_is_a_user_error(toy_cfg: Config, full: str, caplog: pytest.LogCaptureFixture) -> None:
    train(toy_cfg)
    size = (Path(toy_cfg.OUTPUT_DIR) / full).stat().st_size
    trainer = Trainer(toy_cfg)
    # Makes the checkpoint the larger file.
    trainer.model.register_buffer("large", torch.zeros(10_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1 if full == "config.yaml" else size + 9_000, before[1]))
    try:
        with pytest.raises(UserError, match=rf"{toy_cfg.OUTPUT_DIR} \(OUTPUT_DIR\): the disk .* full.*--resume"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(RuntimeError, match="a bug"), full_disk_in_one_line(Path(toy_cfg.OUTPUT_DIR)):
        raise RuntimeError("a bug")


def test_run_that_fails_at_once_leaves_no_record(toy_cfg: Config) -> None:
    trainer = Trainer(toy_cfg)
    trainer.run_step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert {path.name for path in Path(toy_cfg.OUTPUT_DIR).iterdir()} == {"config.yaml"}


def test_optimizer_state_follows_names_when_resumed(toy_cfg: Config) -> None:
    saved = train(toy_cfg)
    toy_cfg.MODEL.META_ARCHITECTURE = "ReorderedToyDetector"
    resumed = Trainer(toy_cfg)
    resumed.resume_or_load(resume=True)
    parameters = dict(resumed.model.named_parameters())
    assert list(parameters) != list(dict(saved.model.named_parameters()))
    for name, parameter in saved.model.named_parameters():
        moments = [
            trainer.optimizer.state[p]["exp_avg"] for trainer, p in ((saved, parameter), (resumed, parameters[name]))
        ]
        torch.testing.assert_close(*moments, rtol=0, atol=0)
    assert resumed.scheduler.base_lrs == [group["initial_lr"] for group in resumed.optimizer.param_groups]
