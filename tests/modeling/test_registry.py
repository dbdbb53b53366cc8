"""Every part of the model can be replaced from outside by registering a class and naming it in YAML."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from torch import nn

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.bato import BalanceAwareTokensOptimization
from dimaskdino.modeling.meta_arch import DIMaskDINO, MaskDINO, MaskDINOHead, build_model
from dimaskdino.modeling.pixel_decoder import MaskDINOEncoder
from dimaskdino.modeling.registry import (
    BATO_REGISTRY,
    DE_IMBALANCE_REGISTRY,
    PIXEL_DECODER_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
)
from dimaskdino.modeling.transformer_decoder import DIMaskDINODecoder
from dimaskdino.modeling.transformer_decoder.de_imbalance import DeImbalance
from dimaskdino.structures import EncoderOutput, Tokens
from tests.tiny_model import DIM, image, sample, tiny_cfg


@DE_IMBALANCE_REGISTRY.register()
class FirstTokens(nn.Module):
    """Keeps the first tokens without any interaction."""

    def __init__(self, cfg):
        super().__init__()
        self.num_selected = cfg.MODEL.MaskDINO.NUM_OBJECT_QUERIES

    def forward(self, t_s1, heads):
        count = self.num_selected
        return Tokens(t_s1.content[:, :count], t_s1.boxes[:, :count]), []


@BATO_REGISTRY.register()
class ScaledTokens(nn.Module):
    """One learned factor."""

    def __init__(self, cfg):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, t_i, token_position, content, position, heads):
        return t_i * self.scale

    def renew_mask_features(self, mask_features, finest_level):
        return mask_features * self.scale


@PIXEL_DECODER_REGISTRY.register()
class PlainEncoder(nn.Module):
    """A convolution per level."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.names = ["res3", "res4", "res5"]
        self.convs = nn.ModuleList(nn.Conv2d(input_shape[name].channels, DIM, 1) for name in self.names)
        self.extra = nn.Conv2d(DIM, DIM, 3, stride=2, padding=1)
        self.mask = nn.Conv2d(input_shape["res2"].channels, DIM, 1)

    def forward(self, features):
        levels = [conv(features[name]) for conv, name in zip(self.convs, self.names, strict=True)]
        return EncoderOutput([*levels, self.extra(levels[-1])], self.mask(features["res2"]))


@TRANSFORMER_DECODER_REGISTRY.register()
class QuietDecoder(DIMaskDINODecoder):
    """Reports the last stage alone."""

    def forward(self, encoded, targets=None):
        output = super().forward(encoded, targets)
        return type(output)(output.stages[-1:], [], None) if targets is None else output


@SEM_SEG_HEADS_REGISTRY.register()
class CountingHead(MaskDINOHead):
    """Counts how often it is asked."""

    calls = 0

    def forward(self, features, targets=None):
        self.calls += 1
        return super().forward(features, targets)


YAML = """
MODEL:
  META_ARCHITECTURE: MaskDINO
  SEM_SEG_HEAD: {NAME: CountingHead, PIXEL_DECODER_NAME: PlainEncoder}
  MaskDINO:
    TRANSFORMER_DECODER_NAME: QuietDecoder
    DI: {NAME: FirstTokens}
    BATO: {NAME: ScaledTokens}
"""


def test_parts_named_in_yaml_replace_ours_in_training_and_prediction(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(YAML)
    cfg = tiny_cfg()
    cfg.merge_from_file(str(file))
    model = build_model(cfg)
    head = model.sem_seg_head
    assert isinstance(model, MaskDINO)
    assert isinstance(head, CountingHead)
    assert isinstance(head.pixel_decoder, PlainEncoder)
    assert isinstance(head.predictor, QuietDecoder)
    assert isinstance(head.predictor.de_imbalance, FirstTokens)
    assert isinstance(head.predictor.bato, ScaledTokens)
    losses = model.train()([sample(64, 64, [[0, 0, 32, 32]])])
    assert not any("_di_" in name for name in losses)
    sum(losses.values()).backward()
    assert head.predictor.bato.scale.grad is not None
    result = model.eval()([{"image": image(64, 64)}])
    assert len(result[0]["instances"]) == 6
    assert head.calls == 2


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("MODEL.META_ARCHITECTURE", "DIMaskDINO, MaskDINO"),
        ("MODEL.BACKBONE.NAME", "build_resnet_backbone, D2SwinTransformer, build_timm_backbone"),
        ("MODEL.SEM_SEG_HEAD.NAME", "MaskDINOHead"),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MaskDINOEncoder"),
        ("MODEL.MaskDINO.TRANSFORMER_DECODER_NAME", "DIMaskDINODecoder, MaskDINODecoder"),
        ("MODEL.MaskDINO.DI.NAME", "DeImbalance"),
        ("MODEL.MaskDINO.BATO.NAME", "BalanceAwareTokensOptimization"),
    ],
)
def test_an_unknown_name_says_which_key_and_what_there_is(key, kind):
    with pytest.raises(ConfigError) as error:
        build_model(tiny_cfg({key: "Nowhere"}))
    message = str(error.value)
    assert key in message
    assert "'Nowhere'" in message
    assert all(name in message for name in kind.split(", "))


def test_our_parts_are_registered_under_the_names_of_the_configuration():
    assert META_ARCH_REGISTRY.get("DIMaskDINO") is DIMaskDINO
    assert issubclass(META_ARCH_REGISTRY.get("MaskDINO"), DIMaskDINO)
    assert SEM_SEG_HEADS_REGISTRY.get("MaskDINOHead") is MaskDINOHead
    assert PIXEL_DECODER_REGISTRY.get("MaskDINOEncoder") is MaskDINOEncoder
    assert DE_IMBALANCE_REGISTRY.get("DeImbalance") is DeImbalance
    assert BATO_REGISTRY.get("BalanceAwareTokensOptimization") is BalanceAwareTokensOptimization


def test_parts_that_are_off_are_never_built():
    cfg = tiny_cfg(DI__ENABLED=False, DI__NAME="Nowhere", BATO__ENABLED=False, BATO__NAME="Nowhere")
    assert build_model(cfg).sem_seg_head.predictor.bato is None
