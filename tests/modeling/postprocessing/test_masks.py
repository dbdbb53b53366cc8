import pytest
import torch
import torch.nn.functional as F

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.postprocessing.masks import Frame, MaskRendering
from dimaskdino.structures import MaskLogits
from tests.tiny_model import tiny_cfg

FRAMES = [
    Frame((160, 224), (160, 213), (96, 128)),  # smaller than the model's input
    Frame((160, 224), (150, 213), (300, 427)),  # larger
    Frame((160, 224), (160, 224), (160, 224)),
    Frame((160, 224), (155, 201), (13, 9)),
]


def blobs(count: int = 8) -> MaskLogits:
    """Smooth logits at a quarter of 160 x 224 px, one of them negative everywhere."""
    coarse = torch.randn(1, count, 5, 7, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(coarse, size=(40, 56), mode="bicubic") * 4 - 2
    logits[:, 3] = -1
    return MaskLogits(torch.eye(count)[None], logits)


def render(frame: Frame, **options):
    return MaskRendering(**options)(blobs(), 0, torch.arange(8), frame)


@pytest.mark.parametrize("frame", FRAMES)
def test_direct_interpolation_differs_in_a_pixel_of_a_thousand(frame) -> None:
    expected, expected_quality = render(frame, interpolation="two_step")
    masks, quality = render(frame)
    assert 0.05 < expected.float().mean() < 0.5
    assert (masks != expected).float().mean() <= 0.001
    torch.testing.assert_close(quality, expected_quality, atol=2e-2, rtol=0)


def test_direct_interpolation_is_exact_without_a_second_resize() -> None:
    frame = Frame((160, 224), (150, 213), (150, 213))
    assert torch.equal(render(frame)[0], render(frame, interpolation="two_step")[0])


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("interpolation", ["two_step", "direct"])
def test_rle_and_small_chunks_give_the_same_masks(frame, interpolation, monkeypatch) -> None:
    expected, quality = render(frame, interpolation=interpolation)
    monkeypatch.setattr("dimaskdino.modeling.postprocessing.masks._BYTES_PER_PIXEL", 2**20 // 500)  # 500 px a MiB
    masks, chunked = render(frame, interpolation=interpolation, format="rle", memory_mb=1)
    assert torch.equal(masks.tensor, expected)
    torch.testing.assert_close(chunked, quality)
    assert torch.equal(render(frame, interpolation=interpolation, memory_mb=1)[0], expected)


@pytest.mark.parametrize("interpolation", ["two_step", "direct"])
@pytest.mark.parametrize("form", ["bitmask", "rle"])
def test_no_queries_give_no_masks(interpolation, form) -> None:
    rendering = MaskRendering(interpolation=interpolation, format=form)
    masks, quality = rendering(blobs(), 0, torch.zeros(0, dtype=torch.int64), FRAMES[0])
    assert (len(masks), quality.shape) == (0, (0,))
    assert (masks if form == "bitmask" else masks.tensor).shape == (0, 96, 128)


@pytest.mark.parametrize("key", ["MASK_INTERPOLATION", "MASK_FORMAT"])
def test_unknown_choices_are_named(key) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*neither.*two_step|{key}.*neither.*bitmask"):
        MaskRendering.from_config(tiny_cfg({f"MODEL.MaskDINO.TEST.{key}": "neither"}))
