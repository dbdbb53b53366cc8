import pytest
import torch

from dimaskdino.layers.points import sample_binary_masks, sample_points


def pixel_centers(height: int, width: int) -> torch.Tensor:
    """(height * width, 2) row by row, written out plainly."""
    return torch.tensor([[(x + 0.5) / width, (y + 0.5) / height] for y in range(height) for x in range(width)])


def sample_one(mask: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return sample_binary_masks(mask[None], torch.zeros(1, dtype=torch.int64), points[None])[0]


def test_pixel_centers_give_the_pixels_exactly():
    maps = torch.randn(2, 3, 4, 6)
    sampled = sample_points(maps, pixel_centers(4, 6).expand(2, -1, -1))
    torch.testing.assert_close(sampled, maps.flatten(2), rtol=0, atol=1e-5)
    mask = torch.rand(4, 6) > 0.5
    torch.testing.assert_close(sample_one(mask, pixel_centers(4, 6)), mask.flatten().float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((0.25, 0.25), 1.0),  # center of the upper left pixel
        ((0.5, 0.25), 0.5),  # halfway to its right neighbor
        ((0.5, 0.5), 0.25),  # the middle of all four
        ((0.0, 0.25), 0.5),  # the left edge: half of the samples' area is outside
        ((0.0, 0.0), 0.25),  # the corner
        ((-0.25, 0.25), 0.0),  # a whole pixel outside
        ((0.25, 1.5), 0.0),
        ((9.0, -9.0), 0.0),
    ],
)
def test_values_between_pixels_and_beyond_the_edge_by_hand(point, expected):
    mask = torch.tensor([[True, False], [False, False]])
    points = torch.tensor([point])
    assert sample_one(mask, points).item() == pytest.approx(expected, abs=1e-6)
    assert sample_points(mask[None, None].float(), points[None]).item() == pytest.approx(expected, abs=1e-6)


def test_binary_sampling_equals_sampling_the_floating_masks():
    masks = torch.rand(3, 5, 7) > 0.5
    index = torch.tensor([2, 0, 0, 1])
    points = torch.rand(4, 50, 2) * 1.4 - 0.2
    expected = sample_points(masks[index][:, None].float(), points)[:, 0]
    torch.testing.assert_close(sample_binary_masks(masks, index, points), expected, rtol=0, atol=1e-5)


def test_masks_beyond_2_to_the_24_pixels_are_sampled_exactly():
    mask = torch.zeros(4100, 4100, dtype=torch.bool)
    mask[:, 1::2] = True  # every other column: a place that is one off has the other value
    corners = torch.tensor([[1e-6, 1e-6], [1 - 1e-6, 1 - 1e-6]])
    rows = torch.arange(4000, 4100)
    columns = (rows[:, None] * 7 + torch.arange(2)) % 4100
    centers = torch.stack((columns, rows[:, None].expand(-1, 2)), dim=-1).flatten(0, 1)
    points = torch.cat((corners, ((centers + 0.5) / 4100).float()))
    expected = sample_points(mask[None, None].float(), points[None])[0, 0]
    torch.testing.assert_close(sample_one(mask, points), expected, rtol=0, atol=2e-3)
    assert 0.4 < expected[2:].mean() < 0.6


def test_sampling_no_masks_gives_none():
    none = torch.zeros(0, dtype=torch.int64)
    assert sample_binary_masks(torch.zeros(0, 5, 7, dtype=torch.bool), none, torch.rand(0, 9, 2)).shape == (0, 9)
    assert sample_points(torch.zeros(0, 1, 5, 7), torch.rand(0, 9, 2)).shape == (0, 1, 9)


def test_sampling_keeps_the_dtype_of_the_maps():
    maps = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert sample_points(maps, torch.rand(1, 3, 2)).dtype == torch.float64
