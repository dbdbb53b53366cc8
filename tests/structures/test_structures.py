"""Tokens, stages, targets, and masks as RLE."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as mask_util

from dimaskdino.errors import DatasetError
from dimaskdino.structures import (
    FeatureTokens,
    JoinedTargets,
    RleMasks,
    Stage,
    Targets,
    Tokens,
    decoder_stages,
    instances_to_coco,
    is_final_loss,
)
from dimaskdino.structures.rle_masks import crop_of, place_crop
from dimaskdino.structures.targets import CrowdRegions
from dimaskdino.structures.tokens import flatten_levels, highest_scores
from tests.tiny_model import instances


def test_tokens_are_chosen_and_prepended_with_their_boxes():
    tokens = Tokens(torch.arange(6.0).view(1, 3, 2), torch.arange(12.0).view(1, 3, 4))
    best = highest_scores(torch.tensor([[[0.0, 0.2], [0.1, -1.0], [0.3, 0.9]]]), 2)
    both = tokens.prepend(tokens.gather(best))
    assert both.content[0].tolist() == [[4, 5], [0, 1], [0, 1], [2, 3], [4, 5]]
    assert both.boxes[0, :, 0].tolist() == [8, 0, 0, 4, 8]


def test_the_finest_of_flattened_levels_is_found():
    levels = [torch.randn(2, 3, *size) for size in ((1, 2), (4, 3), (2, 2))]
    tokens, shapes = flatten_levels(levels)
    assert shapes == [(1, 2), (4, 3), (2, 2)]
    assert torch.equal(FeatureTokens(tokens, None, shapes).finest_level, levels[1])


def test_names_losses_and_titles():
    stages = [Stage("interm"), Stage("di", 1), Stage("selection", 2), *decoder_stages(2, initial=True)]
    assert [stage.name for stage in stages] == ["interm", "di.1", "selection.2", "initial", "layer.0", "layer.1"]
    assert [stage.loss_suffix for stage in stages] == ["_interm", "_di_1", "_selection_2", "_0", "_1", ""]
    assert [stage.title for stage in stages] == [
        "first selection",
        "token interaction layer 1",
        "second selection",
        "queries before layer 0",
        "decoder layer 0",
        "decoder layer 1",
    ]


def test_losses_are_numbered_from_layer_0_without_initial_prediction():
    assert [stage.loss_suffix for stage in decoder_stages(3, initial=False)] == ["_0", "_1", ""]


def test_denoising_stages_have_their_own_names_and_losses():
    first, last = (stage.of_denoising() for stage in decoder_stages(2, initial=False))
    assert (first.name, first.loss_suffix) == ("dn.layer.0", "_dn_0")
    assert (last.name, last.loss_suffix, last.title) == ("dn.layer.1", "_dn", "decoder layer 1 (denoising)")


@pytest.mark.parametrize("name", ["interm", "di.0", "selection.12", "initial", "layer.3", "dn.initial", "dn.layer.0"])
def test_name_round_trip(name):
    assert Stage.from_name(name).name == name


@pytest.mark.parametrize("name", ["", "layer", "layer.", "layer.x", "layer.-1", "interm.0", "encoder", "dn."])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="layer.N"):
        Stage.from_name(name)


def test_order_is_the_order_of_prediction():
    names = ["layer.10", "selection.2", "initial", "layer.2", "interm"]
    ordered = [stage.name for stage in sorted(map(Stage.from_name, names), key=lambda stage: stage.order)]
    assert ordered == ["interm", "selection.2", "initial", "layer.2", "layer.10"]


def test_large_ordinals_are_written_as_numbers():
    assert Stage("selection", 5).title == "fifth selection"
    assert Stage("selection", 6).title == "6th selection"


def test_only_selections_precede_the_decoder():
    assert [Stage(kind).is_refined for kind in ("interm", "di", "selection", "initial", "layer")] == [
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("stage", [Stage("interm"), Stage("di", 0), *decoder_stages(12, initial=True)[:-1]])
@pytest.mark.parametrize("denoising", [False, True])
def test_losses_of_earlier_stages_are_not_final(stage, denoising):
    stage = stage.of_denoising() if denoising else stage
    assert not is_final_loss(f"loss_mask{stage.loss_suffix}")


def test_losses_of_the_last_stage_and_users_terms_are_final():
    assert all(is_final_loss(name) for name in ("loss_ce", "loss_mask", "total_loss", "loss_edge_of_object"))
    assert not is_final_loss("loss_ce_dn")


def test_boxes_are_normalized_by_the_padded_canvas():
    # The releases divide by the image, 40 x 50 here, so that objects of smaller images of a batch seem too large.
    target = Targets.from_instances(instances(50, 40, [[10, 20, 30, 50]]), 64, 80, num_classes=5)
    torch.testing.assert_close(target.boxes, torch.tensor([[20 / 80, 35 / 64, 20 / 80, 30 / 64]]))


def test_boxes_of_canvas_sized_images_are_the_releases():
    target = Targets.from_instances(instances(64, 80, [[10, 20, 30, 50]]), 64, 80, num_classes=5)
    torch.testing.assert_close(target.boxes, torch.tensor([[20 / 80, 35 / 64, 20 / 80, 30 / 64]]))


def test_masks_are_padded_at_the_right_and_below():
    target = Targets.from_instances(instances(50, 40, [[10, 20, 30, 50]]), 64, 80, num_classes=5)
    expected = torch.zeros(1, 64, 80, dtype=torch.bool)
    expected[0, 20:50, 10:30] = True
    assert torch.equal(target.masks, expected)
    assert target.labels.tolist() == [0]
    assert len(target) == 1


def test_boxes_and_masks_of_a_target_lie_over_each_other():
    target = Targets.from_instances(instances(50, 40, [[10, 20, 30, 50]]), 64, 80, num_classes=5)
    ys, xs = target.masks[0].nonzero(as_tuple=True)
    cx, cy, w, h = (target.boxes[0] * torch.tensor([80, 64, 80, 64])).tolist()
    assert (cx - w / 2, cx + w / 2) == pytest.approx((int(xs.min()), int(xs.max()) + 1))
    assert (cy - h / 2, cy + h / 2) == pytest.approx((int(ys.min()), int(ys.max()) + 1))


@pytest.mark.parametrize("form", ["bitmasks", "polygons", "bool", "uint8"])
def test_masks_may_come_as_bitmasks_polygons_or_tensors(form):
    given = instances(16, 16, [[2, 4, 10, 12]])
    masks = {
        "bitmasks": given.gt_masks,
        "polygons": PolygonMasks([[[2.0, 4, 10, 4, 10, 12, 2, 12]]]),
        "bool": given.gt_masks.tensor,
        "uint8": given.gt_masks.tensor.to(torch.uint8),
    }
    expected = given.gt_masks.tensor
    given.gt_masks = masks[form]
    target = Targets.from_instances(given, 16, 16, num_classes=5)
    assert target.masks.dtype == torch.bool
    assert torch.equal(target.masks, expected)


@pytest.mark.parametrize("form", ["bitmasks", "polygons"])
def test_an_image_without_objects_is_a_target_without_objects(form):
    given = instances(16, 16, [])
    given.gt_masks = BitMasks(torch.zeros(0, 16, 16)) if form == "bitmasks" else PolygonMasks([])
    target = Targets.from_instances(given, 32, 32, num_classes=5)
    assert len(target) == 0
    assert target.boxes.shape == (0, 4)
    assert target.masks.shape == (0, 32, 32)


@pytest.mark.parametrize("label", [-1, 5])
def test_classes_outside_the_range_name_the_key(label):
    given = instances(16, 16, [[2, 4, 10, 12]])
    given.gt_classes[:] = label
    with pytest.raises(DatasetError, match=f"Classes {label} to {label} .*NUM_CLASSES is 5"):
        Targets.from_instances(given, 16, 16, num_classes=5)


def test_objects_may_have_boxes_alone():
    given = instances(16, 16, [[2, 4, 10, 12]])
    assert Targets.from_instances(given, 32, 32, num_classes=5, with_masks=False).masks is None
    given.remove("gt_masks")
    target = Targets.from_instances(given, 32, 32, num_classes=5)
    assert target.masks is None
    assert target.boxes.tolist() == [[6 / 32, 8 / 32, 8 / 32, 8 / 32]]


def test_boxes_are_supervised_unless_instances_say_otherwise():
    given = instances(16, 16, [[2, 4, 10, 12], [0, 0, 4, 4]])
    assert Targets.from_instances(given, 16, 16, num_classes=5).box_supervised.tolist() == [True, True]
    given.gt_box_supervised = torch.tensor([False, True])
    assert Targets.from_instances(given, 16, 16, num_classes=5).box_supervised.tolist() == [False, True]


def test_the_boxes_of_some_classes_can_be_left_out():
    given = instances(16, 16, [[2, 4, 10, 12], [0, 0, 4, 4], [1, 1, 3, 3]], [0, 2, 0])
    given.gt_box_supervised = torch.tensor([True, True, False])
    target = Targets.from_instances(given, 16, 16, num_classes=3)
    assert target.supervise_boxes_of(torch.tensor([True, True, False])).box_supervised.tolist() == [True, False, False]


def test_joined_targets_number_objects_and_masks_of_a_batch():
    def target(*boxes: list[int], with_masks: bool = True) -> Targets:
        return Targets.from_instances(instances(8, 8, list(boxes)), 8, 8, 5, with_masks=with_masks)

    joined = JoinedTargets([target([0, 0, 4, 4]), target([0, 0, 8, 8], with_masks=False), target(*[[0, 0, 2, 2]] * 2)])
    objects = [torch.tensor(index) for index in ([0], [0], [1, 0])]
    assert joined.objects([(torch.zeros_like(index), index) for index in objects]).tolist() == [0, 1, 3, 2]
    assert joined.masks_of(1, objects[1]) is None
    assert joined.masks_of(2, objects[2]).tolist() == [2, 1]
    assert joined.masks.flatten(1).sum(1).tolist() == [16, 4, 4]


def test_masks_larger_than_the_canvas_are_an_error():
    with pytest.raises(DatasetError, match=r"\(40, 40\) px do not fit on a canvas of \(32, 64\) px"):
        Targets.from_instances(instances(40, 40, [[2, 4, 10, 12]]), 32, 64, num_classes=5)


def test_share_of_a_box_in_a_region_of_crowd():
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, :16, :32] = True
    region = Instances((64, 64), gt_classes=torch.zeros(1), gt_any_class=torch.ones(1, dtype=torch.bool))
    region.gt_masks = BitMasks(masks)
    crowd = CrowdRegions.from_instances(region, 64, 64, torch.device("cpu"))
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]])
    assert crowd.share(boxes)[:, 0].tolist() == [0.5, 1.0, 0.0, 0.0]
    pixel, above, beside = [0.5 / 64] * 2 + [1 / 64] * 2, [0.25, 0.0, 0.5, 0.0], [0.0, 0.1, 0.0, 0.2]
    assert crowd.share(torch.tensor([pixel, above, beside]))[:, 0].tolist() == [1.0, 0.0, 0.0]


BITMAPS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))


def encode(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


@settings(derandomize=True, deadline=None)
@given(BITMAPS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_crop_at_its_place_has_the_canvass_rle(crop, top, left, below, right) -> None:
    canvas = np.pad(crop, ((top, below), (left, right)))
    assert place_crop(crop, top, left, canvas.shape) == encode(canvas)
    cut, y, x = crop_of(encode(canvas))
    assert np.array_equal(cut, canvas[y : y + cut.shape[0], x : x + cut.shape[1]])
    assert cut.sum() == canvas.sum()


@pytest.fixture
def dense() -> torch.Tensor:
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[2, 4, 0] = True
    return masks


def test_masks_survive_the_round_trip(dense) -> None:
    masks = RleMasks.of(dense)
    assert len(masks) == 3
    assert torch.equal(masks.tensor, dense)
    assert np.array_equal(np.asarray(masks), dense.numpy())
    assert RleMasks.of(masks) is masks
    assert RleMasks.of(BitMasks(dense)).rles == masks.rles
    assert torch.equal(RleMasks.cat([masks, masks]).tensor, torch.cat((dense, dense)))


def test_masks_are_chosen_like_rows_of_a_tensor(dense) -> None:
    masks = RleMasks.of(dense)
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, None)):
        assert torch.equal(masks[index].tensor, dense[index])
    assert torch.equal(masks[2].tensor, dense[2:])
    assert masks[torch.zeros(0, dtype=torch.int64)].tensor.shape == (0, 5, 7)


def test_areas_and_boxes_are_those_of_the_pixels(dense) -> None:
    masks = RleMasks.of(dense)
    assert masks.area().tolist() == [8, 0, 1]
    assert masks.get_bounding_boxes().tensor.tolist() == [[2, 1, 6, 3], [0, 0, 0, 0], [0, 4, 1, 5]]


@pytest.mark.parametrize("form", [lambda masks: masks, RleMasks.of])
def test_instances_in_the_format_of_coco(dense, form) -> None:
    found = Instances((5, 7), scores=torch.tensor([0.5, 0.25]), pred_classes=torch.tensor([1, 0]))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 1, 6, 3], [0, 4, 1, 5]]))
    found.pred_masks = form(dense[[0, 2]])
    first, second = instances_to_coco(found, "a", [7, 9])
    assert (first["image_id"], first["category_id"], first["score"]) == ("a", 9, 0.5)
    assert first["bbox"] == [2, 1, 4, 2]
    assert np.array_equal(mask_util.decode(first["segmentation"]), dense[0].numpy())
    assert isinstance(first["segmentation"]["counts"], str)
    assert second["category_id"] == 7
    assert instances_to_coco(found, 0)[0]["category_id"] == 1


def test_instances_without_masks_have_no_segmentation() -> None:
    found = Instances((5, 7), scores=torch.ones(1), pred_classes=torch.zeros(1, dtype=torch.int64))
    found.pred_boxes = Boxes(torch.tensor([[0.0, 0, 2, 2]]))
    assert "segmentation" not in instances_to_coco(found, 0)[0]
