"""Encoders of feature tokens alone: deformable attention over several levels, and the form that DINO gives it."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from dimaskdino.errors import ConfigError, check_choice
from dimaskdino.layers import FeedForward, MSDeformAttn
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.exporting import split_levels, to_map
from dimaskdino.layers.ms_deform_attn import SpatialShapes
from dimaskdino.layers.padding import PaddedBatch, ValidCells, level_centers
from dimaskdino.layers.position import pixel_sine_embedding
from dimaskdino.layers.precision import float32_block
from dimaskdino.modeling.registry import PIXEL_DECODER_REGISTRY
from dimaskdino.structures import EncoderOutput, flatten_levels

_FEATURE_ORDERS = ("low2high", "high2low")


class EncoderLayer(FeedForward):
    """Deformable self-attention over all levels and a feed-forward block, both post-norm."""

    def __init__(self, *, dim: int, hidden_dim: int, dropout: float, num_levels: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim=dim, num_levels=num_levels, num_heads=num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.add_feed_forward(dim, hidden_dim, dropout)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference: Tensor,
        spatial_shapes: SpatialShapes,
        valid: ValidCells | None = None,
    ) -> Tensor:
        """Update ``tokens`` (B, N, C), given ``position`` (N or B, N, C) and ``reference`` points (1 or B, N, 2)."""
        reference = reference.expand(tokens.shape[0], -1, -1)
        attended = self.self_attn(tokens + position, reference, tokens, spatial_shapes, valid)
        tokens = self.norm1(tokens + self.drop(attended))
        return self.feed_forward(tokens, self.norm2)


@PIXEL_DECODER_REGISTRY.register()
class DeformableEncoder(nn.Module):
    """Deformable transformer over several levels, for models without masks.

    Args:
        input_shape: channels and stride of each backbone feature, by name.
        in_features: the features that become tokens.
        num_levels: levels after adding stride-2 convolutions of the coarsest feature; at least ``len(in_features)``.
        feature_order: ``low2high`` lists the finest level first, ``high2low`` the coarsest.
        conv_dim: width C of the tokens, a multiple of 32.
        num_layers: transformer layers.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward blocks.
        dropout: probability, in training.
        temperature: of the tokens' sine positions.
        offset: of the tokens' sine positions; see :func:`pixel_sine_embedding`.

    Source: Deformable DETR (Zhu et al., 2021).
    """

    makes_mask_features = False

    @configurable
    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        in_features: list[str],
        num_levels: int,
        feature_order: str,
        conv_dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        temperature: float = 10000.0,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature, self.offset = temperature, offset
        _check_features(input_shape, in_features, num_levels, feature_order)
        # The releases number the projections against the order of the levels: finest first in low2high.
        self.token_features = sorted(
            in_features, key=lambda name: input_shape[name].stride, reverse=feature_order != "low2high"
        )
        self.feature_order = feature_order
        self.coarsest_feature = max(in_features, key=lambda name: input_shape[name].stride)
        self.input_proj = _input_projections(
            [input_shape[name].channels for name in self.token_features],
            input_shape[self.coarsest_feature].channels,
            num_levels,
            conv_dim,
        )
        self.conv_dim = conv_dim
        self.level_embed = nn.Parameter(torch.empty(num_levels, conv_dim))
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim=conv_dim, hidden_dim=hidden_dim, dropout=dropout, num_levels=num_levels, num_heads=num_heads
            )
            for _ in range(num_layers)
        )
        self._reset_parameters()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read MODEL.SEM_SEG_HEAD; heads and dropout come from MODEL.MaskDINO."""
        head, node = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MaskDINO
        if cls.makes_mask_features != node.PREDICT_MASKS:
            name = "MaskDINOEncoder" if node.PREDICT_MASKS else "DeformableEncoder"
            raise ConfigError(
                f"MODEL.MaskDINO.PREDICT_MASKS is {node.PREDICT_MASKS}, but MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME "
                f"{head.PIXEL_DECODER_NAME} makes {'' if cls.makes_mask_features else 'no '}mask features; set it to "
                f"{name}."
            )
        return {
            "input_shape": _named(input_shape, head.IN_FEATURES, "MODEL.SEM_SEG_HEAD.IN_FEATURES"),
            "in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "num_levels": head.TOTAL_NUM_FEATURE_LEVELS,
            "feature_order": head.FEATURE_ORDER,
            "conv_dim": head.CONVS_DIM,
            "num_layers": head.TRANSFORMER_ENC_LAYERS,
            "num_heads": node.NHEADS,
            "hidden_dim": head.DIM_FEEDFORWARD,
            "dropout": node.DROPOUT,
        }

    def _reset_parameters(self) -> None:
        for module in self.input_proj.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        xavier_init(self.layers)
        for module in self.layers.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, features: Mapping[str, Tensor], batch: PaddedBatch | None = None) -> EncoderOutput:
        """Encode backbone features; see :class:`EncoderOutput`.

        Args:
            features: (B, C_f, h_f, w_f) by name, any floating dtype.
            batch: the images on their canvas, whose padding is then ignored; None to take it as a part of the images.
        """
        device = self.level_embed.device
        with float32_block("encoder", device):
            features = {name: feature.to(self.level_embed.dtype) for name, feature in features.items()}
            levels, positioned = self.order_levels(*self._project(features))
            tokens, spatial_shapes = flatten_levels(levels)
            valid = None if batch is None else batch.valid_cells(spatial_shapes, device)
            shapes = [(level.shape[-2], level.shape[-1]) for level in positioned]
            del levels, positioned  # the tokens are a copy
            levels = self._attend(tokens, self._embed_positions(shapes, valid), spatial_shapes, valid)
            return EncoderOutput(levels, self.make_mask_features(features, levels), valid)

    def order_levels(self, maps: list[Tensor], extra: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The levels in the order of ``feature_order``, and the levels whose positions they are given.

        Args:
            maps: projected features.
            extra: levels beyond the coarsest feature, each coarser than the one before.

        Deviation: with two or more extra levels the releases list those coarsest first in either order, and give them
        each other's positions; their weights were trained so, and it is kept. With none or one there is no difference.
        """
        if self.feature_order == "low2high":
            return maps + extra[::-1], maps + extra
        return extra[::-1] + maps, extra + maps

    def make_mask_features(self, features: Mapping[str, Tensor], levels: list[Tensor]) -> Tensor | None:
        """Mask features from backbone features and encoded levels; a model without masks has none."""
        return None

    def _project(self, features: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps of width C: of the features, in ``feature_order``, and of the levels beyond the coarsest."""
        maps = [proj(features[name]) for name, proj in zip(self.token_features, self.input_proj, strict=False)]
        extra: list[Tensor] = []
        source = features[self.coarsest_feature]
        for proj in self.input_proj[len(maps) :]:
            source = proj(source)
            extra.append(source)
        return maps, extra

    def _embed_positions(self, spatial_shapes: SpatialShapes, valid: ValidCells | None) -> Tensor:
        """(N, C), or (B, N, C) with padding: sine positions and level embeddings of all tokens."""
        return torch.cat(
            [
                pixel_sine_embedding(
                    *shape,
                    self.conv_dim,
                    self.level_embed.device,
                    temperature=self.temperature,
                    offset=self.offset,
                    counts=None if valid is None else valid.counts[:, index],
                )
                + self.level_embed[index]
                for index, shape in enumerate(spatial_shapes)
            ],
            dim=-2,
        )

    def _attend(
        self, tokens: Tensor, position: Tensor, spatial_shapes: SpatialShapes, valid: ValidCells | None
    ) -> list[Tensor]:
        """Run the transformer over all levels, which come back as maps."""
        position = position.to(tokens.dtype)
        reference = torch.cat(level_centers(spatial_shapes, tokens.device, valid), dim=1)
        if not self.layers:  # a zero gradient for the level embedding, as data-parallel training needs
            tokens = tokens + 0.0 * self.level_embed.sum()
        for layer in self.layers:
            tokens = layer(tokens, position, reference, spatial_shapes, valid)
        chunks = split_levels(tokens, spatial_shapes)
        return [to_map(chunk, shape) for chunk, shape in zip(chunks, spatial_shapes, strict=True)]


def _check_features(shape: Mapping[str, ShapeSpec], in_features: list[str], num_levels: int, order: str) -> None:
    check_choice("MODEL.SEM_SEG_HEAD.FEATURE_ORDER", order, _FEATURE_ORDERS)
    missing = [name for name in in_features if name not in shape]
    if missing or not in_features:
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES is {in_features}; "
            f"it must name some of IN_FEATURES {sorted(shape)}."
        )
    if num_levels < len(in_features):
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS is {num_levels}, fewer than the {len(in_features)} features "
            "of DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES."
        )


