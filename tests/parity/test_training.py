"""Losses and gradients are those of the releases, and bfloat16 stays near."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor

from dimaskdino.checkpoint.names import our_name
from tests.parity.recorded import NAMES, OUTPUT_SIZE, images, model, recorded, training_batch

# What was recorded, under which prefix, and the keys that differ from the release's.
CASES = {
    **{name: (name, "train", {}) for name in NAMES},
    "stuff without boxes": ("maskdino_panoptic_tiny", "train_box", {"PANO_BOX_LOSS": True}),
}


class Run:
    """One training step without the update."""

    def __init__(self, case: str) -> None:
        name, _, keys = CASES[case]
        net = model(name, **keys).train()
        net.sem_seg_head.predictor.register_forward_hook(lambda _m, _i, output: setattr(self, "decoded", output))
        losses = net(training_batch(name))
        total = sum(losses.values())
        total.backward()
        self.losses: dict[str, float] = {key: value.item() for key, value in losses.items()}
        self.total: float = total.item()
        self.gradients: dict[str, Tensor] = {
            key: parameter.grad for key, parameter in net.named_parameters() if parameter.grad is not None
        }


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {case: Run(case) for case in CASES}


def our_loss(name: str) -> str:
    """oldm_loss_ce_1 is ours as loss_ce_di_1."""
    if not name.startswith("oldm_"):
        return name
    term, index = name.removeprefix("oldm_").rsplit("_", 1)
    return f"{term}_di_{index}"


def of(case: str, array: str) -> np.ndarray:
    """A recorded array of a case."""
    name, prefix, _ = CASES[case]
    return recorded(name)[f"{prefix}/{array}"]


def recorded_losses(case: str) -> dict[str, float]:
    return {
        our_loss(str(key)): float(value)
        for key, value in zip(of(case, "loss_names"), of(case, "loss_values"), strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_the_loss_terms_are_the_recorded_ones(runs, case):
    assert set(runs[case].losses) == set(recorded_losses(case))


@pytest.mark.parametrize("case", CASES)
def test_every_weighted_term_is_the_same(runs, case):
    # Without noise, loss_bbox_dn_0 and loss_giou_dn_0 compare boxes with themselves and hold nothing but rounding,
    # which differs between CPUs; the absolute floor allows for it.
    different = {
        key: (runs[case].losses[key], value)
        for key, value in recorded_losses(case).items()
        if not math.isclose(runs[case].losses[key], value, rel_tol=1e-4, abs_tol=1e-6)
    }
    assert not different


@pytest.mark.parametrize("case", CASES)
def test_the_total_is_the_same(runs, case):
    assert runs[case].total == pytest.approx(float(of(case, "total")), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_same_parameters_get_gradients_of_the_same_norm(runs, case):
    expected = {
        our_name(str(key)): float(value)
        for key, value in zip(of(case, "grad_names"), of(case, "grad_norms"), strict=True)
    }
    norms = {key: gradient.norm().item() for key, gradient in runs[case].gradients.items()}
    assert set(norms) == set(expected)
    different = {
        key: (norms[key], value) for key, value in expected.items() if not math.isclose(norms[key], value, rel_tol=1e-3)
    }
    assert not different


@pytest.mark.parametrize("case", CASES)
def test_the_last_layer_predicts_the_same_in_training(runs, case):
    final = runs[case].decoded.stages[-1]
    for ours, key in ((final.logits, "pred_logits"), (final.boxes, "pred_boxes")):
        theirs: np.ndarray = of(case, f"final/{key}")
        torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), rtol=0, atol=1e-4)


BFLOAT16_NAMES = ("maskdino_tiny", "dimaskdino_tiny", "maskdino_panoptic_tiny")
FEATURES, TOKENS, SEMANTIC = 0.02, 0.02, 0.04  # of the norm
PIXELS = 0.99  # share with the same class
BEST, FOUND, IOU, SCORE = 10, 8, 0.5, 0.05


def run(name: str, form: str) -> dict[str, Any]:
    """Features, tokens and results of one image in float32, under ``autocast``, or with ``weights`` in bfloat16."""
    net = model(name).eval()
    if form == "weights":
        pixels = net.pixel_mean, net.pixel_std
        net.bfloat16()
        net.pixel_mean, net.pixel_std = pixels
    found: dict[str, Any] = {}
    net.backbone.register_forward_hook(lambda _m, _i, output: found.update(output))
    net.sem_seg_head.pixel_decoder.register_forward_hook(lambda _m, _i, output: found.update(levels=output.levels))
    height, width = OUTPUT_SIZE
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "autocast"):
        (result,) = net([{"image": images(name)[0], "height": height, "width": width}])
    return {**found, **result}


def difference(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other).norm() / other.norm()).item()


def found_again(ours: Instances, theirs: Instances) -> int:
    """How many of the best of ``theirs`` are among ``ours``, with the same class and about the same box and score."""
    best = theirs[:BEST]
    same = pairwise_iou(best.pred_boxes, ours.pred_boxes) >= IOU
    same &= best.pred_classes[:, None] == ours.pred_classes
    same &= (best.scores[:, None] - ours.scores.float()).abs() <= SCORE
    return int(same.any(1).sum())


@pytest.mark.parametrize("name", BFLOAT16_NAMES)
def test_bfloat16_finds_what_float32_finds(name: str) -> None:
    expected = run(name, "float32")
    for form in ("autocast", "weights"):
        found = run(name, form)
        for feature in ("res2", "res3", "res4", "res5"):
            assert 0 < difference(found[feature], expected[feature]) <= FEATURES
        for ours, theirs in zip(found["levels"], expected["levels"], strict=True):
            assert difference(ours, theirs) <= TOKENS
        assert found_again(found["instances"], expected["instances"]) >= FOUND
        if "sem_seg" in expected:
            assert difference(found["sem_seg"], expected["sem_seg"]) <= SEMANTIC
            agree = found["sem_seg"].argmax(0) == expected["sem_seg"].argmax(0)
            assert agree.float().mean() >= PIXELS
