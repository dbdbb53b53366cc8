"""Masks of the asked size in one pass against interpolation step by step."""

import pytest
import torch

from dimaskdino.layers import ms_deform_attn_ops
from dimaskdino.modeling.postprocessing import Frame, MaskRendering
from dimaskdino.modeling.postprocessing import masks as rendering
from dimaskdino.modeling.postprocessing.masks import _direct_taps, resized_masks
from dimaskdino.structures import MaskLogits

pytestmark = pytest.mark.skipif(not ms_deform_attn_ops.LOOPS_COMPILED, reason="the op was built without it")


@pytest.mark.parametrize(
    ("padded", "image", "output"),
    [
        ((64, 96), (64, 96), (64, 96)),
        ((64, 96), (50, 81), (50, 81)),
        ((64, 96), (50, 81), (123, 70)),
        ((32, 32), (31, 17), (7, 200)),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["bitmask", "rle"])
@pytest.mark.parametrize("interpolation", ["direct", "two_step"])
def test_masks_and_qualities_are_those_of_the_steps(padded, image, output, form, interpolation, monkeypatch):
    torch.manual_seed(0)
    predicted = MaskLogits(torch.randn(1, 9, 4), torch.randn(1, 4, padded[0] // 4, padded[1] // 4))
    predicted.embed[0, 3] = 0.0  # an empty mask
    queries, frame = torch.tensor([0, 3, 8, 5]), Frame(padded, image, output)
    make = MaskRendering(format=form, interpolation=interpolation)
    masks, quality = make(predicted, 0, queries, frame)
    monkeypatch.setattr(rendering, "use_loops", lambda logits: False)
    expected, expected_quality = make(predicted, 0, queries, frame)
    if form == "rle":
        assert masks.rles == expected.rles
    else:
        assert torch.equal(masks, expected)
        assert masks[0].any()
        assert not masks[1].any()
    torch.testing.assert_close(quality, expected_quality, rtol=1e-5, atol=1e-6)


def test_one_positive_cell_by_hand():
    logits = torch.full((1, 1, 4), -1.0)
    logits[0, 0, 1] = 1.0
    masks = torch.ones(1, 2, 8, dtype=torch.bool)
    quality = resized_masks(logits, _direct_taps(1, 2, 2, 2), _direct_taps(4, 8, 8, 8), masks)
    # Two pixels lie 0.25 cells from the center of the cell: 1 - 2 * 0.25.
    assert masks[0].tolist() == [[False, False, True, True, False, False, False, False]] * 2
    assert quality.item() == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=1e-6)


def test_probabilities_are_those_of_the_sigmoid():
    logits = torch.linspace(1e-4, 90.0, 1001).expand(1, 1, 1001)
    taps = _direct_taps(1, 1, 1, 1), _direct_taps(1001, 1001, 1001, 1001)
    quality = resized_masks(logits, *taps, torch.empty(1, 1, 1001, dtype=torch.bool))
    assert quality.item() == pytest.approx(logits.double().sigmoid().mean().item(), rel=2e-6)
