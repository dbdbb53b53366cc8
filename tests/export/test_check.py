"""The check of an exported file finds what is beyond its bars, and nothing else."""

import numpy as np
import pytest

from dimaskdino.export.check import differences, to_detectron2


def result(**changes: object) -> dict:
    masks = np.zeros((2, 20, 20), bool)
    masks[0, :10] = masks[1, 10:] = True
    boxes = np.array([[0, 0, 20, 10], [0, 10, 20, 20]], np.float32)
    found = {"scores": np.array([0.9, 0.5]), "labels": np.array([1, 2]), "boxes": boxes, "masks": masks}
    return {name: value.copy() for name, value in found.items()} | changes


def test_the_same_is_the_same():
    assert differences(result(), result()) == []
    assert differences(result(boxes=result()["boxes"] + 0.09, scores=np.array([0.9009, 0.5])), result()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes": result()["boxes"] + 0.11},
        {"scores": np.array([0.902, 0.5])},
        {"labels": np.array([3, 2])},
        {"masks": np.roll(result()["masks"], 1, axis=1)},
        {"scores": np.array([0.9]), "labels": np.array([1]), "boxes": result()["boxes"][:1]},
    ],
)
def test_what_differs_is_found(changes):
    assert differences(result(**changes), result()) != []


def test_segments_and_maps_are_compared():
    ids = np.repeat([[1], [2]], 10, axis=0) * np.ones((1, 20), int)
    segments = [{"id": 1, "category_id": 4, "isthing": True}, {"id": 2, "category_id": 5, "isthing": False}]
    scores = np.stack([ids == 1, ids == 2]).astype(np.float32)
    expected = {"panoptic": ids, "segments": segments, "semantic": scores}
    renumbered = {"panoptic": 3 - ids, "segments": [segments[0] | {"id": 2}, segments[1] | {"id": 1}]}
    assert differences(expected | renumbered, expected) == []
    assert differences(expected | {"panoptic": np.roll(ids, 1, axis=0)}, expected) != []
    assert differences(expected | {"segments": segments[:1]}, expected) != []
    assert differences(expected | {"semantic": scores + 2e-3}, expected) != []


def test_arrays_become_what_detectron2_evaluates() -> None:
    found = to_detectron2(result(size=(20, 20), labels=np.array([1, 2])))
    assert found.keys() == {"instances"}
    assert found["instances"].image_size == (20, 20)
    assert found["instances"].pred_boxes.tensor.tolist() == result()["boxes"].tolist()
    assert found["instances"].pred_masks.sum((1, 2)).tolist() == [200, 200]
    segments = to_detectron2(
        {"panoptic": np.ones((2, 3), np.int32), "segments": [{"id": 1}], "semantic": np.zeros((4, 2, 3))}
    )
    assert segments.keys() == {"panoptic_seg", "sem_seg"}
    assert segments["panoptic_seg"][1] == [{"id": 1}]
    assert segments["sem_seg"].shape == (4, 2, 3)
