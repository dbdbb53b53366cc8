import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as mask_util

from dimaskdino.structures import RleMasks, instances_to_coco
from dimaskdino.structures.rle_masks import crop_of, place_crop, rle_from_edges, run_edges

BITMAPS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))


def encode(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


@settings(derandomize=True, deadline=None)
@given(BITMAPS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_crop_at_its_place_has_the_canvass_rle(crop, top, left, below, right) -> None:
    canvas = np.pad(crop, ((top, below), (left, right)))
    assert rle_from_edges(run_edges(crop, top, left, canvas.shape[0]), canvas.shape) == encode(canvas)
    assert place_crop(crop, top, left, canvas.shape) == encode(canvas)
    cut, y, x = crop_of(encode(canvas))
    assert np.array_equal(cut, canvas[y : y + cut.shape[0], x : x + cut.shape[1]])
    assert cut.sum() == canvas.sum()


def test_pieces_from_left_to_right_make_one_rle() -> None:
    mask = np.random.default_rng(0).random((6, 10)) > 0.3
    pieces = [run_edges(mask[:, start : start + 3], 0, start, 6) for start in range(0, 10, 3)]
    assert rle_from_edges(np.concatenate(pieces), mask.shape) == encode(mask)


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
