import pytest
import torch

from dimaskdino.layers import ms_deform_attn_ops as ops
from dimaskdino.layers.points import (
    sample_binary_masks,
    sample_points,
    sigmoid_and_sums,
    sums_at_points,
    uncertain_points,
)


def pixel_centers(height: int, width: int) -> torch.Tensor:
    """(height * width, 2) row by row, written out plainly."""
    return torch.tensor([[(x + 0.5) / width, (y + 0.5) / height] for y in range(height) for x in range(width)])


def sample_one(mask: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return sample_binary_masks(mask[None], torch.zeros(1, dtype=torch.int64), points[None])[0]


def test_traces_hold_no_compiled_loops(monkeypatch):
    tensor = torch.zeros(1)
    assert ops.use_loops(tensor) == ops.LOOPS_COMPILED
    for module, name in ((torch.compiler, "is_compiling"), (torch.jit, "is_tracing")):
        with monkeypatch.context() as traced:
            traced.setattr(module, name, lambda: True)
            assert not ops.use_loops(tensor)


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


class TestCompiled:
    """The compiled forms against the plain ones."""

    @pytest.fixture(autouse=True)
    def needs_the_op(self) -> None:
        if not ops.LOOPS_COMPILED:
            pytest.skip("the op was built without them")

    def test_masks_are_sampled_as_in_plain_pytorch(self, monkeypatch):
        masks = torch.rand(3, 37, 21) > 0.5
        index = torch.tensor([2, 0, 2, 1])
        points = torch.rand(4, 700, 2) * 1.4 - 0.2
        points[0, :3] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [90.0, -90.0]])
        compiled = sample_binary_masks(masks, index, points)
        monkeypatch.setattr(ops, "LOOPS_COMPILED", False)
        plain = sample_binary_masks(masks, index, points)
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)

    def test_sums_at_points_and_their_gradient_are_those_of_plain_pytorch(self, monkeypatch):
        torch.manual_seed(0)
        logits, masks, index = torch.randn(3, 9, 12) * 9, torch.rand(2, 37, 21) > 0.5, torch.tensor([1, 0, 1])
        points = torch.rand(3, 301, 2) * 1.2 - 0.1
        found = []
        for compiled in (True, False):
            monkeypatch.setattr(ops, "LOOPS_COMPILED", compiled)
            leaf = logits.clone().requires_grad_()
            sums = torch.stack(sums_at_points(leaf, points, masks, index))
            (sums * torch.tensor([[0.3], [-0.7], [0.2], [0.1]]) * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
            found.append((sums, leaf.grad))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)

    def test_what_is_not_a_number_or_far_away_is_outside(self):
        points = torch.tensor([[[torch.nan, 0.5], [torch.inf, 0.5], [0.5, -torch.inf], [1e30, 0.5], [0.5, 0.5]]])
        values = sample_binary_masks(torch.ones(1, 4, 4).bool(), torch.tensor([0]), points)
        assert values.tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0]]

    def test_a_mask_that_does_not_exist_is_refused(self):
        with pytest.raises(IndexError, match="index 3"):
            torch.ops.dimaskdino.sample_masks(torch.zeros(3, 4, 4).bool(), torch.tensor([3]), torch.rand(1, 2, 2))

    def test_uncertain_points_are_the_best_candidates(self):
        # The same seed gives the same candidates, of which some are chosen, and the same uniform points.
        logits = torch.randn(2, 16, 16)
        torch.manual_seed(3)
        everything = uncertain_points(logits, 1000, 0, 1250)
        torch.manual_seed(3)
        chosen = uncertain_points(logits, 1000, 250, 1250)
        torch.manual_seed(3)
        candidates = uncertain_points(logits, 1000, 1000, 1000)
        certainty = sample_points(logits[:, None], candidates)[:, 0].abs()
        best = certainty.sort(1).values[:, :250]
        of_chosen = sample_points(logits[:, None], chosen[:, :250])[:, 0].abs()
        torch.testing.assert_close(of_chosen.sort(1).values, best, rtol=0, atol=1e-5)
        torch.testing.assert_close(chosen[:, 250:], everything[:, 250:], rtol=0, atol=0)

    def test_equal_candidates_are_taken_as_often_as_asked_for(self):
        points = uncertain_points(torch.zeros(3, 8, 8), 300, 75, 100)
        assert points.shape == (3, 100, 2)
        assert len(points.flatten(0, 1).unique(dim=0)) == 300

    def test_points_are_distributed_as_in_plain_pytorch(self, monkeypatch):
        logits = torch.linspace(-3.0, 1.0, 64).expand(8, 48, 64).contiguous()
        torch.manual_seed(0)
        compiled = uncertain_points(logits, 3000, 700, 1000)
        monkeypatch.setattr(ops, "LOOPS_COMPILED", False)
        plain = uncertain_points(logits, 3000, 700, 1000)
        for part in (slice(0, 700), slice(700, 1000)):
            for axis in (0, 1):
                both = (each[:, part, axis].flatten().sort().values for each in (compiled, plain))
                gap = kolmogorov_smirnov(*both)
                assert gap < 1.9 * (2 / (8 * (part.stop - part.start))) ** 0.5, (part, axis)
        coordinates = compiled[:, 700:].flatten(0, 1)
        assert torch.corrcoef(coordinates.T)[0, 1].abs() < 0.08

    def test_points_follow_the_seed_and_not_the_threads(self):
        logits = torch.randn(5, 9, 9)
        results = []
        threads = torch.get_num_threads()
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            results.append(uncertain_points(logits, 90, 30, 40))
        torch.set_num_threads(threads)
        assert torch.equal(*results)
        assert not torch.equal(results[0], uncertain_points(logits, 90, 30, 40))


def kolmogorov_smirnov(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest distance of the distributions of two sorted samples."""
    both = torch.cat((first, second))
    places = [torch.searchsorted(each, both, right=True) / len(each) for each in (first, second)]
    return float((places[0] - places[1]).abs().max())


@pytest.mark.parametrize("points", [1, 8, 700])
def test_sigmoid_and_its_sums_are_those_of_pytorch(points):
    torch.manual_seed(0)
    logits = torch.randn(3, points) * 30
    logits[0, 0] = 200.0
    logits[1, 0] = -200.0
    expected = logits.double()
    probability, softplus, total = sigmoid_and_sums(logits.clone())
    torch.testing.assert_close(probability, expected.sigmoid().float(), rtol=1e-5, atol=1e-7)
    softplus_sum = torch.nn.functional.softplus(expected).sum(1, keepdim=True).float()
    torch.testing.assert_close(softplus, softplus_sum, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected.sigmoid().sum(1, keepdim=True).float(), rtol=1e-5, atol=1e-6)
