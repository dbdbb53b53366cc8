import pytest
import torch

from dimaskdino.modeling.criterion import RandomPointSampler


def sampler(num_points: int = 100, oversample_ratio: float = 3.0, importance_ratio: float = 0.75) -> RandomPointSampler:
    return RandomPointSampler(
        num_points=num_points, oversample_ratio=oversample_ratio, importance_ratio=importance_ratio
    )


def inside(points: torch.Tensor) -> torch.Tensor:
    """Which points are not so near to the upper or lower edge that the zeros beyond make them uncertain."""
    return (points[:, 1] - 0.5).abs() < 0.49


def test_shared_points_are_uniform_in_the_unit_square():
    points = sampler(4000).shared(torch.device("cpu"))
    assert points.shape == (4000, 2)
    assert ((points >= 0) & (points < 1)).all()
    assert points.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)


def test_each_mask_gets_its_own_points_within_the_unit_square():
    points = sampler().per_mask(torch.randn(3, 8, 8))
    assert points.shape == (3, 100, 2)
    assert ((points >= 0) & (points < 1)).all()
    assert not torch.equal(points[0], points[1])


def test_the_most_uncertain_candidates_are_chosen():
    # |logit| grows from left to right, so the 75 best of 300 uniform candidates lie in about the left quarter.
    logits = torch.arange(1.0, 65.0).expand(1, 64, 64)
    points = sampler().per_mask(logits)[0]
    uncertain, others = points[:75], points[75:]
    assert uncertain[inside(uncertain), 0].max() < 0.4
    assert uncertain[:, 0].mean() < 0.2
    assert others[:, 0].max() > 0.6


def test_negative_logits_are_as_certain_as_positive_ones():
    logits = torch.arange(1.0, 65.0).expand(2, 64, 64) * torch.tensor([1.0, -1.0])[:, None, None]
    points = sampler().per_mask(logits)
    assert all(of_mask[inside(of_mask), 0].max() < 0.4 for of_mask in points[:, :75])


def test_without_importance_all_points_are_uniform():
    logits = torch.arange(1.0, 65.0).expand(1, 64, 64)
    points = sampler(1000, 1.0, 0.0).per_mask(logits)[0]
    assert points.shape == (1000, 2)
    assert points[:, 0].mean().item() == pytest.approx(0.5, abs=0.05)


def test_no_masks_get_no_points():
    assert sampler().per_mask(torch.zeros(0, 8, 8)).shape == (0, 100, 2)


def test_points_follow_the_seed():
    torch.manual_seed(3)
    first = sampler().per_mask(torch.zeros(2, 8, 8))
    torch.manual_seed(3)
    assert torch.equal(first, sampler().per_mask(torch.zeros(2, 8, 8)))


@pytest.mark.parametrize(
    "options", [{"num_points": 0}, {"oversample_ratio": 0.5}, {"importance_ratio": -0.1}, {"importance_ratio": 1.1}]
)
def test_settings_that_cannot_work_are_an_error(options):
    with pytest.raises(ValueError, match="TRAIN_NUM_POINTS and OVERSAMPLE_RATIO .* IMPORTANCE_SAMPLE_RATIO"):
        sampler(**options)
