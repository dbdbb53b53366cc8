"""Denoising queries padded to a fixed number: the same losses and gradients as without the padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dimaskdino.modeling.transformer_decoder.denoising import ContrastiveDenoising, Denoising
from tests.modeling.transformer_decoder.test_denoising import BOXES, crowd
from tests.tiny_model import DIM, NUM_CLASSES, ONE_STAGE, TINY_DINO, sample, targets, tiny_model

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DI-MaskDINO": ({}, {}, "MODEL.MaskDINO.DN_FIXED_SIZE"),
    "learned queries": (
        {},
        ONE_STAGE | {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"},
        "MODEL.MaskDINO.DN_FIXED_SIZE",
    ),
    "DINO": (TINY_DINO, {}, "MODEL.DINO.DN_FIXED_SIZE"),
}


def losses(kind: str, batch: list[dict[str, Any]], *, fixed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], set]:
    """Losses, gradients, and the numbers of queries that the decoder layers saw."""
    options, node, key = MODELS[kind]
    model, seen = tiny_model(options | {key: fixed}, **node).train(), set()
    for layer in model.sem_seg_head.predictor.layers:
        layer.register_forward_hook(lambda module, inputs, out: seen.add(out.shape[1]))
    torch.manual_seed(5)
    found = model(batch)
    sum(found.values()).backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, seen


def batch(*counts: int) -> list[dict[str, Any]]:
    return [sample(64, 64, BOXES[:count], seed=index) for index, count in enumerate(counts)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_padding_changes_no_loss_and_no_gradient(kind: str, counts: tuple[int, ...]) -> None:
    (plain, gradients, _), (padded, of_padded, _) = (
        losses(kind, batch(*counts), fixed=fixed) for fixed in (False, True)
    )
    assert plain.keys() == padded.keys()
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert gradients.keys() == of_padded.keys()
    for name, gradient in gradients.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(of_padded[name], gradient, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize(("kind", "size"), [("DI-MaskDINO", 10 + 8), ("DINO", 20 + 8)])
def test_every_batch_has_the_same_number_of_queries(kind: str, size: int) -> None:
    for counts in ((3, 1), (2, 2), (0, 0), (1, 0)):
        assert losses(kind, batch(*counts), fixed=True)[2] == {size}


def test_padding_sees_and_is_seen_by_nothing() -> None:
    queries = Denoising(dim=DIM, num_classes=NUM_CLASSES, num_queries=4, noise_scale=0.0, fixed_size=True)(
        targets(BOXES)
    )
    assert (queries.num_padding, queries.num_groups, queries.group_size) == (1, 1, 3)
    assert not queries.tokens.content[:, 0].any()
    masked = queries.attention_mask(2)
    assert masked[1:, 0].all()
    assert masked[0].tolist() == [False, True, True, True, False, False]
    assert masked.shape == (4, 6)
    assert not masked[1:, 1:].any()


def test_contrastive_denoising_takes_as_many_objects_as_fit() -> None:
    options = {"dim": DIM, "num_classes": NUM_CLASSES, "num_queries": 4, "label_noise": 0.0, "box_noise": 0.0}
    for fixed, room in ((False, 9), (True, 4)):
        module = ContrastiveDenoising(negatives=True, fixed_size=fixed, **options)
        queries = module([crowd(9), crowd(2)])
        assert queries.tokens.content.shape[1] == 2 * room
        assert (
            [len(query) for query, _ in queries.matches]
            == [module.num_denoised(9), module.num_denoised(2)]
            == [room, 2]
        )
