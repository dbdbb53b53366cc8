"""In evaluation our models predict what the releases predict from the same weights."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from torch import Tensor

from dimaskdino.structures import StagePrediction
from tests.parity.recorded import NAMES, OUTPUT_SIZE, images, model, our_stage, recorded, recorded_stages, unpack

INSTANCE_NAMES = tuple(name for name in NAMES if "eval/instances/boxes" in recorded(name))
STAGES = [(name, stage) for name in NAMES for stage in recorded_stages(name)]


class Run:
    """One image through a model, and what came out on the way."""

    def __init__(self, name: str) -> None:
        height, width = OUTPUT_SIZE
        net = model(name).eval()
        self.outputs: dict = {}
        for part, module in {
            "backbone": net.backbone,
            "encoder": net.sem_seg_head.pixel_decoder,
            "decoder": net.sem_seg_head.predictor,
        }.items():
            module.register_forward_hook(lambda _m, _i, output, part=part: self.outputs.update({part: output}))
        with torch.no_grad():
            (result,) = net([{"image": images(name)[0], "height": height, "width": width}])
        self.results: dict = result
        self.stages: dict[str, StagePrediction] = {stage.name: stage for stage in self.outputs["decoder"].stages}


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {name: Run(name) for name in NAMES}


def assert_close(ours: Tensor, theirs: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("feature", ["res2", "res3", "res4", "res5"])
@pytest.mark.parametrize("name", NAMES)
def test_backbone_features_are_the_same(runs, name, feature):
    assert_close(
        runs[name].outputs["backbone"][feature][:, ::16, ::2, ::2], recorded(name)[f"eval/backbone/{feature}"], 1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_encoder_tokens_are_the_same_in_the_same_order(runs, name):
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in runs[name].outputs["encoder"].levels], dim=1)
    assert_close(tokens[:, ::7, ::16], recorded(name)["eval/tokens"], 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_stages_are_the_recorded_ones(runs, name):
    assert set(runs[name].stages) == {our_stage(name, stage) for stage in recorded_stages(name)}


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_class_logits_are_the_same(runs, name, stage):
    assert_close(runs[name].stages[our_stage(name, stage)].logits, recorded(name)[f"eval/{stage}/pred_logits"], 1e-4)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_boxes_are_the_same(runs, name, stage):
    assert_close(runs[name].stages[our_stage(name, stage)].boxes, recorded(name)[f"eval/{stage}/pred_boxes"], 1e-4)


@pytest.mark.parametrize(
    ("name", "stage"), [pair for pair in STAGES if f"eval/{pair[1]}/pred_masks" in recorded(pair[0])]
)
def test_mask_logits_are_the_same(runs, name, stage):
    masks = runs[name].stages[our_stage(name, stage)].masks.dense()
    assert_close(masks, recorded(name)[f"eval/{stage}/pred_masks"], 1e-3)


def groups_of_equal_score(scores: np.ndarray) -> Iterator[slice]:
    """Runs of exactly equal scores; within one the order says nothing."""
    starts = [0, *(np.flatnonzero(np.diff(scores)) + 1), len(scores)]
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        yield slice(int(start), int(stop))


def mask_iou(one: Tensor, two: Tensor) -> float:
    """1 for two empty masks."""
    union = (one | two).sum().item()
    return (one & two).sum().item() / union if union else 1.0


@pytest.mark.parametrize("name", INSTANCE_NAMES)
def test_final_instances_are_the_same_in_the_same_order(runs, name):
    assert_same_instances(runs[name].results["instances"], recorded(name), "eval/instances", OUTPUT_SIZE)


def assert_same_instances(ours: Instances, data: Mapping[str, np.ndarray], prefix: str, size: tuple[int, int]) -> None:
    theirs = {key: data[f"{prefix}/{key}"] for key in ("boxes", "scores", "classes")}
    masks = unpack(data[f"{prefix}/masks_packed"], size[1])
    assert len(ours) == len(masks)
    assert ours.image_size == size
    assert_close(ours.scores, theirs["scores"], 1e-4)
    for group in groups_of_equal_score(theirs["scores"]):
        left = list(range(len(ours)))[group]
        for index in range(len(masks))[group]:
            box = torch.from_numpy(theirs["boxes"][index])
            same = [i for i in left if (ours.pred_boxes.tensor[i] - box).abs().max() <= 0.01]
            same = [i for i in same if ours.pred_classes[i] == theirs["classes"][index]]
            same = [i for i in same if mask_iou(ours.pred_masks[i], masks[index]) >= 0.999]
            assert same, f"result {index} of the release is not among ours at {left}"
            left.remove(same[0])


@pytest.mark.parametrize("name", INSTANCE_NAMES)
def test_the_recorded_masks_have_the_recorded_areas(name):
    # Guards the unpacking above.
    data = recorded(name)
    areas = unpack(data["eval/instances/masks_packed"], OUTPUT_SIZE[1]).sum((1, 2))
    assert areas.tolist() == data["eval/instances/mask_area"].tolist()
