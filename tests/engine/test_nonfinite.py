"""Steps that are not finite, and parameters that are frozen."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from dimaskdino.config import Config
from dimaskdino.engine import Trainer, argument_parser
from dimaskdino.engine.nonfinite import MOST_FILES, NonFiniteError, decode, encode
from dimaskdino.engine.replay import replay
from dimaskdino.engine.setup import load_config
from dimaskdino.errors import CheckpointError, UserError
from dimaskdino.seeds import seed_from
from tests.checkpoint.models import RunsCode
from tests.documentation import REPOSITORY, command
from tests.engine.toy import RandomToyDetector, train
from tests.tiny_model import tiny_model, train_batch

BAD_IMAGE = 3


@META_ARCH_REGISTRY.register()
class PoisonedToyDetector(RandomToyDetector):
    """A loss, and with it a gradient and a running mean, is NaN for one image; a weight, for the other models too."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.batch_norm = nn.BatchNorm1d(8)

    def _losses(self, images: list[dict[str, Any]], boxes: Tensor) -> dict[str, Tensor]:
        bad = torch.tensor([[float("nan")] if each["image_id"] == BAD_IMAGE else [0.0] for each in images])
        statistics = self.batch_norm(bad.expand(-1, 8))
        return super()._losses(images, boxes + 0 * statistics.sum(1, keepdim=True))


@pytest.fixture
def cfg(toy_cfg: Config) -> Config:
    """Twelve iterations: four passes over six images with objects, one of which is bad."""
    toy_cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "PoisonedToyDetector", "SOLVER.MAX_ITER", 12])
    toy_cfg.merge_from_list(["DATASETS.TEST", (), "SOLVER.CHECKPOINT_PERIOD", 4])
    return toy_cfg


def files(cfg: Config) -> list[Path]:
    return sorted(Path(cfg.OUTPUT_DIR).glob("nonfinite/*.pth"))


def test_bad_step_stops_and_replays_to_the_last_bit(cfg: Config) -> None:
    message = r"loss_bbox = nan.*iteration \d, .*000003\.png.*tools/replay\.py"
    with pytest.raises(NonFiniteError, match=message) as stopped:
        train(cfg)
    (file,) = files(cfg)
    assert str(file) in str(stopped.value)
    recorded, again = replay(file)
    assert again.terms == recorded["terms"]
    assert recorded["terms"][0] == "loss_bbox = nan"
    assert "batch_norm.running_mean" in recorded["terms"]
    assert recorded["model"]["batch_norm.running_mean"].isfinite().all()  # as before the step
    assert again.differences(recorded) == []
    assert again.first_module == "batch_norm"


def test_finite_losses_replay_too_and_depend_on_the_draws(cfg: Config, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        train(cfg)
    content = torch.load(files(cfg)[0])
    content["batch"] = [each for each in content["batch"] if each["image_id"] != BAD_IMAGE] * 2
    content["losses"] = {}
    good = tmp_path / "good.pth"
    torch.save(content, good)
    recorded, once = replay(good)
    assert not once.terms
    recorded["losses"] = once.losses
    assert len(once.losses) == 2
    assert replay(good)[1].differences(recorded) == []
    torch.save({**content, "seed": content["seed"] + 1}, good)
    assert replay(good)[1].differences(recorded) == ["loss_bbox", "loss_bbox_0"]  # dropout drew others


def test_bad_steps_are_skipped_and_counted(cfg: Config) -> None:
    cfg.SOLVER.NONFINITE = "skip"
    trainer = train(cfg)
    assert trainer.nonfinite.skipped == 4
    assert len(files(cfg)) == MOST_FILES == 3
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    records = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    assert records[-1]["skipped_steps"] == 4
    cfg.SOLVER.MAX_ITER = 15
    assert train(cfg, resume=True).nonfinite.skipped == 5


def test_weight_that_is_not_finite_stops_in_any_case(cfg: Config) -> None:
    cfg.SOLVER.NONFINITE = "skip"
    trainer = Trainer(cfg)
    with torch.no_grad():
        trainer.model.box_head.bias[2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"box_head\.bias.*SOLVER\.BASE_LR") as stopped:
        trainer.train()
    assert stopped.value.terms[0] == "box_head.bias"


def test_too_many_skipped_steps_in_a_row_stop(cfg: Config) -> None:
    cfg.merge_from_list(["SOLVER.NONFINITE", "skip", "SOLVER.MAX_ITER", 40])
    trainer = Trainer(cfg)
    trainer.model.box_head.register_forward_hook(lambda module, given, output: output * float("nan"))
    with pytest.raises(NonFiniteError, match="20 steps before it were skipped"):
        trainer.train()
    assert trainer.iter == 20


def test_replay_file_of_another_model_is_one_line(cfg: Config, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        train(cfg)
    with pytest.raises(CheckpointError, match=r"of another model: .*batch_norm"):
        replay(files(cfg)[0], ["MODEL.META_ARCHITECTURE", "ToyDetector"])
    (tmp_path / "torn.pth").write_bytes(files(cfg)[0].read_bytes()[:-200])
    torch.save({"model": {}}, tmp_path / "weights.pth")
    torch.save(RunsCode(tmp_path / "made"), tmp_path / "code.pth")
    for name in ("torn.pth", "weights.pth", "absent.pth", "code.pth"):
        with pytest.raises(UserError, match=name):
            replay(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_tool_prints_both_times(cfg: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(NonFiniteError):
        train(cfg)
    monkeypatch.setattr(sys, "argv", ["replay.py", str(files(cfg)[0])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "tools" / "replay.py"), run_name="__main__")
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "losses that differ in any bit: 0 of 2" in shown
    assert "first module whose output is not finite: batch_norm" in shown


def test_batch_of_the_real_model_survives_the_file(tmp_path: Path) -> None:
    batch = train_batch([[4, 4, 30, 30], [10, 8, 61, 40]], [[0, 0, 17, 63]])
    torch.save(encode(batch), tmp_path / "batch.pth")
    again = decode(torch.load(tmp_path / "batch.pth", weights_only=True))
    model = tiny_model().train()
    losses = []
    for given in (batch, again):
        seed_from(5)
        losses.append(model(given))
    assert len(losses[0]) > 20
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)


def test_frozen_parameters_are_the_same_after_training(toy_cfg: Config) -> None:
    toy_cfg.merge_from_list(["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "DATASETS.TEST", ()])
    toy_cfg.merge_from_list(
        ["SOLVER.PARAM_GROUPS", [{"pattern": "backbone", "frozen": True}, {"pattern": "*.bias", "frozen": False}]]
    )
    trainer = Trainer(toy_cfg)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    same = {name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])}
    assert same == {"backbone.weight"}


def test_example_of_the_page_sets_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    cfg = load_config(argument_parser().parse_args(command("docs/training.md", "SOLVER.PARAM_GROUPS")))
    cfg.MODEL.DEVICE = "cpu"
    model = Trainer.build_model(cfg)
    step = Trainer.build_step(cfg, model)
    rates = {p: group["lr"] for group in step.optimizer.param_groups for p in group["params"]}
    stem = {name for name, p in model.named_parameters() if p not in rates}
    assert stem
    assert all(name.startswith("backbone.body.stem.") for name in stem)
    slow = {p for name, p in model.named_parameters() if ".class_embed." in name}
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone") and p not in slow]
    assert slow
    assert [rates[p] for p in slow] == pytest.approx([0.1 * cfg.SOLVER.BASE_LR] * len(slow))
    assert {rates[p] for p in others} == {cfg.SOLVER.BASE_LR}
