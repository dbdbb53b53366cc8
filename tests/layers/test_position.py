import math

import pytest
import torch

from dimaskdino.layers.position import box_sine_embedding, pixel_sine_embedding

CPU = torch.device("cpu")


def test_pixel_embedding_has_y_in_its_first_half():
    embedding = pixel_sine_embedding(2, 3, 8, CPU).view(2, 3, 8)
    assert torch.equal(embedding[0, 0, :4], embedding[0, 2, :4])
    assert torch.equal(embedding[0, 1, 4:], embedding[1, 1, 4:])
    assert not torch.allclose(embedding[0, 0, 4:], embedding[0, 1, 4:])
    assert not torch.allclose(embedding[0, 0, :4], embedding[1, 0, :4])


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 2)])
def test_pixel_embedding_entries_by_hand(row, column):
    embedding = pixel_sine_embedding(2, 3, 8, CPU).view(2, 3, 8)[row, column]
    y, x = 2 * math.pi * (row + 1) / (2 + 1e-6), 2 * math.pi * (column + 1) / (3 + 1e-6)
    # Four channels per axis: frequency 10000^0 for the first pair, 10000^(2/4) = 100 for the second.
    expected = [f(p / w) for p in (y, x) for w in (1, 100) for f in (math.sin, math.cos)]
    assert embedding.tolist() == pytest.approx(expected, abs=1e-5)


def test_box_embedding_by_hand_in_order_y_x_w_h():
    cx, cy, w, h = 0.2, 0.4, 0.3, 0.7
    embedding = box_sine_embedding(torch.tensor([[[cx, cy, w, h]]]), 8)
    assert embedding.shape == (1, 1, 16)
    expected = [f(2 * math.pi * p / t) for p in (cy, cx, w, h) for t in (1, 100) for f in (math.sin, math.cos)]
    assert embedding[0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_box_embedding_is_float32_whatever_the_boxes_are():
    assert box_sine_embedding(torch.rand(3, 4).bfloat16(), 8).dtype == torch.float32


def test_embeddings_have_256_channels_per_pixel_512_per_box():
    assert pixel_sine_embedding(3, 5, 256, CPU).shape == (15, 256)
    assert box_sine_embedding(torch.rand(7, 4), 256).shape == (7, 512)


def test_temperature_and_offset_by_hand():
    embedding = pixel_sine_embedding(1, 2, 8, CPU, temperature=25.0, offset=-0.5).view(2, 8)
    # Cell centers at .5 and 1.5 of 2; the second pair of channels has the wavelength 25^(2/4) = 5.
    x = [2 * math.pi * (cell + 0.5) / (2 + 1e-6) for cell in (0, 1)]
    for row, position in zip(embedding, x, strict=True):
        assert row[4:].tolist() == pytest.approx(
            [f(position / w) for w in (1, 5) for f in (math.sin, math.cos)], abs=1e-5
        )
