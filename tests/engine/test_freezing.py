"""Frozen parameters keep their values in training."""

import pytest
import torch

from dimaskdino.config import Config
from dimaskdino.engine import Trainer, argument_parser
from dimaskdino.engine.setup import load_config
from tests.documentation import REPOSITORY, command


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
