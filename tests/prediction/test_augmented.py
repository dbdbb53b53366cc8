"""Test-time augmentation: views are mirrored and scaled back, and joined."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.prediction.augmented import AugmentedModel, check_augmentation, view
from dimaskdino.structures import RleMasks
from tests.tiny_model import TINY_DINO, image, tiny_cfg, tiny_model

AUG = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (32, 64), "TEST.AUG.MAX_SIZE": 200}


class BrightSpot(nn.Module):
    """Finds the pixels above 100 exactly, whatever the size of the view; ``views`` are the images that it saw."""

    def __init__(self, rle: bool = False) -> None:
        super().__init__()
        self.views: list[Tensor] = []
        self.rle = rle

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (given,) = batched_inputs
        self.views.append(given["image"])
        size = given["height"], given["width"]
        bright = (given["image"].float()[None].mean(1, keepdim=True) > 100).float()
        mask = torch.nn.functional.interpolate(bright, size)[0] > 0
        rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
        box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
        found = Instances(size, pred_boxes=Boxes(box), scores=torch.tensor([0.5 + 0.1 * len(self.views)]))
        found.pred_classes = torch.tensor([3])
        found.pred_masks = RleMasks.of(mask) if self.rle else mask
        return [
            {"instances": found, "sem_seg": mask * len(self.views), "image_feature": torch.ones(2) * len(self.views)}
        ]


def spot() -> Tensor:
    """(3, 64, 128) uint8 with a bright L, which is not its own mirror image."""
    pixels = torch.zeros(3, 64, 128, dtype=torch.uint8)
    pixels[:, 8:40, 16:24] = pixels[:, 32:40, 16:48] = 255
    return pixels


@pytest.mark.parametrize("rle", [False, True])
def test_views_are_brought_back_to_the_image(rle: bool) -> None:
    model = BrightSpot(rle)
    augmented = AugmentedModel(tiny_cfg(AUG), model=model)
    (result,) = augmented([{"image": spot(), "height": 64, "width": 128}])
    assert [tuple(view.shape) for view in model.views] == [(3, 32, 64)] * 2 + [(3, 64, 128)] * 2
    assert torch.equal(model.views[3], spot().flip(-1))
    expected = spot()[0] > 0
    found = result["instances"]
    assert isinstance(found.pred_masks, RleMasks) == rle
    assert torch.equal(torch.stack(list(found.pred_masks))[0], expected)
    assert found.pred_boxes.tensor.tolist() == [[16, 8, 48, 40]]
    assert found.scores.tolist() == pytest.approx([0.75])  # the mean of 0.6 to 0.9
    assert torch.equal(result["sem_seg"][0], expected * 2.5)
    assert result["image_feature"].tolist() == [2.5, 2.5]


def test_flips_can_be_left_out() -> None:
    model = BrightSpot()
    AugmentedModel(tiny_cfg(AUG | {"TEST.AUG.FLIP": False}), model=model)(
        [{"image": spot(), "height": 64, "width": 128}]
    )
    assert len(model.views) == 2


@pytest.mark.parametrize("options", [{}, TINY_DINO], ids=["DIMaskDINO", "DINO"])
def test_one_view_of_the_usual_size_is_the_model_itself(options: dict[str, Any]) -> None:
    model = tiny_model(options)
    options = options | AUG | {"TEST.AUG.MIN_SIZES": (64,), "TEST.AUG.FLIP": False}
    batch = [{"image": image(64, 96, seed), "height": 50, "width": 75} for seed in range(2)]
    with torch.no_grad():
        results = AugmentedModel(tiny_cfg(options), model=model)(batch)
        expected = [model([each])[0] for each in batch]
    for one, other in zip(results, expected, strict=True):
        found, alone = one["instances"], other["instances"]
        assert torch.equal(found.scores, alone.scores)
        assert torch.allclose(found.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=1e-6)
        assert found.pred_classes.tolist() == alone.pred_classes.tolist()
        assert options.get("MODEL.META_ARCHITECTURE") == "DINO" or torch.equal(found.pred_masks, alone.pred_masks)


def test_semantic_maps_are_the_mean_of_the_views() -> None:
    options = {"MODEL.MaskDINO.TEST.SEMANTIC_ON": True, "MODEL.MaskDINO.TEST.INSTANCE_ON": False}
    model = tiny_model(options)
    given = {"image": image(64, 64), "height": 64, "width": 64}
    with torch.no_grad():
        (result,) = AugmentedModel(tiny_cfg(options | AUG | {"TEST.AUG.MIN_SIZES": (64,)}), model=model)([given])
        plain, mirrored = (
            model([given | {"image": each}])[0]["sem_seg"] for each in (image(64, 64), image(64, 64).flip(-1))
        )
    assert result.keys() == {"sem_seg"}
    assert torch.allclose(result["sem_seg"], (plain + mirrored.flip(-1)) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"TEST.AUG.MIN_SIZES": ()}, r"TEST\.AUG\.MIN_SIZES"),
        ({"TEST.AUG.MIN_SIZES": (64, 0)}, r"TEST\.AUG\.MIN_SIZES"),
        ({"TEST.AUG.MIN_SIZES": (64, "a")}, r"TEST\.AUG\.MIN_SIZES"),
        ({"MODEL.MaskDINO.TEST.PANOPTIC_ON": True}, r"TEST\.AUG\.ENABLED.*PANOPTIC_ON"),
    ],
    ids=str,
)
def test_what_cannot_be_joined_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        check_augmentation(tiny_cfg(AUG | options))
    check_augmentation(tiny_cfg(options | {"TEST.AUG.ENABLED": False}))


def test_view_one_pixel_wide_is_mirrored() -> None:
    pixels = np.arange(15, dtype=np.uint8).reshape(5, 1, 3)
    assert torch.equal(view(pixels, T.ResizeShortestEdge(1, 5), True), torch.from_numpy(pixels.transpose(2, 0, 1)))
