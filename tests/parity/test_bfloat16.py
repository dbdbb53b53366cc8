"""In bfloat16, by autocast or with all weights in it, models find what they find in float32, within these bounds.

Measured: features differ by 0.005 to 0.010 of their norm, tokens by 0.007 to 0.011, semantic maps by 0.019, and nine of
the ten best objects are found again. Made-up weights choose among tokens whose scores lie close together, so that
rounding chooses a few others.
"""

from typing import Any

import pytest
import torch
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor

from tests.parity.recorded import OUTPUT_SIZE, images, model

NAMES = ("maskdino_tiny", "dimaskdino_tiny", "maskdino_panoptic_tiny")
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


@pytest.mark.parametrize("name", NAMES)
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
