"""The runner's arithmetic, which has no torch, against torch and against numbers by hand."""

import numpy as np
import predict_onnx
import pytest
import torch
from predict_onnx import Frame, Model, interpolation, run_lengths
from pycocotools import mask as mask_util

from dimaskdino.modeling.postprocessing import Frame as TorchFrame

DESCRIPTION = {"version": 1, "canvas": None, "batch": None, "divisibility": 32, "min_size": 800, "max_size": 1333}
DESCRIPTION |= {"pad_value": [1.0, 2.0, 3.0], "format": "BGR", "ignores_padding": False}


def model(**changes: object) -> Model:
    return Model(description=DESCRIPTION | changes, run=dict)


@pytest.mark.parametrize("sizes", [((64, 96), (50, 90), (25, 45)), ((64, 64), (64, 64), (150, 130)), ((32, 32),) * 3])
def test_masks_are_resized_as_by_the_model(sizes):
    logits = torch.randn(2, 16, 24)
    expected = TorchFrame(*sizes).crop_and_resize(TorchFrame(*sizes).on_canvas(logits))
    frame = Frame(*sizes)
    found = np.stack([frame.resize(each.numpy()) for each in logits])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    in_steps = np.stack([frame.crop(frame.on_canvas(each.numpy())) for each in logits])
    np.testing.assert_allclose(in_steps, expected.numpy(), atol=1e-4)


def test_interpolation_is_between_centers_of_cells():
    assert interpolation(2, 4).tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]


@pytest.mark.parametrize(
    ("size", "changes", "expected"),
    [
        ((480, 640), {}, (800, 1067)),
        ((300, 1000), {}, (400, 1333)),
        ((480, 640), {"min_size": 0}, (480, 640)),
        ((480, 640), {"canvas": [640, 640]}, (480, 640)),
        ((480, 640), {"canvas": [1344, 1344]}, (800, 1067)),
    ],
)
def test_sizes_follow_the_rule_and_fit_the_canvas(size, changes, expected):
    assert model(**changes)._resized(*size) == expected


def test_images_are_padded_with_the_mean_in_model_order():
    small = model(min_size=0)
    picture = np.zeros((30, 20, 3), np.uint8)
    picture[..., 0] = 200  # red
    inputs, inner = small.prepare([picture])
    images = inputs["images"]
    assert (images.shape, inner) == ((1, 3, 32, 32), [(30, 20)])
    assert images[0, :, 0, 0].tolist() == [0, 0, 200]
    assert images[0, :, 31, 0].tolist() == images[0, :, 0, 31].tolist() == [1, 2, 3]


@pytest.mark.parametrize("first", [False, True])
def test_run_lengths_are_those_of_coco(first):
    mask = np.random.default_rng(0).random((5, 7)) > 0.5
    mask[0, 0] = first
    rle = run_lengths(mask)
    np.testing.assert_array_equal(mask_util.decode(mask_util.frPyObjects(rle, *rle["size"])), mask)


def test_a_file_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version"):
        predict_onnx.Model(description=DESCRIPTION | {"version": 0}, run=dict)
