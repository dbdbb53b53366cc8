"""DINO predicts, and starts training from, what its release and detrex do with the same weights."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dimaskdino.structures import DecoderOutput, StagePrediction
from tests.parity.dino import (
    NAMES,
    assert_close,
    draws,
    images,
    model,
    our_loss,
    our_names,
    our_stage,
    recorded,
    training_batch,
)

EVALUATIONS = [(name, case) for name in NAMES for case in ("eval", "odd", "pad") if f"{case}/tokens" in recorded(name)]
TRAININGS = [
    (name, case)
    for name in NAMES
    for case in ("train", "padtrain", "emptytrain", "nonetrain")
    if f"{case}/loss_names" in recorded(name)
]


def recorded_stages(name: str, case: str) -> Iterator[tuple[str, str]]:
    """Each recorded stage's name there and here."""
    for key in recorded(name):
        if key.startswith(f"{case}/") and key.endswith("/pred_logits") and key.count("/") == 2:
            yield key.split("/")[1], our_stage(key.split("/")[1])


class Evaluation:
    """A batch through a model, and what came out on the way."""

    def __init__(self, name: str, case: str) -> None:
        net = model(name).eval()
        net.sem_seg_head.pixel_decoder.register_forward_hook(lambda _m, _i, out: setattr(self, "encoded", out))
        net.sem_seg_head.predictor.register_forward_hook(lambda _m, _i, out: setattr(self, "decoded", out))
        with torch.no_grad():
            self.results = net(images(name, case))
        self.stages: dict[str, StagePrediction] = {stage.name: stage for stage in self.decoded.stages}


class Step:
    """One training step without the update."""

    def __init__(self, name: str, case: str) -> None:
        net = model(name).train()
        net.sem_seg_head.predictor.denoising.draws = draws(name, case)
        net.sem_seg_head.predictor.register_forward_hook(lambda _m, _i, out: setattr(self, "decoded", out))
        self.losses: dict[str, Tensor] = net(training_batch(name, case))
        sum(self.losses.values()).backward()
        self.gradients = {key: each.grad for key, each in net.named_parameters() if each.grad is not None}
        self.decoded: DecoderOutput


@pytest.fixture(scope="module")
def evaluations() -> dict[tuple[str, str], Evaluation]:
    return {pair: Evaluation(*pair) for pair in EVALUATIONS}


@pytest.fixture(scope="module")
def steps() -> dict[tuple[str, str], Step]:
    return {pair: Step(*pair) for pair in TRAININGS}


@pytest.mark.parametrize(("name", "case"), EVALUATIONS)
def test_encoder_tokens_on_the_image_are_the_same(evaluations, name, case):
    encoded = evaluations[name, case].encoded
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in encoded.levels], dim=1)[:, ::7, ::16]
    theirs = torch.from_numpy(recorded(name)[f"{case}/tokens"])
    if encoded.valid is not None:
        on_image = ~encoded.valid.is_padding[:, ::7]
        tokens, theirs = tokens[on_image], theirs[on_image]
    assert (case == "pad") == (encoded.valid is not None)
    assert_close(tokens, theirs.numpy())


@pytest.mark.parametrize(("name", "case"), EVALUATIONS)
def test_every_stage_predicts_the_same(evaluations, name, case):
    ours = evaluations[name, case].stages
    for theirs, stage in recorded_stages(name, case):
        assert_close(ours[stage].logits, recorded(name)[f"{case}/{theirs}/pred_logits"])
        assert_close(ours[stage].boxes, recorded(name)[f"{case}/{theirs}/pred_boxes"])


@pytest.mark.parametrize(("name", "case"), EVALUATIONS)
def test_detections_are_the_same_in_the_same_order(evaluations, name, case):
    data = recorded(name)
    for index, result in enumerate(evaluations[name, case].results):
        key = f"{case}/instances{index if case == 'pad' else ''}"
        boxes = torch.from_numpy(data[f"{key}/boxes"])
        if name.startswith("detrex"):
            result["instances"].pred_boxes.clip(result["instances"].image_size)
        torch.testing.assert_close(result["instances"].pred_boxes.tensor, boxes, rtol=0, atol=0.05)
        assert_close(result["instances"].scores, data[f"{key}/scores"])
        assert result["instances"].pred_classes.tolist() == data[f"{key}/classes"].tolist()


@pytest.mark.parametrize(("name", "case"), TRAININGS)
def test_every_weighted_loss_is_the_same(steps, name, case):
    data, losses = recorded(name), steps[name, case].losses
    expected = {
        our_loss(str(key)): float(value)
        for key, value in zip(data[f"{case}/loss_names"], data[f"{case}/loss_values"], strict=True)
    }
    assert set(losses) == set(expected)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize(("name", "case"), TRAININGS)
def test_every_gradient_has_the_same_norm(steps, name, case):
    data, ours = recorded(name), steps[name, case].gradients
    norms = zip(data[f"{case}/grad_names"], data[f"{case}/grad_norms"], strict=True)
    names = our_names(name)
    expected = {names[str(key)]: float(norm) for key, norm in norms}
    assert set(ours) == set(expected)
    different = {
        key: (ours[key].norm().item(), norm)
        for key, norm in expected.items()
        if not math.isclose(ours[key].norm().item(), norm, rel_tol=1e-3)
    }
    assert not different


@pytest.mark.parametrize(("name", "case"), [pair for pair in TRAININGS if f"{pair[1]}/dn/boxes" in recorded(pair[0])])
def test_denoising_queries_are_the_recorded_ones(steps, name, case):
    data, denoising = recorded(name), steps[name, case].decoded.denoising
    assert denoising.num_groups == int(data[f"{case}/dn/groups"])
    assert denoising.num_queries == int(data[f"{case}/dn/pad_size"])
    # Sizes below 0.001 are lifted to it by the inverse sigmoid.
    assert_close(denoising.tokens.boxes, data[f"{case}/dn/boxes"].clip(1e-3, 1 - 1e-3), 1e-5)
    if f"{case}/dn/attn_mask_packed" in data:
        size = int(data[f"{case}/dn/attn_mask_size"])
        unseen = np.unpackbits(data[f"{case}/dn/attn_mask_packed"], axis=-1)[:, :size].astype(bool)
        num_matching = size - denoising.num_queries
        assert torch.equal(denoising.attention_mask(num_matching), torch.from_numpy(unseen[:-num_matching]))
        assert (unseen[-num_matching:] == (np.arange(size) < denoising.num_queries)).all()
    noised = steps[name, case].decoded.denoising_stages[-1]
    assert_close(noised.logits, data[f"{case}/dn/final/pred_logits"])
    assert_close(noised.boxes, data[f"{case}/dn/final/pred_boxes"])


@pytest.mark.parametrize(
    ("name", "case"), [pair for pair in TRAININGS if f"{pair[1]}/final/pred_boxes" in recorded(pair[0])]
)
def test_matching_queries_predict_the_same_in_training(steps, name, case):
    stages = {stage.name: stage for stage in steps[name, case].decoded.stages}
    for theirs, stage in recorded_stages(name, case):
        assert_close(stages[stage].logits, recorded(name)[f"{case}/{theirs}/pred_logits"])
        assert_close(stages[stage].boxes, recorded(name)[f"{case}/{theirs}/pred_boxes"])
