"""A model small enough for tests: a toy backbone, the real parts at width 64, and batches to feed it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn

import dimaskdino.modeling.meta_arch  # noqa: F401  (registers the model)
from dimaskdino.config import Config, get_cfg
from dimaskdino.structures import EncoderOutput, Targets

DIM = 64
NUM_CLASSES = 5


@BACKBONE_REGISTRY.register()
class ToyBackbone(Backbone):
    """Four convolutions: res2 to res5 at strides 4 to 32."""

    channels = {"res2": 8, "res3": 16, "res4": 24, "res5": 32}

    def __init__(self, cfg: Config, input_shape: ShapeSpec) -> None:
        super().__init__()
        widths = [3, *self.channels.values()]
        self.convs = nn.ModuleList(
            nn.Conv2d(narrow, wide, 3, padding=1) for narrow, wide in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        x = F.avg_pool2d(x, 2)
        for name, conv in zip(self.channels, self.convs, strict=True):
            x = conv(F.avg_pool2d(x, 2)).relu()
            features[name] = x
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=channels, stride=4 * 2**index)
            for index, (name, channels) in enumerate(self.channels.items())
        }


# Keys below MODEL.MaskDINO of a model whose queries are learnt, without any selection.
ONE_STAGE = {"TWO_STAGE": False, "DI__ENABLED": False, "INITIALIZE_BOX_TYPE": "no"}
TINY_OPTIONS: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "DIMaskDINO",
    "MODEL.DEVICE": "cpu",
    "MODEL.PIXEL_MEAN": [120.0, 110.0, 100.0],
    "MODEL.PIXEL_STD": [60.0, 60.0, 60.0],
    "MODEL.BACKBONE.NAME": "ToyBackbone",
    "MODEL.SEM_SEG_HEAD.NAME": "MaskDINOHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "low2high",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": NUM_CLASSES,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": DIM,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": DIM,
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 48,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME": "DIMaskDINODecoder",
    "MODEL.MaskDINO.HIDDEN_DIM": DIM,
    "MODEL.MaskDINO.DIM_FEEDFORWARD": 48,
    "MODEL.MaskDINO.DROPOUT": 0.0,
    "MODEL.MaskDINO.DEC_LAYERS": 3,
    "MODEL.MaskDINO.FIRST_SELECTED_QUERIES": 12,
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 8,
    "MODEL.MaskDINO.NUM_GUIDING_TOKENS": 4,
    "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "mask2box",
    "MODEL.MaskDINO.DN_NUM": 10,
    "MODEL.MaskDINO.TRAIN_NUM_POINTS": 64,
    "MODEL.MaskDINO.TEST.SEMANTIC_ON": False,
    "MODEL.MaskDINO.TEST.INSTANCE_ON": True,
    "TEST.DETECTIONS_PER_IMAGE": 6,
}


TINY_DINO: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "DINO",
    "MODEL.DINO.HIDDEN_DIM": DIM,
    "MODEL.DINO.DIM_FEEDFORWARD": 48,
    "MODEL.DINO.ENC_LAYERS": 1,
    "MODEL.DINO.DEC_LAYERS": 3,
    "MODEL.DINO.NUM_QUERIES": 8,
    "MODEL.DINO.DN_NUM": 10,
}


def tiny_dino(seed: int = 0, /, **node: Any) -> nn.Module:
    """The tiny DINO in evaluation mode; ``node`` are keys below MODEL.DINO."""
    return tiny_model(TINY_DINO | {f"MODEL.DINO.{key}": value for key, value in node.items()}, seed=seed)


def tiny_cfg(options: dict[str, Any] | None = None, /, **node: Any) -> Config:
    """The configuration of the tiny model.

    Args:
        options: other keys, by their full name.
        node: keys below MODEL.MaskDINO; a double underscore stands for the dot (DI__ENABLED).
    """
    pairs = TINY_OPTIONS | {f"MODEL.MaskDINO.{key.replace('__', '.')}": value for key, value in node.items()}
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in (pairs | (options or {})).items() for item in pair])
    return cfg


def tiny_model(options: dict[str, Any] | None = None, /, *, seed: int = 0, **node: Any) -> nn.Module:
    """The tiny model in evaluation mode, no weight of which is special (see :func:`scramble`)."""
    torch.manual_seed(seed)
    model = build_model(tiny_cfg(options, **node))
    scramble(model)
    return model.eval()


def scramble(module: nn.Module) -> nn.Module:
    """Add noise to every weight, so that no zero-initialized layer hides what flows through it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def image(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, height, width) float32 in [0, 255]."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 255


def instances(height: int, width: int, boxes: list[list[int]], classes: list[int] | None = None) -> Instances:
    """Rectangular objects: their boxes (xyxy px) and masks that fill them."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    result = Instances((height, width))
    result.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.gt_classes = torch.tensor(classes or [i % NUM_CLASSES for i in range(len(boxes))], dtype=torch.int64)
    result.gt_masks = BitMasks(masks)
    return result


def sample(height: int, width: int, boxes: list[list[int]], seed: int = 0) -> dict[str, Any]:
    """One element of a training batch."""
    return {"image": image(height, width, seed), "instances": instances(height, width, boxes)}


def targets(*boxes_of_images: list[list[int]], size: int = 64) -> list[Targets]:
    """Targets of square images without padding."""
    return [Targets.from_instances(instances(size, size, boxes), size, size, NUM_CLASSES) for boxes in boxes_of_images]


def encoded(batch: int = 2, size: int = 64, seed: int = 0) -> EncoderOutput:
    """Random output of an encoder for images of ``size`` px: strides 8 to 64, finest first, and 4 for the masks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(stride: int) -> Tensor:
        side = math.ceil(size / stride)
        return torch.randn(batch, DIM, side, side, generator=generator)

    return EncoderOutput([draw(stride) for stride in (8, 16, 32, 64)], draw(4))


def train_batch(*boxes_of_images: list[list[int]]) -> list[dict[str, Any]]:
    """A training batch of images of different heights."""
    return [sample(48 + 16 * i, 64, boxes, seed=i) for i, boxes in enumerate(boxes_of_images)]


def predict(model: nn.Module, *batch: Tensor, **sizes: int) -> list[Instances]:
    """What the model finds in each image; ``sizes`` are the height and width to give the results in."""
    with torch.no_grad():
        return [result["instances"] for result in model([{"image": each, **sizes} for each in batch])]
