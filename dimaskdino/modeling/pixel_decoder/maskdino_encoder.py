"""Mask DINO's encoder ("pixel decoder"): the deformable encoder, then one FPN step to the mask features."""

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn import weight_init
from torch import Tensor, nn

from dimaskdino.layers.attention import relu
from dimaskdino.modeling.pixel_decoder.deformable_encoder import DeformableEncoder
from dimaskdino.modeling.registry import PIXEL_DECODER_REGISTRY


@PIXEL_DECODER_REGISTRY.register()
class MaskDINOEncoder(DeformableEncoder):
    """Feature tokens and mask features.

    Args:
        input_shape: channels and stride of each backbone feature, by name.
        in_features: the features that become tokens.
        conv_dim: width C of the tokens, a multiple of 32.
        mask_dim: channels of the mask features.
        norm: detectron2's name of the norm of the FPN convolutions.
        common_stride: stride of the mask features.
        transformer: the other arguments of :class:`DeformableEncoder`.

    Source: Mask DINO (Li et al., 2023).
    """

    makes_mask_features = True

    @configurable
    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        in_features: list[str],
        conv_dim: int,
        mask_dim: int,
        norm: str,
        common_stride: int,
        **transformer: Any,
    ) -> None:
        super().__init__(input_shape=input_shape, in_features=in_features, conv_dim=conv_dim, **transformer)
        finest_stride = min(input_shape[name].stride for name in in_features)
        num_fpn_levels = max(int(math.log2(finest_stride) - math.log2(common_stride)), 1)
        by_stride = sorted(input_shape, key=lambda name: input_shape[name].stride)
        self.fpn_features = by_stride[:num_fpn_levels]
        self.lateral_convs = nn.ModuleList(
            Conv2d(input_shape[name].channels, conv_dim, 1, bias=norm == "", norm=get_norm(norm, conv_dim))
            for name in self.fpn_features
        )
        self.output_convs = nn.ModuleList(
            Conv2d(conv_dim, conv_dim, 3, padding=1, bias=norm == "", norm=get_norm(norm, conv_dim), activation=relu)
            for _ in self.fpn_features
        )
        self.mask_features = Conv2d(conv_dim, mask_dim, 1)
        for conv in [*self.lateral_convs, *self.output_convs, self.mask_features]:
            weight_init.c2_xavier_fill(conv)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The deformable encoder's keys and those of the FPN, all of MODEL.SEM_SEG_HEAD."""
        head = cfg.MODEL.SEM_SEG_HEAD
        fpn = {"mask_dim": head.MASK_DIM, "norm": head.NORM, "common_stride": head.COMMON_STRIDE}
        return super().from_config(cfg, input_shape) | fpn

    def make_mask_features(self, features: Mapping[str, Tensor], levels: list[Tensor]) -> Tensor:
        """(B, C_mask, h, w): the finest level, upsampled and joined with the finer backbone features."""
        fused = levels[0 if self.feature_order == "low2high" else -1]
        for index in reversed(range(len(self.fpn_features))):
            lateral = self.lateral_convs[index](features[self.fpn_features[index]])
            upsampled = F.interpolate(fused, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            summed = lateral + upsampled if lateral.requires_grad else lateral.add_(upsampled)
            fused = self.output_convs[index](summed)
        return self.mask_features(fused)
