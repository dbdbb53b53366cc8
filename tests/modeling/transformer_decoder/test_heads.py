"""Prediction heads, and more queries than tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dimaskdino.modeling.transformer_decoder import PredictionHeads
from dimaskdino.structures import MaskLogits, Stage, StagePrediction
from tests.tiny_model import DIM, TINY_DINO, image, sample, scramble, tiny_model


def masks(batch: int = 2, queries: int = 5, channels: int = 4) -> MaskLogits:
    return MaskLogits(torch.randn(batch, queries, channels), torch.randn(batch, channels, 6, 7))


def test_dense_masks_are_dot_products_of_embedding_and_features():
    logits = masks()
    expected = (logits.embed[1, 3][:, None, None] * logits.features[1]).sum(0)
    torch.testing.assert_close(logits.dense()[1, 3], expected)


def test_selected_masks_are_those_of_the_dense_ones():
    logits, queries = masks(), torch.tensor([4, 0, 4])
    torch.testing.assert_close(logits.select(1, queries), logits.dense()[1, queries])
    assert logits.select(0, torch.tensor([], dtype=torch.int64)).shape == (0, 6, 7)


def test_split_gives_the_first_queries_to_denoising_and_names_them():
    stage = StagePrediction(Stage("layer", 2), torch.randn(2, 5, 3), torch.rand(2, 5, 4), masks())
    denoising, matching = stage.split(2)
    assert (denoising.name, matching.name) == ("dn.layer.2", "layer.2")
    for part, queries in ((denoising, slice(0, 2)), (matching, slice(2, None))):
        assert torch.equal(part.logits, stage.logits[:, queries])
        assert torch.equal(part.boxes, stage.boxes[:, queries])
        assert torch.equal(part.masks.embed, stage.masks.embed[:, queries])
        assert part.masks.features is stage.masks.features


def test_split_takes_stages_without_masks():
    denoising, matching = StagePrediction(Stage("di"), torch.randn(1, 5, 3), torch.rand(1, 5, 4)).split(2)
    assert denoising.masks is None
    assert matching.masks is None


def test_fresh_heads_predict_the_reference_box():
    heads, boxes = PredictionHeads(dim=8, num_logits=3, mask_dim=4), torch.rand(2, 5, 4)
    torch.testing.assert_close(heads.refine_box(torch.randn(2, 5, 8), boxes), boxes, rtol=0, atol=1e-4)


def test_boxes_are_refined_in_logits():
    heads = PredictionHeads(dim=8, num_logits=3, mask_dim=4)
    with torch.no_grad():
        heads.box_embed.layers[-1].bias.copy_(torch.tensor([1.0, -1.0, 2.0, 0.0]))
    refined = heads.refine_box(torch.randn(1, 1, 8), torch.full((1, 1, 4), 0.5))
    torch.testing.assert_close(refined[0, 0], torch.tensor([1.0, -1.0, 2.0, 0.0]).sigmoid())


def test_predictions_norm_the_content_and_pass_the_boxes_on():
    heads = scramble(PredictionHeads(dim=8, num_logits=3, mask_dim=4))
    content, boxes, features = torch.randn(2, 5, 8), torch.rand(2, 5, 4), torch.randn(2, 4, 6, 7)
    stage = heads(Stage("layer"), content, boxes, features)
    normed = heads.norm(content)
    assert stage.name == "layer.0"
    assert stage.boxes is boxes
    torch.testing.assert_close(stage.logits, heads.class_embed(normed))
    torch.testing.assert_close(stage.masks.embed, heads.mask_embed(normed))
    assert stage.masks.features is features
    assert heads(Stage("di"), content, boxes, None).masks is None


def test_heads_without_masks_predict_classes_and_boxes_alone():
    heads = PredictionHeads(dim=8, num_logits=3, mask_dim=None)
    prediction = heads(Stage("layer"), torch.randn(2, 5, 8), torch.rand(2, 5, 4), torch.randn(2, 4, 6, 7))
    assert prediction.masks is None
    assert not any("mask" in name for name in heads.state_dict())


def test_no_object_does_not_rank_tokens():
    content = torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(0))
    heads = PredictionHeads(dim=DIM, num_logits=3, mask_dim=None, no_object_class=True)
    with torch.no_grad():
        heads.class_embed.weight.zero_()
        # Odds of 3 to 1 between the classes, whatever no object has.
        heads.class_embed.bias.copy_(torch.tensor([3.0, 1.0, 12.0]).log())
    scores = heads.class_scores(content).exp()
    torch.testing.assert_close(scores[0, 0], torch.tensor([3 / 16, 1 / 16]))
    plain = PredictionHeads(dim=DIM, num_logits=3, mask_dim=None)
    torch.testing.assert_close(plain.class_scores(content), plain.class_embed(content))


FEW, MANY = 100, 400
SIDE = 160  # px; 534 tokens, which are more than MANY


class LargestTensors(TorchDispatchMode):
    """Notes the elements of the largest tensor that each operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements[str(func)] = max(self.elements.get(str(func), 0), value.numel())
        return result


def largest(options: dict[str, Any], work: Callable[[torch.nn.Module], object], queries: int) -> dict[str, int]:
    """The elements of the largest tensor of each operation, with this many queries and detections."""
    numbers = {"MODEL.DINO.NUM_QUERIES": queries, "MODEL.MaskDINO.NUM_OBJECT_QUERIES": queries}
    numbers |= {"MODEL.MaskDINO.FIRST_SELECTED_QUERIES": queries, "TEST.DETECTIONS_PER_IMAGE": queries}
    model = tiny_model(options | numbers)
    with LargestTensors() as seen:
        work(model)
    return seen.elements


def train(model: torch.nn.Module) -> None:
    sum(model.train()([sample(SIDE, SIDE, [[4, 4, 30, 40], [20, 10, 60, 44]])]).values()).backward()


def predict(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model([{"image": image(SIDE, SIDE)}])


@pytest.mark.parametrize("work", [train, predict])
@pytest.mark.parametrize("options", [{}, TINY_DINO], ids=["DI-MaskDINO", "DINO"])
def test_no_tensor_grows_faster_than_the_queries(options: dict[str, Any], work: Callable[..., object]) -> None:
    few, many = (largest(options, work, queries) for queries in (FEW, MANY))
    grown = {name: many[name] / count for name, count in few.items() if many.get(name, 0) > count}
    assert {name: ratio for name, ratio in grown.items() if ratio > MANY / FEW} == {}
