"""What DINO's release and detrex computed from made-up weights (tests/data/NAME.npz), and our model with the same.

Recorded on CPU in float32 on two made-up images.
"""

import functools
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dimaskdino.checkpoint import from_release
from dimaskdino.config import Config, get_cfg
from dimaskdino.modeling.registry import DENOISING_REGISTRY
from dimaskdino.modeling.transformer_decoder import ContrastiveDenoising
from tests.parity.recorded import recorded
from tests.parity.releases import release

NAMES = ("dino_tiny", "detrex_dino_tiny")
FULL_NAMES = (
    "dino_4scale_r50",
    "dino_5scale_r50",
    "dino_4scale_swinl",
    "dino_5scale_swinl",
    "detrex_dino_r50_4scale",
    "detrex_dino_r50_5scale",
)
OUTPUT_SIZE = (240, 300)
Batch = list[dict[str, Any]]


@DENOISING_REGISTRY.register()
class RecordedDenoising(ContrastiveDenoising):
    """Takes the recorded draws of one training step in place of random ones."""

    draws: dict[str, Tensor]

    def draw_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.draws[name].flatten(0, 1) for name in ("draw_label_p", "draw_label_new"))

    def draw_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.draws[name].flatten(0, 1) for name in ("draw_box_sign", "draw_box_part"))


def cfg(name: str) -> Config:
    """Our configuration of a recorded model."""
    values = release(name).config_values
    options = _detrex_options(name, values) if name.startswith("detrex") else _dino_options(values)
    built = get_cfg()
    built.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "DINO", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.FORMAT", "RGB"),
            *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.STRIDE_IN_1X1", False),
            *("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]),
            *(item for pair in options.items() for item in pair),
        ]
    )
    return built


def _dino_options(values: dict[str, Any]) -> dict[str, Any]:
    features = [f"res{index + 2}" for index in values["return_interm_indices"]]
    options = {
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.RESNETS.OUT_FEATURES": features,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": values["num_classes"],
        "MODEL.DINO.IN_FEATURES": features,
        "MODEL.DINO.NUM_LEVELS": values["num_feature_levels"],
        "MODEL.DINO.DIM_FEEDFORWARD": values["dim_feedforward"],
        "MODEL.DINO.ENC_LAYERS": values["enc_layers"],
        "MODEL.DINO.DEC_LAYERS": values["dec_layers"],
        "MODEL.DINO.NUM_QUERIES": values["num_queries"],
        "MODEL.DINO.DN_NUM": values["dn_number"],
        "MODEL.DINO.DN_LABEL_NOISE": values["dn_label_noise_ratio"],
        "MODEL.DINO.DN_BOX_NOISE": values["dn_box_noise_scale"],
        "TEST.DETECTIONS_PER_IMAGE": values["num_select"],
    }
    if values["backbone"].startswith("swin_L"):
        options |= {
            "MODEL.BACKBONE.NAME": "D2SwinTransformer",
            "MODEL.SWIN.EMBED_DIM": 192,
            "MODEL.SWIN.DEPTHS": [2, 2, 18, 2],
            "MODEL.SWIN.NUM_HEADS": [6, 12, 24, 48],
            "MODEL.SWIN.WINDOW_SIZE": 12,
            "MODEL.SWIN.OUT_FEATURES": features,
        }
    return options


def _detrex_options(name: str, values: dict[str, Any]) -> dict[str, Any]:
    features = ["res2", "res3", "res4", "res5"] if "5scale" in name else ["res3", "res4", "res5"]
    of_tiny = {
        "MODEL.DINO.DIM_FEEDFORWARD": 64,
        "MODEL.DINO.ENC_LAYERS": 2,
        "MODEL.DINO.DEC_LAYERS": 3,
        "TEST.DETECTIONS_PER_IMAGE": 30,
    }
    return {
        "MODEL.BACKBONE.FREEZE_AT": 1,
        "MODEL.RESNETS.OUT_FEATURES": features,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": values["num_classes"],
        "MODEL.DINO.IN_FEATURES": features,
        "MODEL.DINO.NUM_LEVELS": len(features) + 1,
        "MODEL.DINO.NUM_QUERIES": values["num_queries"],
        "MODEL.DINO.SHARED_HEADS": False,
        "MODEL.DINO.DN_NUM": values["dn_number"],
        "MODEL.DINO.PE_TEMPERATURE": 10000.0,
        "MODEL.DINO.PE_OFFSET": -0.5,
    } | (of_tiny if "tiny" in name else {})


@functools.cache
def state(name: str) -> dict[str, Tensor]:
    """The made-up weights under our names."""
    return from_release(release(name).state_dict())


def model(name: str) -> nn.Module:
    """Our model with the recorded settings and weights, which takes recorded draws in training."""
    settings = cfg(name)
    settings.MODEL.DINO.DN_NAME = RecordedDenoising.__name__
    built = build_model(settings)
    built.load_state_dict(state(name))
    return built


def images(name: str, case: str) -> Batch:
    """The batch of a recorded case, without objects."""
    data = recorded(name)
    both = torch.from_numpy(data["images"])
    if case in ("eval", "odd"):
        height, width = data["odd/size"] if case == "odd" else both.shape[-2:]
        cut = [both[0, :, :height, :width]]
    elif case.startswith("pad"):
        height, width = data["pad/size1"]
        cut = [both[0], both[1, :, :height, :width]]
    else:
        cut = list(both)
    height, width = OUTPUT_SIZE
    return [{"image": image, "height": height, "width": width} for image in cut]


def training_batch(name: str, case: str) -> Batch:
    """The batch of a recorded training step."""
    batch = images(name, case)
    for index, given in enumerate(batch):
        given["instances"] = _objects(recorded(name), case, index, tuple(given["image"].shape[-2:]))
    return batch


def _objects(data: Any, case: str, index: int, size: tuple[int, int]) -> Instances:
    source = "padtrain" if case == "padtrain" and index == 1 else "train"
    boxes = torch.from_numpy(data[f"{source}/boxes{index}"])
    classes = torch.from_numpy(data[f"{source}/classes{index}"])
    if case == "nonetrain" or (case == "emptytrain" and index == 1):
        boxes, classes = boxes[:0], classes[:0]
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)


def draws(name: str, case: str) -> dict[str, Tensor]:
    """The recorded draws of a training step, (groups, 2, objects[, 4])."""
    keys = [key for key in recorded(name) if key.startswith(f"{case}/dn/draw")]
    return {key.rsplit("/", 1)[1]: torch.from_numpy(recorded(name)[key]) for key in keys}


def our_stage(recorded_name: str) -> str:
    """Our name of a recorded stage; aux{i} is the prediction of layer i, and the last of the three is "final"."""
    if recorded_name == "final":
        return "layer.2"
    return recorded_name.replace("aux", "layer.")


def our_names(name: str) -> dict[str, str]:
    """Our name of every tensor of a recorded model; a number in each finds it again."""
    keys = [key for key in release(name).keys if key not in release(name).alias]
    ours = from_release({key: torch.full((2,), index) for index, key in enumerate(keys)})
    return {keys[int(value[0])]: key for key, value in ours.items()}


def our_loss(recorded_name: str) -> str:
    """Our name of a loss."""
    return recorded_name.replace("loss_class", "loss_ce").replace("_enc", "_interm")


def assert_close(ours: Tensor, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), rtol=0, atol=tolerance)
