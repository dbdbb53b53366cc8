"""Swin Transformer with the parameter names of the releases' Swin-L checkpoints (``D2SwinTransformer``)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.backbone.swin_blocks import PatchEmbed, SwinStage


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(Backbone):
    """Swin with one output per stage, each through its own LayerNorm ``norm{i}``; stage i is named ``res{i + 2}``.

    The stages of ``out_features`` and all before them are built.

    Args:
        patch_size: pixels; the stride of the first stage.
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: positions along a window's edge.
        out_features: stages to return.
        in_channels: channels of the image.
        pretrain_image_size: pixels; sets the size of the absolute position table alone.
        mlp_ratio: hidden width of the MLPs, in channels of their stage.
        qkv_bias: whether query, key and value have a bias.
        qk_scale: factor on the attention logits; None means 1 / sqrt(channels per head).
        drop_rate: dropout after the patches, projections and MLPs.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; the blocks before it rise to it linearly from 0.
        absolute_position: add a learned absolute position table, resized to the map.
        patch_norm: normalize the patch embeddings.
        use_checkpoint: recompute the blocks in the backward pass to save memory.

    Raises:
        ConfigError: for a feature that no stage gives, or heads that do not divide the channels.
    """

    @configurable
    def __init__(  # noqa: PLR0913  (one argument per key of MODEL.SWIN)
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depths: list[int],
        num_heads: list[int],
        window_size: int,
        out_features: list[str],
        in_channels: int = 3,
        pretrain_image_size: int = 224,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        absolute_position: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        channels = [embed_dim * 2**i for i in range(len(depths))]
        self._stage_of = {f"res{i + 2}": i for i in range(len(depths))}
        _check(channels, num_heads, out_features, list(self._stage_of))
        self.patch_embed = PatchEmbed(
            patch_size=patch_size, in_channels=in_channels, embed_dim=embed_dim, patch_norm=patch_norm
        )
        if absolute_position:
            grid = pretrain_image_size // patch_size
            self.absolute_pos_embed = nn.Parameter(
                nn.init.trunc_normal_(torch.zeros(1, embed_dim, grid, grid), std=0.02)
            )
        self.pos_drop = nn.Dropout(drop_rate)
        last = max(self._stage_of[name] for name in out_features)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            SwinStage(
                dim=channels[i],
                num_heads=num_heads[i],
                drop_path_rates=rates[i].tolist(),
                downsample=i < last,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                use_checkpoint=use_checkpoint,
            )
            for i in range(last + 1)
        )
        for name in out_features:
            self.add_module(f"norm{self._stage_of[name]}", nn.LayerNorm(channels[self._stage_of[name]]))
        self.apply(_init_linear)
        self._out_features = list(out_features)
        self._out_feature_channels = {name: channels[self._stage_of[name]] for name in out_features}
        self._out_feature_strides = {name: patch_size * 2 ** self._stage_of[name] for name in out_features}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read ``MODEL.SWIN``."""
        node = cfg.MODEL.SWIN
        return {
            "patch_size": node.PATCH_SIZE,
            "embed_dim": node.EMBED_DIM,
            "depths": list(node.DEPTHS),
            "num_heads": list(node.NUM_HEADS),
            "window_size": node.WINDOW_SIZE,
            "out_features": list(node.OUT_FEATURES),
            "in_channels": input_shape.channels,
            "pretrain_image_size": node.PRETRAIN_IMG_SIZE,
            "mlp_ratio": node.MLP_RATIO,
            "qkv_bias": node.QKV_BIAS,
            "qk_scale": node.QK_SCALE,
            "drop_rate": node.DROP_RATE,
            "attn_drop_rate": node.ATTN_DROP_RATE,
            "drop_path_rate": node.DROP_PATH_RATE,
            "absolute_position": node.APE,
            "patch_norm": node.PATCH_NORM,
            "use_checkpoint": node.USE_CHECKPOINT,
        }

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride of the outputs, in pixels."""
        return max(self._out_feature_strides.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map a batch of images to its features.

        Args:
            images: (B, 3, H, W) float, normalized; any H and W.

        Returns:
            feature name -> (B, C, ceil(H / stride), ceil(W / stride)).
        """
        x = self.patch_embed(images)
        if hasattr(self, "absolute_pos_embed"):
            table = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic", align_corners=False)
            x = x + table.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = {}
        for name, stage in zip(self._stage_of, self.layers, strict=False):
            feature, x = stage(x)
            if name in self._out_feature_strides:
                normed = getattr(self, f"norm{self._stage_of[name]}")(feature)
                outputs[name] = normed.permute(0, 3, 1, 2).contiguous()
        return outputs


def _check(channels: list[int], num_heads: list[int], out_features: list[str], known: list[str]) -> None:
    absent = [name for name in out_features if name not in known]
    if absent or not out_features:
        raise ConfigError(f"MODEL.SWIN.OUT_FEATURES: {absent or 'empty'}; this Swin has {', '.join(known)}.")
    if len(num_heads) != len(channels) or any(c % heads for c, heads in zip(channels, num_heads, strict=True)):
        raise ConfigError(f"MODEL.SWIN.NUM_HEADS: {num_heads} must divide the stages' channels {channels}, one by one.")


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
