import pytest
import torch
import torch.nn.functional as F

from dimaskdino.layers import MSDeformAttn
from dimaskdino.layers.padding import PaddedBatch, level_centers
from dimaskdino.layers.position import pixel_sine_embedding

CPU = torch.device("cpu")
SHAPES = [(8, 16), (4, 8)]


def test_valid_cells_by_hand():
    valid = PaddedBatch([(40, 100), (64, 128)], (64, 128)).valid_cells(SHAPES, CPU)
    # 100 of 128 columns are 12.5 of 16 cells, and a cell that starts on the image lies on it.
    assert valid.counts.tolist() == [[[13, 5], [7, 3]], [[16, 8], [8, 4]]]
    torch.testing.assert_close(valid.ratios[0], torch.tensor([[13 / 16, 5 / 8], [7 / 8, 3 / 4]]))
    assert torch.equal(valid.ratios[1], torch.ones(2, 2))
    assert not valid.is_padding[1].any()
    padding = [each.view(shape) for each, shape in zip(valid.is_padding[0].split([128, 32]), SHAPES, strict=True)]
    assert not padding[0][:5, :13].any()
    assert padding[0][5:].all()
    assert padding[0][:, 13:].all()
    assert int((~padding[1]).sum()) == 7 * 3


def test_without_padding_there_is_nothing_to_ignore():
    assert PaddedBatch([(64, 128)] * 2, (64, 128)).valid_cells(SHAPES, CPU) is None


def test_cells_are_those_of_a_mask_resized_by_nearest_neighbor():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        canvas = torch.randint(20, 400, (2,), generator=generator)
        size = [int(torch.randint(1, int(side) + 1, (1,), generator=generator)) for side in canvas]
        shape = [-(-int(side) // 8) for side in canvas]
        batch = PaddedBatch([tuple(size), tuple(canvas.tolist())], tuple(canvas.tolist()))
        valid = batch.valid_cells([tuple(shape)], CPU)
        if valid is None:
            continue
        mask = torch.ones(*canvas.tolist())
        mask[: size[0], : size[1]] = 0
        assert torch.equal(valid.is_padding[0].view(shape), F.interpolate(mask[None, None], shape)[0, 0] > 0)


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
def test_attention_sees_the_image_as_if_there_were_no_padding(coordinates):
    torch.manual_seed(0)
    attention = MSDeformAttn(dim=16, num_levels=2, num_heads=2)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.value_proj.bias)
    query, reference = torch.randn(1, 5, 16), torch.rand(1, 5, coordinates)
    image = [torch.randn(1, 4, 6, 16), torch.randn(1, 2, 3, 16)]
    alone = torch.cat([level.flatten(1, 2) for level in image], dim=1)
    expected = attention(query, reference, alone, [(4, 6), (2, 3)])
    # The same image in the corner of a canvas of 8 x 16 and 4 x 8 cells, beside noise.
    canvas = [torch.randn(1, 8, 16, 16), torch.randn(1, 4, 8, 16)]
    for level, own in zip(canvas, image, strict=True):
        level[:, : own.shape[1], : own.shape[2]] = own
    tokens = torch.cat([level.flatten(1, 2) for level in canvas], dim=1)
    valid = PaddedBatch([(32, 48)], (64, 128)).valid_cells(SHAPES, CPU)
    torch.testing.assert_close(attention(query, reference, tokens, SHAPES, valid), expected)


def test_centers_are_parts_of_the_image():
    valid = PaddedBatch([(32, 64), (64, 128)], (64, 128)).valid_cells(SHAPES, CPU)
    fine, coarse = level_centers(SHAPES, CPU, valid)
    assert fine[0, 0].tolist() == pytest.approx([0.5 / 8, 0.5 / 4])
    assert fine[1, 0].tolist() == pytest.approx([0.5 / 16, 0.5 / 8])
    assert coarse[0, -1].tolist() == pytest.approx([7.5 / 4, 3.5 / 2])


def test_positions_end_where_the_image_ends():
    valid = PaddedBatch([(32, 64), (64, 128)], (64, 128)).valid_cells(SHAPES, CPU)
    padded = pixel_sine_embedding(8, 16, 8, CPU, counts=valid.counts[:, 0]).view(2, 8, 16, 8)
    torch.testing.assert_close(padded[0, :4, :8].flatten(0, 1), pixel_sine_embedding(4, 8, 8, CPU))
    torch.testing.assert_close(padded[1].flatten(0, 1), pixel_sine_embedding(8, 16, 8, CPU))
