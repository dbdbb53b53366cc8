"""Panoptic and semantic results are what the releases give, with every switch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dimaskdino.modeling.postprocessing import Frame, PostProcessor
from dimaskdino.structures import MaskLogits, Stage, StagePrediction
from tests.parity.recorded import OUTPUT_SIZE, images, model, recorded
from tests.parity.test_outputs import assert_close, assert_same_instances

PANOPTIC, SEMANTIC = "maskdino_panoptic_tiny", "maskdino_semantic_tiny"
# The release's variants, and the keys below MODEL.MaskDINO.TEST that differ.
VARIANTS: dict[str, dict[str, Any]] = {
    "overlap_0.3": {"OVERLAP_THRESHOLD": 0.3},
    "overlap_0": {"OVERLAP_THRESHOLD": 0.0},
    "object_0.93": {"OBJECT_MASK_THRESHOLD": 0.93, "OVERLAP_THRESHOLD": 0.2},
    "object_none": {"OBJECT_MASK_THRESHOLD": 0.9999},
    "no_transform": {"PANO_TRANSFORM_EVAL": False, "OVERLAP_THRESHOLD": 0.2},
    "temperature_0.3": {"PANO_TEMPERATURE": 0.3, "OVERLAP_THRESHOLD": 0.2},
    "focus_on_box": {"TEST_FOUCUS_ON_BOX": True},
}
CASES = [
    *((PANOPTIC, "eval", {}), (SEMANTIC, "eval", {})),
    *((PANOPTIC, f"variants/{variant}", keys) for variant, keys in VARIANTS.items()),
    (SEMANTIC, "variants/postprocess_before", {"SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": True}),
]
POST_CASES = [
    *((PANOPTIC, "post/release", {}), (SEMANTIC, "post/release", {})),
    *((PANOPTIC, f"post/{variant}", keys) for variant, keys in VARIANTS.items()),
]
# A model's pixels may change sides by rounding; README of the recordings: 0.003 %.
PIXELS = 1e-4


def configured(name: str, keys: dict[str, Any]):
    return model(name, **{f"TEST__{key}": value for key, value in keys.items()}).eval()


def assert_recorded(result: dict[str, Any], name: str, prefix: str, size: tuple[int, int]) -> None:
    """All that was recorded under ``prefix`` is in ``result``."""
    data = recorded(name)
    compared = 0
    if f"{prefix}/sem_seg" in data:
        theirs = data[f"{prefix}/sem_seg"]
        assert result["sem_seg"].shape == (theirs.shape[0], *size)
        stride = size[0] // theirs.shape[1]
        assert_close(result["sem_seg"][:, ::stride, ::stride], theirs, 1e-4)
        compared += 1
    if f"{prefix}/panoptic" in data:
        assert_same_segments(result["panoptic_seg"], data[f"{prefix}/panoptic"], data[f"{prefix}/panoptic_info"])
        compared += 1
    if f"{prefix}/instances/boxes" in data:
        assert_same_instances(result["instances"], data, f"{prefix}/instances", size)
        compared += 1
    assert compared


def assert_same_segments(ours: tuple[Tensor, list[dict[str, Any]]], pixels: np.ndarray, info: np.ndarray) -> None:
    panoptic, segments = ours
    assert [[each["id"], each["category_id"], each["isthing"]] for each in segments] == info.tolist()
    assert all(type(each["isthing"]) is bool for each in segments)
    assert panoptic.dtype == torch.int32
    assert panoptic.shape == pixels.shape
    assert (panoptic.numpy() != pixels).mean() <= PIXELS


@pytest.mark.parametrize(("name", "prefix", "keys"), CASES, ids=[f"{name}-{prefix}" for name, prefix, _ in CASES])
def test_results_of_the_model(name, prefix, keys):
    height, width = OUTPUT_SIZE
    with torch.no_grad():
        (result,) = configured(name, keys)([{"image": images(name)[0], "height": height, "width": width}])
    assert_recorded(result, name, prefix, OUTPUT_SIZE)


@pytest.mark.parametrize(
    ("name", "prefix", "keys"), POST_CASES, ids=[f"{name}-{prefix}" for name, prefix, _ in POST_CASES]
)
def test_results_of_made_up_logits(name, prefix, keys):
    data = recorded(name)
    masks = torch.from_numpy(data["post/mask_pred"])
    logits, boxes = (torch.from_numpy(data[f"post/{key}"])[None] for key in ("mask_cls", "mask_box"))
    prediction = StagePrediction(Stage("layer"), logits, boxes, MaskLogits(torch.eye(len(masks))[None], masks[None]))
    size = (masks.shape[-2], masks.shape[-1])
    post_processor: PostProcessor = configured(name, keys).post_processor
    assert_recorded(post_processor(prediction, 0, Frame(size, size, size)), name, prefix, size)


def test_a_model_gives_only_the_results_that_are_asked_for():
    batch = [{"image": images(PANOPTIC)[0]}]
    for asked in ("INSTANCE_ON", "SEMANTIC_ON", "PANOPTIC_ON"):
        keys = {key: key == asked for key in ("INSTANCE_ON", "SEMANTIC_ON", "PANOPTIC_ON")}
        with torch.no_grad():
            (result,) = configured(PANOPTIC, keys)(batch)
        assert list(result) == [
            {"INSTANCE": "instances", "SEMANTIC": "sem_seg", "PANOPTIC": "panoptic_seg"}[asked[:-3]]
        ]
