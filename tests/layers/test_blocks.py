"""The blocks of the kinds of backbones that there are."""

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from dimaskdino.config import get_cfg
from dimaskdino.layers.blocks import blocks_of

BACKBONES = {
    "resnet": (["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50], "BottleneckBlock", 16),
    "swin": (["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.DEPTHS", [2, 2, 6, 2]], "SwinBlock", 12),
    "timm": (["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "convnext_atto"], "ConvNeXtBlock", 12),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_blocks_of_a_backbone(kind: str) -> None:
    options, block, count = BACKBONES[kind]
    cfg = get_cfg()
    cfg.merge_from_list([*options, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]])
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert [type(each).__name__ for each in blocks_of(backbone)] == [block] * count


def test_plain_layers_are_no_blocks() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
