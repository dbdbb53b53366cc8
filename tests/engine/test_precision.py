"""Mixed precision, and the settings of sharding; tests/engine/test_job.py shares a model out."""

import logging

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from dimaskdino.config import Config
from dimaskdino.engine import GradientClipper, Trainer, TrainStep
from dimaskdino.engine.devices import check_precision, check_sharding, distribute, evaluation_autocast, training_dtype
from dimaskdino.errors import ConfigError
from tests.tiny_model import tiny_cfg, tiny_model, train_batch

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40]]


def with_amp(cfg: Config, dtype: str) -> Config:
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype])
    return cfg


def test_bfloat16_reaches_the_backbone_and_no_weight() -> None:
    model, seen = tiny_model(DROPOUT=0.0).train(), {}
    for name in ("backbone.convs.3", "sem_seg_head.pixel_decoder.layers.0", "sem_seg_head.predictor.layers.0"):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.dtype))
    step = TrainStep(
        model=model,
        data_loader=[train_batch(BOXES, BOXES[:1])],
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        clipper=GradientClipper(clip_type="full_model", limit=1.0),
        autocast_to=torch.bfloat16,
    )
    before = [p.detach().clone() for p in model.parameters()]
    with EventStorage() as storage:
        step.run_step()
    assert seen["backbone.convs.3"] == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not step._scaler.is_enabled()
    assert storage.latest()["total_loss"][0] > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_bfloat16_gradient_that_is_not_finite_stops() -> None:
    line = nn.Linear(1, 1)
    line.forward = lambda batch: {"loss": line.weight.sum()}
    line.weight.register_hook(lambda gradient: gradient * torch.inf)
    options = {"optimizer": torch.optim.SGD(line.parameters(), lr=1.0), "data_loader": [[{}]]}
    clipper = GradientClipper(clip_type="full_model", limit=1.0)
    step = TrainStep(model=line, clipper=clipper, autocast_to=torch.bfloat16, **options)
    with EventStorage(), pytest.raises(FloatingPointError, match="grad_norm"):
        step.run_step()


def test_only_bfloat16_is_used_on_a_cpu_and_in_evaluation(toy_cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    assert training_dtype(toy_cfg) is None
    with caplog.at_level(logging.INFO):
        assert training_dtype(with_amp(toy_cfg, "float16")) is None
    assert "SOLVER.AMP.DTYPE bfloat16" in caplog.text
    with evaluation_autocast(toy_cfg):
        assert not torch.is_autocast_enabled("cpu")
    with_amp(toy_cfg, "bfloat16")
    assert training_dtype(toy_cfg) is torch.bfloat16
    with evaluation_autocast(toy_cfg):
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        assert torch.is_autocast_enabled("cpu")


def test_run_in_bfloat16_trains_and_evaluates(toy_cfg: Config) -> None:
    toy_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()])
    trainer = Trainer(with_amp(toy_cfg, "bfloat16"))
    seen = set()
    trainer.model.backbone.register_forward_hook(lambda module, inputs, out: seen.add((module.training, out.dtype)))
    trainer.train()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.AMP\.DTYPE is 'fp16'.*float16, bfloat16"):
        check_precision(with_amp(tiny_cfg(), "fp16"))


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.COMPILE", ["encoder"]), ("MODEL.CHANNELS_LAST", True), ("SOLVER.NONFINITE", "skip")]
)
def test_keys_that_do_not_go_together_are_refused(key: str, value: object, toy_cfg: Config) -> None:
    toy_cfg.merge_from_list(["SOLVER.SHARDING", "full", key, value])
    with pytest.raises(ConfigError, match=rf"SOLVER\.SHARDING full does not go with {key}"):
        check_sharding(toy_cfg)
    toy_cfg.SOLVER.SHARDING = "optimizer"
    check_sharding(toy_cfg)


def test_loss_scaling_and_unknown_values_are_refused(toy_cfg: Config) -> None:
    toy_cfg.merge_from_list(["SOLVER.SHARDING", "full", "SOLVER.AMP.ENABLED", True])
    with pytest.raises(ConfigError, match="AMP.DTYPE to bfloat16"):
        check_sharding(toy_cfg)
    toy_cfg.SOLVER.SHARDING = "zero"
    with pytest.raises(ConfigError, match=r"SOLVER\.SHARDING"):
        check_sharding(toy_cfg)


def test_one_process_shares_nothing_out(toy_cfg: Config) -> None:
    toy_cfg.SOLVER.SHARDING = "full"
    model = nn.Linear(1, 1)
    assert distribute(toy_cfg, model) is model
