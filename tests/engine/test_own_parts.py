"""Hooks and evaluators of a user's own, as the documentation shows them."""

import json
from pathlib import Path

import pytest

from dimaskdino.config import Config
from dimaskdino.engine import HOOK_REGISTRY, Trainer, evaluate
from dimaskdino.engine.hooks import build_own_hooks
from dimaskdino.errors import ConfigError
from dimaskdino.evaluation import EVALUATOR_REGISTRY, build_evaluator

pytestmark = pytest.mark.usefixtures("own_parts")


def results_of(folder: str) -> dict:
    return json.loads((Path(folder) / "inference" / "results.json").read_text())


def test_own_parts_are_in_the_files_of_a_run(toy_cfg: Config) -> None:
    toy_cfg.merge_from_list(["TEST.EVALUATORS", ["Dice"], "SOLVER.HOOKS", ["CountObjects"], "SOLVER.MAX_ITER", 2])
    toy_cfg.merge_from_list(["SOLVER.STEPS", (), "TEST.BEST_METRIC", "Dice/dice"])
    Trainer(toy_cfg).train()
    trained = results_of(toy_cfg.OUTPUT_DIR)
    assert 0 < trained["Dice"]["dice"] < 100
    assert trained["bbox"].keys() >= {"AP"}
    records = (Path(toy_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    written = {name: value for record in records for name, value in json.loads(record).items()}
    assert written["images_seen"] == 2 * toy_cfg.SOLVER.IMS_PER_BATCH
    assert written["Dice/dice"] == trained["Dice"]["dice"]
    assert evaluate(toy_cfg, resume=True)["Dice"] == trained["Dice"]


def test_dice_counts_pixels(toy_cfg: Config, tmp_path: Path) -> None:
    import torch
    from detectron2.structures import Instances

    dice = EVALUATOR_REGISTRY.get("Dice")(toy_cfg, "shapes_val", str(tmp_path))
    image = next(iter(dice._entries.values()))
    truth = dice.truth(image).gt_masks.tensor
    found = Instances((64, 64), scores=torch.tensor([0.9, 0.1]), pred_masks=torch.ones(2, 64, 64, dtype=torch.bool))
    found.pred_masks[0, :, :32] = False
    true = truth.any(0)
    expected = 200 * float(true[:, 32:].sum()) / (float(true.sum()) + 64 * 32)
    dice.process([image], [{"instances": found}])
    assert dice.evaluate()["Dice"]["dice"] == pytest.approx(expected)


def test_mistakes_in_own_parts_are_named(toy_cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_cfg.merge_from_list(["SOLVER.HOOKS", ["CountObject"], "TEST.EVALUATORS", ["Dcie"]])
    with pytest.raises(ConfigError, match=r"SOLVER\.HOOKS.*CountObject.*CountObjects"):
        build_own_hooks(toy_cfg)
    with pytest.raises(ConfigError, match=r"TEST\.EVALUATORS.*Dcie.*Dice"):
        build_evaluator(toy_cfg, "shapes_val", str(tmp_path))
    toy_cfg.TEST.EVALUATORS = ["Dice", "Dice"]
    with pytest.raises(ConfigError, match="Dice.*once"):
        build_evaluator(toy_cfg, "shapes_val", str(tmp_path))
    toy_cfg.SOLVER.HOOKS = ["NoHook"]
    for build, said in (
        (lambda cfg: 3, "NoHook.*int"),
        (lambda: 3, "cannot be made.*argument"),
        (lambda cfg: 1 / 0, "line .*Zero"),
    ):
        monkeypatch.setitem(HOOK_REGISTRY._obj_map, "NoHook", build)
        with pytest.raises(ConfigError, match=said):
            build_own_hooks(toy_cfg)
