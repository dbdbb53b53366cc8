"""A head, a loss, a cost and annotation fields of a user's own, as in docs/examples/attribute_head.py."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torch import Tensor, nn

from dimaskdino.config import Config
from dimaskdino.config.reader import _REGISTERED
from dimaskdino.data import build_train_loader
from dimaskdino.data.datasets.registration import register_coco_format
from dimaskdino.engine import Trainer
from dimaskdino.engine.setup import _check_model
from dimaskdino.errors import ConfigError
from dimaskdino.evaluation import EVALUATOR_REGISTRY, ImageEvaluator, check_evaluators
from dimaskdino.evaluation.segmentation import EvaluatorGroup
from dimaskdino.modeling.registry import COST_REGISTRY, HEAD_REGISTRY, LOSS_REGISTRY
from tests.documentation import REPOSITORY
from tests.tiny_model import TINY_DINO, predict, tiny_cfg, tiny_model, train_batch

EXAMPLE = REPOSITORY / "docs" / "examples" / "attribute_head.py"
OWN = {
    "INPUT.ANNOTATION_FIELDS": ["occluded"],
    "MODEL.EXTRA_HEADS": ["Occlusion"],
    "MODEL.EXTRA_LOSSES": ["OcclusionLoss"],
    "TEST.EVALUATORS": ["OcclusionAccuracy"],
    "MODEL.OCCLUSION.LEAST_IOU": 0.0,
}


class FarCost:
    """Makes every pair as dear as the object's number, or gives one column alone."""

    def __init__(self, cfg: Config) -> None:
        self.columns = slice(0, 1) if cfg.SEED == 1 else slice(None)

    def __call__(self, stages: list, image: int, target: object) -> Tensor:
        queries = sum(stage.logits.shape[1] for stage in stages)
        return torch.arange(len(target)).float().repeat(queries, 1)[:, self.columns]


class NoEvaluator:
    """Has nothing of an evaluator."""


class BadHead(nn.Module):
    """Gives one number for all queries, or what a test says."""

    give = staticmethod(torch.mean)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()

    def forward(self, queries: Tensor) -> Tensor:
        return self.give(queries)


class BadLoss:
    """Gives a number in place of one for each stage, or what a test says."""

    names, needs_masks, given = ("loss_bad",), False, {"loss_bad": torch.ones(1)}

    def __init__(self, cfg: Config) -> None:
        pass

    def __call__(self, stages: object) -> object:
        return self.given


