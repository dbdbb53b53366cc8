import math

import pytest
import torch

from dimaskdino.layers.boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, masks_to_boxes, xyxy_to_cxcywh


def test_conversions_by_hand():
    corners = torch.tensor([[[0.1, 0.2, 0.5, 0.8]]])
    centered = torch.tensor([[[0.3, 0.5, 0.4, 0.6]]])
    torch.testing.assert_close(xyxy_to_cxcywh(corners), centered)
    torch.testing.assert_close(cxcywh_to_xyxy(centered), corners)


def test_inverse_sigmoid_undoes_sigmoid():
    x = torch.tensor([-5.0, -1.0, 0.0, 2.0])
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x)


@pytest.mark.parametrize(("value", "expected"), [(0.0, math.log(1e-5)), (1.0, -math.log(1e-5)), (-3.0, math.log(1e-5))])
def test_inverse_sigmoid_stays_finite_at_the_ends_and_beyond(value, expected):
    # At 0: log(1e-5 / 1); at 1: log(1 / 1e-5); values outside [0, 1] count as the nearest end.
    assert inverse_sigmoid(torch.tensor(value)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inverse_sigmoid_keeps_the_dtype(dtype):
    assert inverse_sigmoid(torch.tensor([0.25, 0.75], dtype=dtype)).dtype == dtype


def test_inverse_sigmoid_takes_another_eps():
    assert inverse_sigmoid(torch.tensor(0.0), eps=1e-3).item() == pytest.approx(math.log(1e-3), rel=1e-6)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], 1.0),  # the same box
        ([1.0, 0.0, 3.0, 2.0], 2 / 6),  # overlap 2 of union 6, hull 6
        ([1.0, 1.0, 3.0, 3.0], 1 / 7 - 2 / 9),  # overlap 1 of union 7, hull 9 of which 2 empty
        ([2.0, 0.0, 4.0, 2.0], 0.0),  # they touch: no overlap, hull 8 is all union
        ([4.0, 0.0, 6.0, 2.0], -4 / 12),  # apart: hull 12, union 8
    ],
)
def test_generalized_iou_by_hand(other, expected):
    value = generalized_iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor(other))
    assert value.item() == pytest.approx(expected, abs=1e-5)


def test_generalized_iou_broadcasts_to_all_pairs():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    pairs = generalized_iou(boxes[:, None], boxes[None])
    torch.testing.assert_close(pairs, torch.tensor([[1.0, -1 / 3], [-1 / 3, 1.0]]), rtol=0, atol=1e-5)


def test_generalized_iou_of_two_empty_boxes_is_zero():
    point = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert generalized_iou(point, point).item() == 0.0


def test_generalized_iou_adds_1e_6_to_areas():
    # A box of one pixel of a 1024 px image has area 9.5e-7, so even a perfect hit scores about one half.
    side = 1 / 1024
    box = torch.tensor([0.0, 0.0, side, side])
    assert generalized_iou(box, box).item() == pytest.approx(side**2 / (side**2 + 1e-6), rel=1e-4)


def test_generalized_iou_has_finite_gradients_for_empty_boxes():
    box = torch.full((4,), 0.5, requires_grad=True)
    generalized_iou(box, torch.tensor([0.5, 0.5, 0.5, 0.5])).backward()
    assert box.grad.isfinite().all()


def mask_of(*pixels: tuple[int, int]) -> torch.Tensor:
    """(4, 6) mask with these (y, x) pixels."""
    mask = torch.zeros(4, 6, dtype=torch.bool)
    for y, x in pixels:
        mask[y, x] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "inclusive", "exclusive"),
    [
        (mask_of((1, 2)), [2, 1, 2, 1], [2, 1, 3, 2]),  # one pixel
        (mask_of((0, 1), (2, 4)), [1, 0, 4, 2], [1, 0, 5, 3]),  # two pixels apart
        (mask_of((3, 0), (3, 5)), [0, 3, 5, 3], [0, 3, 6, 4]),  # a row at the lower edge
        (mask_of(), [6, 4, 6, 4], [0, 0, 0, 0]),  # empty: the far corner without size, or zeros
        (~mask_of(), [0, 0, 5, 3], [0, 0, 6, 4]),  # everything
    ],
    ids=["pixel", "pair", "row", "empty", "full"],
)
def test_masks_to_boxes_by_hand(mask, inclusive, exclusive):
    stack = torch.stack((mask, mask_of((0, 0))))[None]
    for flag, expected in ((True, inclusive), (False, exclusive)):
        boxes = masks_to_boxes(stack, inclusive=flag)
        assert boxes.shape == (1, 2, 4)
        assert boxes.dtype == torch.float32
        assert boxes[0, 0].tolist() == expected


def test_masks_to_boxes_takes_no_masks():
    assert masks_to_boxes(torch.zeros(0, 4, 6, dtype=torch.bool), inclusive=True).shape == (0, 4)
