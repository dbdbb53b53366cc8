"""The whole model where its tensors are not on the CPU: nothing is left behind, and little crosses."""

import ast
import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

import dimaskdino
from dimaskdino.engine.train_step import TrainStep
from dimaskdino.layers import fast_layers, ms_deform_attn_ops
from dimaskdino.solver import GradientClipper, parameter_groups
from tests.accelerator import DEVICE, accelerator, send
from tests.tiny_model import ONE_STAGE, sample, tiny_cfg, tiny_model

BOXES = [[3, 4, 30, 40], [20, 20, 60, 60]]
VARIANTS = [
    {},
    {"TRANSFORMER_DECODER_NAME": "MaskDINODecoder"},
    {"BATO__ENABLED": False},
    {"DI__ENABLED": False, "BATO__GUIDANCE": "t_i"},
    {"DI__RANDOM_POSITION": True, "BATO__GTG": False},
    {"DI__NUM_SELECTED": [12, 10, 8], "DI__SINGLE_DELTA_BOXES": True},
    {"INITIALIZE_BOX_TYPE": "bitmask", "LEARN_TGT": True},
    {"INITIAL_PRED": False, "INITIALIZE_BOX_TYPE": "no"},
    {"DN": "standard", "BOX_LOSS": False},
    {"DN": "no", "DEEP_SUPERVISION": False},
    ONE_STAGE,
]
RESNET = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
}
SWIN = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [2, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 2, 2],
    "MODEL.SWIN.APE": True,
}
BACKBONES = {"resnet": RESNET, "swin": SWIN, "swin with checkpoints": SWIN | {"MODEL.SWIN.USE_CHECKPOINT": True}}


@pytest.fixture(autouse=True)
def plain_form(monkeypatch):
    """The CPU's loops draw other random points than the form that all devices have; its layers round in other ways."""
    monkeypatch.setattr(ms_deform_attn_ops, "LOOPS_COMPILED", False)
    monkeypatch.setattr(fast_layers, "_ONEDNN", False)


def batch():
    """Images of different sizes, the second without objects."""
    return [sample(64, 96, BOXES), sample(60, 64, [], seed=1), sample(64, 64, BOXES[:1], seed=2)]


def train(model):
    torch.manual_seed(1)
    losses = model.train()(batch())
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


def assert_same(got, wanted):
    """Equal but for the rounding of operations that are put together in another way."""
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.device == DEVICE
        scale = max(wanted[name].abs().max().item(), 1e-3)
        torch.testing.assert_close(tensor.cpu(), wanted[name], rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("node", VARIANTS, ids=str)
def test_training_stays_on_the_device(node):
    check_training(tiny_model(**node))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_of_backbones_stays_on_the_device(backbone):
    check_training(tiny_model(BACKBONES[backbone]))


def check_training(model):
    remote = copy.deepcopy(model)
    losses, gradients = train(model)
    with accelerator():
        remote_losses, remote_gradients = train(send(remote))
        assert_same(remote_losses, losses)
        assert_same(remote_gradients, gradients)


@pytest.mark.parametrize("layers", [2, 4])
def test_training_crosses_once_each_way_besides_the_batch(layers):
    model = tiny_model(DEC_LAYERS=layers)
    with accelerator() as traffic:
        train(send(model))
    of_batch = 4 * len(batch())  # image, classes, boxes, masks
    assert len(traffic.to_device) == of_batch + 1, Counter(traffic.to_device)
    assert [place.split(":")[0] for place in traffic.to_host] == ["matcher.py"]
    assert traffic.waits == []


def steps_of_the_trainer(model, clip):
    torch.manual_seed(1)
    step = TrainStep(
        model=model,
        data_loader=[batch()] * 3,
        optimizer=torch.optim.SGD(parameter_groups(tiny_cfg(), model), lr=1e-3, momentum=0.9),
        clipper=GradientClipper(clip_type=clip, limit=0.1),
    )
    losses = []
    with EventStorage() as storage:
        for _ in range(3):
            step.run_step()
            losses.append(storage.latest()["total_loss"][0])
    return losses


@pytest.mark.parametrize("clip", GradientClipper.TYPES)
def test_training_step_waits_for_matcher_and_record(clip):
    wanted = steps_of_the_trainer(tiny_model(), clip)
    model = tiny_model()
    with accelerator() as traffic:
        assert steps_of_the_trainer(send(model), clip) == pytest.approx(wanted, rel=1e-4)
    assert [place.split(":")[0] for place in traffic.to_host] == 3 * ["matcher.py", "train_step.py"]
    assert traffic.waits == []


@pytest.mark.parametrize("node", [*VARIANTS, {"TEST__TEST_FOUCUS_ON_BOX": True}], ids=str)
def test_inference_stays_on_the_device(node):
    model = tiny_model({"TEST.EVAL_LAYERS": ["all"]}, **node)
    remote = copy.deepcopy(model)
    with torch.no_grad():
        torch.manual_seed(1)
        results = model(batch())
        torch.manual_seed(1)
        with accelerator():
            for got, wanted in zip(send(remote)(batch()), results, strict=True):
                assert got["layers"].keys() == wanted["layers"].keys()
                for stage, results in got["layers"].items():
                    assert_instances_match(results["instances"], wanted["layers"][stage]["instances"])


def assert_instances_match(got, wanted):
    assert got.scores.device == DEVICE
    moved = got.to("cpu")
    # A pixel at the threshold may fall on the other side, which moves the mean over the mask by less than 1 / area.
    flipped = (moved.pred_masks != wanted.pred_masks).flatten(1).sum(1)
    allowed = 1e-5 + flipped / wanted.pred_masks.flatten(1).sum(1).clamp(min=1)
    assert ((moved.scores - wanted.scores).abs() <= allowed).all()
    assert torch.equal(moved.pred_classes, wanted.pred_classes)
    torch.testing.assert_close(moved.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=0, atol=1e-3)
    assert (moved.pred_masks != wanted.pred_masks).float().mean() < 1e-3


def test_inference_waits_once_an_image():
    model = tiny_model()
    with accelerator() as traffic, torch.no_grad():
        send(model)(batch())
    assert len(traffic.to_device) == len(traffic.waits) == len(batch())
    assert traffic.to_host == []


def test_the_accelerator_refuses_what_a_gpu_refuses():
    with accelerator() as traffic:
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match=r"add.*on the device and on the host, the latter \[\(3,\)\]"):
            there + here
        with pytest.raises(TypeError, match="call .cpu"):
            there.numpy()
        assert (there + torch.tensor(1.0)).sum().item() == 6
        assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
        there.add_(here.to(DEVICE))
        assert there.cpu().tolist() == [2, 2, 2]
    assert (len(traffic.to_device), len(traffic.to_host), len(traffic.waits)) == (2, 2, 1)


# These choose a device, report it, or say what it can compute in; everything else takes it from its inputs.
MAY_NAME_DEVICES = {"engine/launch.py", "engine/devices.py", "env.py", "layers/precision.py", "devices.py"}


def device_literals(path: Path) -> list[str]:
    """Strings that name a CUDA device, and calls of .cuda(), in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(("cuda", "CUDA_")):
            found.append(f"{path.name}:{node.lineno} {node.value!r}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            found.append(f"{path.name}:{node.lineno} .cuda()")
    return found


def test_other_files_name_no_device():
    root = Path(dimaskdino.__file__).parent
    files = [path for path in root.rglob("*.py") if path.relative_to(root).as_posix() not in MAY_NAME_DEVICES]
    assert len(files) > 30
    assert [literal for path in files for literal in device_literals(path)] == []
