"""Frozen parameters keep their values in training."""

import torch

from dimaskdino.config import Config
from dimaskdino.engine import Trainer


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
