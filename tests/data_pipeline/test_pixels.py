"""The quick way through the augmentations gives the pixels of detectron2's transforms, to the last bit."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from dimaskdino.config import Config
from dimaskdino.data.pixels import augment
from dimaskdino.data.transforms import large_scale_jitter, shortest_edge
from dimaskdino.seeds import SAMPLE, seeded

SIZES = ((37, 53), (64, 64), (90, 31))


def slowly(augmentations: T.AugmentationList, image: np.ndarray) -> tuple[Any, torch.Tensor]:
    """One transform after the other."""
    augmented = T.AugInput(image)
    transforms = augmentations(augmented)
    return transforms, torch.from_numpy(np.array(augmented.image.transpose(2, 0, 1)))


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
@pytest.mark.parametrize("default", [large_scale_jitter, shortest_edge])
@pytest.mark.parametrize("kind", ["uint8", "one channel", "float32"])
def test_pixels_and_transforms_are_those_of_detectron2(cfg: Config, default: Any, flip: str, kind: str) -> None:
    cfg.merge_from_list(["INPUT.RANDOM_FLIP", flip, "INPUT.IMAGE_SIZE", 48, "INPUT.CROP.ENABLED", True])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (24, 70), "INPUT.MIN_SCALE", 0.2, "INPUT.CROP.SIZE", [20, 30]])
    cfg.INPUT.CROP.TYPE = "absolute_range"
    augmentations = T.AugmentationList(default(cfg))
    generator = np.random.default_rng(0)
    points = generator.uniform(0, 30, (5, 2))
    sides = set()
    for place in range(30):
        image = generator.integers(0, 256, (*SIZES[place % 3], 1 if kind == "one channel" else 3)).astype(np.uint8)
        image = image.astype(np.float32) if kind == "float32" else image
        with seeded(1, SAMPLE, place):
            transforms, expected = slowly(augmentations, image.copy())
        with seeded(1, SAMPLE, place):
            ours, found = augment(augmentations, image)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert found.is_contiguous()
        np.testing.assert_array_equal(ours.apply_coords(points.copy()), transforms.apply_coords(points.copy()))
        sides.add(expected.shape[1:])
    assert len(sides) == 1 if default is large_scale_jitter else len(sides) > 3


def test_an_augmentation_that_looks_at_pixels_gets_them(cfg: Config) -> None:
    seen = []

    class Looks(T.Augmentation):
        def get_transform(self, image: np.ndarray) -> T.Transform:
            seen.append(image.copy())
            return T.NoOpTransform()

    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    flip = T.RandomFlip(prob=1.0)
    augment(T.AugmentationList([flip, Looks(), flip]), image)
    np.testing.assert_array_equal(seen[0], image[:, ::-1])
