"""Several views of an image, and how detections are joined."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dimaskdino.data.transforms import test_resize as resize_of
from dimaskdino.errors import ConfigError
from dimaskdino.prediction.augmented import AugmentedModel, check_augmentation, view, whole_images
from dimaskdino.prediction.fusion import Fusion, majority
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


def test_loader_of_whole_images_does_not_resize() -> None:
    cfg = tiny_cfg({})
    (resize,) = resize_of(whole_images(cfg))
    pixels = np.zeros((50, 70, 3), dtype=np.uint8)
    assert resize.get_transform(pixels).apply_image(pixels).shape == (50, 70, 3)
    assert cfg.INPUT.MIN_SIZE_TEST > 0


def test_view_one_pixel_wide_is_mirrored() -> None:
    pixels = np.arange(15, dtype=np.uint8).reshape(5, 1, 3)
    assert torch.equal(view(pixels, T.ResizeShortestEdge(1, 5), True), torch.from_numpy(pixels.transpose(2, 0, 1)))


SIZE = (20, 30)


def rectangle(left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def found(*objects: tuple[list[int], float, int], masks: bool = False, tag: int = 0) -> Instances:
    """Detections (box xyxy px, score, class), in descending order of their scores; ``tag`` is a field of each."""
    boxes, scores, classes = zip(*objects, strict=True) if objects else ((), (), ())
    result = Instances(SIZE, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    result.scores, result.pred_classes = torch.tensor(scores), torch.tensor(classes, dtype=torch.int64)
    result.tag = torch.full_like(result.pred_classes, tag)
    if masks:
        result.pred_masks = RleMasks.of(torch.stack([rectangle(*box) for box in boxes]))
    return result


def rows(joined: Instances) -> list[tuple[list[float], float, int]]:
    boxes, scores = joined.pred_boxes.tensor.tolist(), joined.scores.double().round(decimals=6).tolist()
    return list(zip(boxes, scores, joined.pred_classes.tolist(), strict=True))


def test_boxes_of_an_object_are_averaged_by_score_and_weight() -> None:
    one = found(([0, 0, 10, 10], 0.75, 1), ([20, 0, 30, 10], 0.5, 1), tag=1)
    other = found(([2, 0, 12, 10], 0.25, 1), tag=2)
    # IoU 8 / 12. Shares 0.75 and 0.25: the left edge is 0.25 * 2 = 0.5; the score is (0.75 + 0.25) / 2.
    joined = Fusion()([one, other])
    assert rows(joined) == [([0.5, 0, 10.5, 10], 0.5, 1), ([20, 0, 30, 10], 0.25, 1)]
    assert joined.tag.tolist() == [1, 1]
    # Shares 0.75 * 1 and 0.25 * 9: the left edge is 2.25 / 3 * 2; the scores are 3 / 10 and 0.5 / 10.
    joined = Fusion(weights=[1, 9])([one, other])
    assert rows(joined) == [([1.5, 0, 11.5, 10], 0.3, 1), ([20, 0, 30, 10], 0.05, 1)]
    assert joined.tag.tolist() == [2, 1]


@pytest.mark.parametrize("masks", [False, True])
def test_one_source_alone_stays_as_it_is(masks: bool) -> None:
    # The second is a near copy of the first: the same source may see two objects there.
    alone = found(([0, 0, 9, 10], 0.7, 2), ([0, 0, 10, 10], 0.6, 2), ([3, 1, 7, 9], 0.1, 0), masks=masks)
    joined = Fusion()([alone, alone])
    assert rows(joined) == rows(alone)
    assert not masks or joined.pred_masks.rles == alone.pred_masks.rles


def test_classes_and_distant_objects_stay_apart() -> None:
    one, other = found(([0, 0, 10, 10], 0.5, 0)), found(([0, 0, 10, 10], 0.5, 1), ([4, 0, 14, 10], 0.25, 0))
    assert len(Fusion()([one, other])) == 3  # IoU 6 / 14
    assert len(Fusion(iou=0.4)([one, other])) == 2
    assert rows(Fusion(max_detections=1)([one, other])) == [([0, 0, 10, 10], 0.25, 0)]


def test_a_detection_joins_the_object_that_it_overlaps_most() -> None:
    one = found(([0, 0, 10, 10], 0.5, 0), ([3, 0, 13, 10], 0.5, 0))
    other = found(([2, 0, 12, 10], 0.5, 0))
    assert rows(Fusion()([one, other])) == [([2.5, 0, 12.5, 10], 0.5, 0), ([0, 0, 10, 10], 0.25, 0)]


def test_masks_decide_where_there_are_masks() -> None:
    # Two bars of a cross in boxes that are the same.
    one, other = (found(([0, 0, 20, 20], 0.5, 0)) for _ in range(2))
    one.pred_masks = RleMasks.of(rectangle(0, 8, 20, 12)[None])
    other.pred_masks = RleMasks.of(rectangle(8, 0, 12, 20)[None])
    assert len(Fusion()([one, other])) == 2


def test_masks_keep_what_half_of_the_shares_have() -> None:
    masks = RleMasks.of(torch.stack([rectangle(0, 0, 4, 10), rectangle(2, 0, 8, 10), rectangle(6, 5, 20, 10)])).rles
    voted = RleMasks(
        [majority(masks, np.array(shares)) for shares in ([1.0, 1.0, 0.0], [1.0, 3.0, 1.0], [1.0] * 3)], SIZE
    )
    assert torch.equal(voted.tensor[0], rectangle(0, 0, 8, 10))  # half of two is enough
    assert torch.equal(voted.tensor[1], rectangle(2, 0, 8, 10))
    assert torch.equal(voted.tensor[2], rectangle(2, 0, 4, 10) | rectangle(6, 5, 8, 10))


def test_objects_without_pixels_or_score_do_no_harm() -> None:
    empty = found(([5, 5, 5, 5], 0.0, 0), masks=True)
    joined = Fusion()([empty, empty, empty])
    assert joined.scores.sum() == 0
    assert joined.pred_masks.area().sum() == 0
    nothing = found()
    assert len(Fusion()([nothing, nothing])) == len(Fusion(method="nms")([nothing])) == 0


def test_suppression_removes_or_lowers_what_overlaps() -> None:
    one = found(([0, 0, 10, 10], 0.8, 0), ([0, 0, 10, 10], 0.4, 1))
    other = found(([1, 0, 10, 10], 0.6, 0))
    assert rows(Fusion(method="nms")([one, other])) == [([0, 0, 10, 10], 0.8, 0), ([0, 0, 10, 10], 0.4, 1)]
    # IoU 0.9 lowers 0.6 to 0.06.
    soft = rows(Fusion(method="soft-nms")([one, other]))
    assert soft == [([0, 0, 10, 10], 0.8, 0), ([0, 0, 10, 10], 0.4, 1), ([1, 0, 10, 10], 0.06, 0)]
    # With weights 1 and 2, the first source's scores are halved.
    weighed = rows(Fusion(method="nms", weights=[1, 2], max_detections=1)([one, other]))
    assert weighed == [([1, 0, 10, 10], 0.6, 0)]