def _named(input_shape: Mapping[str, ShapeSpec], names: list[str], key: str) -> dict[str, ShapeSpec]:
    """The features of the backbone that a key names."""
    if not names or not set(names) <= input_shape.keys():
        raise ConfigError(f"{key} is {names}; it must name some of what the backbone gives: {sorted(input_shape)}.")
    return {name: input_shape[name] for name in names}


def _input_projections(channels: list[int], coarsest: int, num_levels: int, dim: int) -> nn.ModuleList:
    """1x1 convolutions for the features, 3x3 stride-2 ones for the levels beyond them."""
    convs = [nn.Conv2d(width, dim, 1) for width in channels]
    extra = num_levels - len(channels)
    convs += [nn.Conv2d(coarsest if i == 0 else dim, dim, 3, stride=2, padding=1) for i in range(extra)]
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, dim)) for conv in convs)


@PIXEL_DECODER_REGISTRY.register()
class DINOEncoder(DeformableEncoder):
    """:class:`DeformableEncoder` with the keys of MODEL.DINO, its levels always finest first.

    Source: DINO (Zhang et al., 2023).
    """

    @configurable
    def __init__(self, **transformer: Any) -> None:
        super().__init__(feature_order="low2high", **transformer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read MODEL.DINO.

        Raises:
            ConfigError: for features that the backbone does not give.
        """
        node = cfg.MODEL.DINO
        features = _named(input_shape, node.IN_FEATURES, "MODEL.DINO.IN_FEATURES")
        if len(node.IN_FEATURES) > node.NUM_LEVELS:
            raise ConfigError(
                f"MODEL.DINO.NUM_LEVELS is {node.NUM_LEVELS}, fewer than the {len(node.IN_FEATURES)} of IN_FEATURES."
            )
        return {
            "input_shape": features,
            "in_features": node.IN_FEATURES,
            "num_levels": node.NUM_LEVELS,
            "conv_dim": node.HIDDEN_DIM,
            "num_layers": node.ENC_LAYERS,
            "num_heads": node.NHEADS,
            "hidden_dim": node.DIM_FEEDFORWARD,
            "dropout": node.DROPOUT,
            "temperature": node.PE_TEMPERATURE,
            "offset": node.PE_OFFSET,
        }

    def order_levels(self, maps: list[Tensor], extra: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """All levels from the finest to the coarsest."""
        return maps + extra, maps + extra
