"""Selections of tokens, heads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dimaskdino.modeling.transformer_decoder import PredictionHeads
from dimaskdino.modeling.transformer_decoder.selection import FirstSelection, boxes_of_masks, grid_proposals
from dimaskdino.structures import (
    FeatureTokens,
    MaskLogits,
    Stage,
    StagePrediction,
    Tokens,
    flatten_levels,
    highest_scores,
    take,
)
from tests.tiny_model import DIM, TINY_DINO, encoded, image, sample, scramble, tiny_model

CPU = torch.device("cpu")


def test_proposals_are_centered_on_pixels_and_double_by_level():
    boxes, valid = grid_proposals([(1, 2), (2, 2)], CPU)
    expected = [
        [0.25, 0.5, 0.05, 0.05],
        [0.75, 0.5, 0.05, 0.05],
        [0.25, 0.25, 0.1, 0.1],
        [0.75, 0.25, 0.1, 0.1],
        [0.25, 0.75, 0.1, 0.1],
        [0.75, 0.75, 0.1, 0.1],
    ]
    torch.testing.assert_close(boxes, torch.tensor(expected))
    assert valid.all()


def test_proposals_within_a_hundredth_of_the_border_are_invalid():
    _, valid = grid_proposals([(1, 100)], CPU)
    # Centers at 0.005, 0.015, ..., 0.995: the first and the last are too close.
    assert valid.tolist() == [False, *[True] * 98, False]
    # Sizes of the sixth level: 0.05 * 2^5 = 1.6 is beyond 0.99.
    _, valid = grid_proposals([(1, 1)] * 6, CPU)
    assert valid.tolist() == [True, True, True, True, True, False]


def test_highest_scores_ranks_tokens_by_their_best_class():
    first = [[0.0, 3.0], [5.0, -9.0], [1.0, 1.0], [4.0, 0.0]]
    second = [[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 3.0]]
    logits = torch.tensor([first, second])
    assert highest_scores(logits, 3).tolist() == [[1, 3, 0], [3, 2, 1]]


def test_highest_scores_takes_all_if_there_are_fewer():
    assert highest_scores(torch.tensor([[[1.0], [2.0]]]), 5).tolist() == [[1, 0]]


def test_take_and_gather_pick_rows_per_image():
    values = torch.arange(12.0).view(2, 3, 2)
    index = torch.tensor([[2, 0], [1, 1]])
    assert take(values, index).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
    tokens = Tokens(values, torch.rand(2, 3, 4)).gather(index)
    assert torch.equal(tokens.content, take(values, index))
    assert tokens.boxes.shape == (2, 2, 4)


def mask_logits(masks: torch.Tensor) -> MaskLogits:
    """(Q, h, w) bool masks of one image as a dot product of one-hot embeddings with logits +-1."""
    features = masks.float() * 2 - 1
    return MaskLogits(torch.eye(len(masks))[None], features[None])


def test_boxes_of_masks_are_normalized_and_kept_off_the_ends():
    masks = torch.zeros(3, 4, 8, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[2] = True
    inclusive = boxes_of_masks(mask_logits(masks), inclusive=True)[0]
    # Pixels x 2 to 5 and y 1 to 2: center (3.5 / 8, 1.5 / 4), size (3 / 8, 1 / 4).
    torch.testing.assert_close(inclusive[0], torch.tensor([3.5 / 8, 1.5 / 4, 3 / 8, 1 / 4]))
    # Empty: the far corner without size, kept off 0 and 1 by 1e-5.
    torch.testing.assert_close(inclusive[1], torch.tensor([1 - 1e-5, 1 - 1e-5, 1e-5, 1e-5]), rtol=0, atol=1e-6)
    exclusive = boxes_of_masks(mask_logits(masks), inclusive=False)[0]
    torch.testing.assert_close(exclusive[0], torch.tensor([4 / 8, 2 / 4, 4 / 8, 2 / 4]))
    torch.testing.assert_close(exclusive[1], torch.full((4,), 1e-5), rtol=0, atol=1e-6)
    torch.testing.assert_close(exclusive[2], torch.tensor([0.5, 0.5, 1 - 1e-5, 1 - 1e-5]))


def select(box_type: str = "no", num_selected: int = 5, size: int = 64):
    """A selection with its heads, run on random tokens of one small and one smaller level."""
    torch.manual_seed(0)
    heads = scramble(PredictionHeads(dim=DIM, num_logits=3, mask_dim=DIM))
    selection = scramble(FirstSelection(dim=DIM, initialize_box_type=box_type))
    levels = encoded(size=size).levels[::-1]
    shapes = [tuple(level.shape[-2:]) for level in levels]
    t_i = flatten_levels(levels)[0].requires_grad_()
    mask_features = encoded(size=size).mask_features.requires_grad_()
    t_s1, interm = selection(FeatureTokens(t_i, None, shapes), mask_features, heads, num_selected)
    return t_i, mask_features, shapes, heads, selection, t_s1, interm


@pytest.mark.parametrize("box_type", ["no", "mask2box", "bitmask"])
def test_selected_tokens_are_detached_while_their_prediction_is_not(box_type):
    t_i, mask_features, _, _, _, t_s1, interm = select(box_type)
    assert not t_s1.content.requires_grad
    assert not t_s1.boxes.requires_grad
    assert interm.name == "interm"
    (interm.logits.sum() + interm.boxes.sum() + interm.masks.dense().sum()).backward()
    assert t_i.grad.abs().sum() > 0
    assert mask_features.grad.abs().sum() > 0


def test_the_tokens_with_the_highest_class_logit_are_selected():
    t_i, _, shapes, heads, selection, t_s1, interm = select()
    _, valid = grid_proposals(shapes, CPU)
    tokens = selection.norm(selection.proj(torch.where(valid[:, None], t_i, 0.0)))
    scores = heads.class_embed(tokens).max(-1).values
    chosen = scores.topk(5, dim=1).indices
    torch.testing.assert_close(t_s1.content, take(tokens, chosen))
    # Supervised through the shared head: the class logits are of the normed token.
    torch.testing.assert_close(interm.logits, heads.class_embed(heads.norm(take(tokens, chosen))))


def test_no_initialization_keeps_the_predicted_box():
    *_, t_s1, interm = select("no")
    assert torch.equal(t_s1.boxes, interm.boxes)


@pytest.mark.parametrize(("box_type", "inclusive"), [("mask2box", True), ("bitmask", False)])
def test_initialization_replaces_the_box_by_that_of_the_predicted_mask(box_type, inclusive):
    *_, t_s1, interm = select(box_type)
    assert torch.equal(t_s1.boxes, boxes_of_masks(interm.masks, inclusive=inclusive))
    assert not torch.allclose(t_s1.boxes, interm.boxes)


def test_token_without_a_valid_proposal_predicts_ones():
    # Two pixels of a 1 x 100 level lie within a hundredth of the border; all 100 tokens are selected.
    torch.manual_seed(0)
    heads = scramble(PredictionHeads(dim=DIM, num_logits=3, mask_dim=DIM))
    selection = FirstSelection(dim=DIM, initialize_box_type="no")
    _, interm = selection(
        FeatureTokens(torch.randn(1, 100, DIM), None, [(1, 100)]), torch.randn(1, DIM, 4, 4), heads, 100
    )
    assert (interm.boxes == 1).all(-1).sum() == 2
    assert interm.boxes.isfinite().all()


def test_an_invalid_token_does_not_influence_what_is_selected():
    torch.manual_seed(0)
    heads = scramble(PredictionHeads(dim=DIM, num_logits=3, mask_dim=DIM))
    selection = FirstSelection(dim=DIM, initialize_box_type="no")
    t_i, mask_features = torch.randn(1, 100, DIM), torch.randn(1, DIM, 4, 4)
    before, _ = selection(FeatureTokens(t_i, None, [(1, 100)]), mask_features, heads, 10)
    t_i[:, [0, 99]] += 100
    after, _ = selection(FeatureTokens(t_i, None, [(1, 100)]), mask_features, heads, 10)
    assert torch.equal(before.content, after.content)


def test_fewer_tokens_than_asked_for_are_all_selected():
    *_, t_s1, interm = select(num_selected=1000, size=32)
    num_tokens = 4 * 4 + 2 * 2 + 1 + 1  # at strides 8, 16, 32 and 64
    assert t_s1.content.shape == (2, num_tokens, DIM)
    assert interm.boxes.shape == (2, num_tokens, 4)


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
