import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks

from dimaskdino.errors import DatasetError
from dimaskdino.structures import JoinedTargets, Targets
from tests.tiny_model import instances


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