class NoPart:
    """Takes other arguments than any part is given, or cannot be called."""

    names, needs_masks = ("loss_none",), False

    def __init__(self, *given: object, other: int = 0) -> None:
        self.number = 1 / other if len(given) > 1 else other


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[None]:
    """Import the example; what it registers is forgotten afterwards."""
    registries = (HEAD_REGISTRY, LOSS_REGISTRY, COST_REGISTRY, EVALUATOR_REGISTRY)
    before, keys = [dict(each._obj_map) for each in registries], dict(_REGISTERED)
    importlib.import_module("docs.examples.attribute_head")
    COST_REGISTRY.register(FarCost)
    LOSS_REGISTRY.register(BadLoss)
    HEAD_REGISTRY.register(BadHead)
    for registry in (HEAD_REGISTRY, LOSS_REGISTRY, COST_REGISTRY):
        registry.register(NoPart)
    EVALUATOR_REGISTRY.register(NoEvaluator)
    yield
    del sys.modules["docs.examples.attribute_head"]
    for registry, content in zip(registries, before, strict=True):
        registry._obj_map = content
    _REGISTERED.clear()
    _REGISTERED.update(keys)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[None]:
    """Two images with two objects each, one of which does not say whether it is occluded."""
    annotations = []
    for number in (1, 2):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        for index, extra in enumerate(({"occluded": number - 1}, {})):
            left = 10 + 20 * index
            polygon = [left, 10, left + 16, 10, left + 16, 30, left, 30]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": index, "area": 320, "iscrowd": 0}
                | {"bbox": [left, 10, 16, 20], "segmentation": [polygon], **extra}
            )
    images = [{"id": number, "file_name": f"{number}.png", "height": 48, "width": 64} for number in (1, 2)]
    names = [f"class {number}" for number in range(5)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    register_coco_format("occluded_things", tmp_path / "labels.json", tmp_path, names)
    yield
    DatasetCatalog.remove("occluded_things")
    MetadataCatalog.remove("occluded_things")


def options(tmp_path: Path) -> dict:
    return OWN | {
        "DATASETS.TRAIN": ("occluded_things",),
        "DATASETS.TEST": ("occluded_things",),
        "OUTPUT_DIR": str(tmp_path / "run"),
        "INPUT.IMAGE_SIZE": 64,
        "INPUT.MIN_SIZE_TEST": 48,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": (),
        "DATALOADER.NUM_WORKERS": 0,
        "SEED": 3,
    }


def test_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 150


def test_attribute_is_trained_and_scored(data: None, tmp_path: Path) -> None:
    cfg = tiny_cfg(options(tmp_path))
    trainer = Trainer(cfg)
    head = trainer.model.sem_seg_head.predictor.heads.extra["Occlusion"]
    before = head[0].weight.detach().clone()
    results = trainer.train()
    assert not torch.equal(head[0].weight, before)
    assert set(results) >= {"bbox", "segm", "OcclusionAccuracy"}
    assert 0 <= results["OcclusionAccuracy"]["accuracy"] <= 100
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    names = {name for name in records[-1] if name.startswith("loss_occlusion")}
    assert names == {name.replace("loss_ce", "loss_occlusion") for name in records[-1] if name.startswith("loss_ce")}


def test_fields_reach_the_targets(data: None, tmp_path: Path) -> None:
    batch = next(iter(build_train_loader(tiny_cfg(options(tmp_path)))))
    for image in batch:
        values = dict(zip(image["instances"].gt_classes.tolist(), image["instances"].gt_occluded.tolist(), strict=True))
        assert values.get(0, image["image_id"] - 1) == image["image_id"] - 1
        assert math.isnan(values.get(1, math.nan))


@pytest.mark.parametrize("model", [{}, TINY_DINO], ids=["DI-MaskDINO", "DINO"])
def test_loss_and_result_of_a_head(model: dict) -> None:
    net = tiny_model(model | OWN)
    batch = train_batch([[4, 4, 30, 40], [20, 10, 60, 44]], [])
    batch[0]["instances"].gt_occluded = torch.tensor([1.0, math.nan])
    losses = net.train()(batch)
    last = losses["loss_occlusion"]
    assert last > 0
    assert losses["loss_occlusion_dn"].isfinite()
    (gradient,) = torch.autograd.grad(last, [next(_extra(net).parameters())])
    assert gradient.abs().sum() > 0
    batch[0]["instances"].gt_occluded[:] = math.nan
    assert net(batch)["loss_occlusion"] == 0
    (found,) = predict(net.eval(), batch[0]["image"])
    assert found.pred_Occlusion.shape == (len(found), 1)


def _extra(net: torch.nn.Module) -> torch.nn.Module:
    heads = net.sem_seg_head.predictor.heads
    return (heads[0] if isinstance(heads, torch.nn.ModuleList) else heads).extra


def test_model_without_own_parts_has_the_same_weights() -> None:
    assert not [name for name in tiny_model().state_dict() if "extra" in name]


def test_own_cost_decides_the_matching() -> None:
    net = tiny_model({"MODEL.EXTRA_COSTS": ["FarCost"]})
    assert type(net.criterion.matcher.costs[-1]).__name__ == "FarCost"
    net.train()(train_batch([[4, 4, 30, 40], [20, 10, 60, 44]], []))


def test_parts_of_wrong_shapes_are_named() -> None:
    batch = train_batch([[4, 4, 30, 40], [20, 10, 60, 44]], [])
    with pytest.raises(ConfigError, match=r"FarCost.*\(\d+, 1\).*\(\d+, 2\)"):
        tiny_model({"MODEL.EXTRA_COSTS": ["FarCost"], "SEED": 1}).train()(batch)
    with pytest.raises(ConfigError, match=r"BadLoss.*loss_bad"):
        tiny_model({"MODEL.EXTRA_LOSSES": ["BadLoss"]}).train()(batch)
    for name, value, message in (
        ("names", ("loss_mask",), "BadLoss.*loss_mask"),
        ("names", "loss_bad", "BadLoss.*'loss_bad'"),
        ("needs_masks", None, "needs_masks"),
        ("given", None, "BadLoss gives NoneType"),
        ("given", {"loss_bad": 1.0}, r"BadLoss gives {'loss_bad': 1\.0}"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(BadLoss, name) if name == "needs_masks" else patch.setattr(BadLoss, name, value)
            with pytest.raises(ConfigError, match=message):
                tiny_model({"MODEL.EXTRA_LOSSES": ["BadLoss"]}).train()(batch)
    for key, message in (
        ("HEADS", r"EXTRA_HEADS: .*NoPart cannot be made\. .*test_own_parts\.py, line \d+: ZeroDivisionError"),
        ("LOSSES", "EXTRA_LOSSES: NoPart has no __call__"),
        ("COSTS", "EXTRA_COSTS: NoPart has no __call__"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_model({f"MODEL.EXTRA_{key}": ["NoPart"]})
    with pytest.raises(ConfigError, match=r"MODEL\.EXTRA_HEADS: BadHead gives \(\)"):
        tiny_model({"MODEL.EXTRA_HEADS": ["BadHead"]}).train()(batch)
    _check_model(tiny_cfg(OWN), train=False)
    for give, message in (
        (torch.mean, r"\(\)"),
        (lambda queries: (queries,), "tuple"),
        (lambda queries: queries[:, 1:], "36"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BadHead, "give", staticmethod(give))
            with pytest.raises(ConfigError, match=rf"BadHead gives .*{message}.* for queries"):  # before any data
                _check_model(tiny_cfg({"MODEL.EXTRA_HEADS": ["BadHead"]}), train=False)
    with pytest.raises(ConfigError, match=r"MODEL\.EXTRA_HEADS.*Oclusion.*Occlusion"):
        tiny_model({"MODEL.EXTRA_HEADS": ["Oclusion"]})
    with pytest.raises(ConfigError, match=r"occluded.*INPUT\.ANNOTATION_FIELDS"):
        tiny_model({key: value for key, value in OWN.items() if "EXTRA" in key}).train()(batch)


def test_evaluators_of_another_form_are_named(data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "NoMeasure": (type("NoMeasure", (ImageEvaluator,), {}), "has no measure"),
        "Short": (lambda cfg: None, "takes no"),
        "NoEvaluator": (NoEvaluator, "has no reset"),
    }
    for name, (build, message) in given.items():
        monkeypatch.setitem(EVALUATOR_REGISTRY._obj_map, name, build)
        with pytest.raises(ConfigError, match=rf"TEST\.EVALUATORS {name} .* {message}"):
            check_evaluators(tiny_cfg({"TEST.EVALUATORS": [name]}))
    evaluator = ImageEvaluator(tiny_cfg(), "occluded_things", "")
    for measured in ([1.0], {"dice": "0.5"}, {1: 0.5}, {"dice": torch.ones(2)}, None):
        monkeypatch.setattr(evaluator, "measure", lambda *given, measured=measured: measured)
        with pytest.raises(ConfigError, match=r"TEST\.EVALUATORS: measure of .*ImageEvaluator gives"):
            evaluator.process([{"image_id": 1, "height": 48, "width": 64}], [{}])


@pytest.mark.parametrize(
    "scores", [{"x": {"y": "text"}}, [1.0], 0.5, {3: {"a": 1}}, {"x": {"y": torch.ones(2)}}, {"x": "y"}]
)
def test_scores_that_no_file_holds_are_named(scores: object) -> None:
    def evaluated(*given: object) -> dict:
        parts = [type("Own", (NoEvaluator,), {"evaluate": lambda self, each=each: each})() for each in given]
        return EvaluatorGroup(parts).evaluate()

    with pytest.raises(ConfigError, match=r"TEST\.EVALUATORS: evaluate of .*Own gives"):
        evaluated(scores)
    with pytest.raises(ConfigError, match="Own.* x, .*another name"):
        evaluated({"x": {}}, {"x": {}})
    assert json.dumps(evaluated({"x": {"y": np.float32(3)}, "z": torch.tensor(1)})) == '{"x": {"y": 3.0}, "z": 1}'
