"""The parts under docs/examples work as a user would load them."""

import importlib

import pytest
import torch
from torch import Tensor, nn

from dimaskdino.command_line import import_modules
from dimaskdino.modeling.meta_arch import build_model
from dimaskdino.structures import highest_scores
from tests.documentation import REPOSITORY
from tests.tiny_model import image, sample, tiny_cfg

OPTIONS = {
    "guidance_by_class": {"MODEL.MaskDINO.BATO.NAME": "GuidanceByClass"},
    "pyramid_encoder": {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "PyramidEncoder"},
}
EXAMPLES = sorted(OPTIONS)


@pytest.fixture(autouse=True)
def imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    import_modules([f"docs.examples.{name}" for name in EXAMPLES])


def part_of(model: nn.Module, name: str) -> nn.Module:
    head = model.sem_seg_head
    return {"guidance_by_class": head.predictor.bato, "pyramid_encoder": head.pixel_decoder}[name]


@pytest.mark.parametrize("order", ["low2high", "high2low"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_built_by_its_key_trains_and_predicts(name: str, order: str) -> None:
    torch.manual_seed(0)
    options = OPTIONS[name] | {"MODEL.SEM_SEG_HEAD.FEATURE_ORDER": order}
    model = build_model(tiny_cfg(options)).train()
    part = part_of(model, name)
    assert type(part).__module__ == f"docs.examples.{name}"
    before = {key: value.clone() for key, value in part.named_parameters()}
    sum(model([sample(64, 96, [[0, 0, 32, 32], [40, 8, 90, 60]])]).values()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert [key for key, value in part.named_parameters() if torch.equal(value, before[key])] == []
    assert len(model.eval()([{"image": image(64, 96)}])[0]["instances"]) == 6


@pytest.mark.parametrize(("num_guiding", "expected"), [(1, [0]), (2, [0, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3])])
def test_best_query_of_each_class_guides_before_second_best(num_guiding: int, expected: list[int]) -> None:
    # Three queries of class 0, of which the last two are close, and a weak one of class 1.
    scores = torch.tensor([[[9.0, 0.0], [8.0, 0.0], [7.0, 0.0], [-6.0, -5.0]]])
    example = importlib.import_module("docs.examples.guidance_by_class")
    bato = example.GuidanceByClass(tiny_cfg(NUM_GUIDING_TOKENS=num_guiding))
    assert sorted(bato.choose_guides(scores)[0].tolist()) == expected
    assert num_guiding != 2 or sorted(highest_scores(scores, 2)[0].tolist()) == [0, 1]


def test_the_pyramid_makes_the_levels_that_the_decoder_expects() -> None:
    model = build_model(tiny_cfg(OPTIONS["pyramid_encoder"]))
    features: dict[str, Tensor] = model.backbone(image(64, 96)[None])
    encoded = model.sem_seg_head.pixel_decoder(features)
    assert [tuple(level.shape[-2:]) for level in encoded.levels] == [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert encoded.mask_features.shape[-2:] == (16, 24)
