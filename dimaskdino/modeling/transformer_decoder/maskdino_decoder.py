"""Mask DINO's decoder: one selection of tokens, or learned queries, and masks from the heads of every stage."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import nn

from dimaskdino.layers.position import pixel_sine_embedding
from dimaskdino.modeling.registry import (
    DENOISING_REGISTRY,
    HEAD_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
    build_registered,
    get_registered,
)
from dimaskdino.modeling.transformer_decoder.checks import check_maskdino, layer_sizes, uses_no_object_class
from dimaskdino.modeling.transformer_decoder.decoder_layer import DecoderLayer
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.modeling.transformer_decoder.query_decoder import QueryDecoder
from dimaskdino.modeling.transformer_decoder.selection import FirstSelection
from dimaskdino.structures import EncoderOutput, FeatureTokens, Tokens, flatten_levels


@TRANSFORMER_DECODER_REGISTRY.register()
class MaskDINODecoder(QueryDecoder):
    """Mask DINO (Li et al., 2023).

    Args:
        input_proj: projections of the encoder's levels to the queries' width, in their order; empty where none is
            needed.
        random_position: draw the boxes of the matching queries at random (Table 3 of DI-MaskDINO).
        parts: those of :class:`QueryDecoder`.
    """

    @configurable
    def __init__(self, *, input_proj: list[nn.Module], random_position: bool, **parts: Any) -> None:
        super().__init__(**parts)
        self.random_position = random_position
        self.input_proj = nn.ModuleList(input_proj)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts from MODEL.MaskDINO.

        Raises:
            ConfigError: for values that cannot work together.
        """
        check_maskdino(cfg)
        node, head = cfg.MODEL.MaskDINO, cfg.MODEL.SEM_SEG_HEAD
        dim, num_levels = node.HIDDEN_DIM, head.TOTAL_NUM_FEATURE_LEVELS
        project = dim != head.CONVS_DIM or node.ENFORCE_INPUT_PROJ
        learned_content = node.LEARN_TGT or not node.TWO_STAGE
        return {
            "dim": dim,
            "input_proj": [_projection(head.CONVS_DIM, dim) for _ in range(num_levels if project else 0)],
            "heads": PredictionHeads(
                dim=dim,
                num_logits=head.NUM_CLASSES + uses_no_object_class(cfg),
                mask_dim=head.MASK_DIM if node.PREDICT_MASKS else None,
                no_object_class=uses_no_object_class(cfg),
                extra=build_registered(HEAD_REGISTRY, cfg.MODEL.EXTRA_HEADS, "MODEL.EXTRA_HEADS", cfg, dim),
            ),
            "selection": FirstSelection(dim=dim, initialize_box_type=node.INITIALIZE_BOX_TYPE)
            if node.TWO_STAGE
            else None,
            "num_first_selected": node.NUM_OBJECT_QUERIES,
            "query_feat": nn.Embedding(node.NUM_OBJECT_QUERIES, dim) if learned_content else None,
            "query_embed": None if node.TWO_STAGE else nn.Embedding(node.NUM_OBJECT_QUERIES, 4),
            "denoising": get_registered(DENOISING_REGISTRY, node.DN_NAME, "MODEL.MaskDINO.DN_NAME")(cfg),
            "layers": [DecoderLayer(num_levels=num_levels, **layer_sizes(node)) for _ in range(node.DEC_LAYERS)],
            "initial_prediction": node.INITIAL_PRED,
            "random_position": node.DI.RANDOM_POSITION,
        }

    def feature_tokens(self, encoded: EncoderOutput) -> FeatureTokens:
        """T_i: the levels in the opposite of the encoder's order, with positions that carry no level embedding."""
        levels = encoded.levels
        if len(self.input_proj):
            levels = [proj(level) for proj, level in zip(self.input_proj, levels, strict=True)]
        tokens, spatial_shapes = flatten_levels(levels[::-1])
        position = torch.cat([pixel_sine_embedding(*shape, self.dim, tokens.device) for shape in spatial_shapes])
        return FeatureTokens(tokens, position, spatial_shapes)

    def matching_queries(self, tokens: Tokens) -> Tokens:
        """The selected tokens, with learned content or random boxes where the configuration says so."""
        queries = super().matching_queries(tokens)
        return Tokens(queries.content, torch.rand_like(queries.boxes)) if self.random_position else queries


def _projection(in_channels: int, dim: int) -> nn.Module:
    projection = Conv2d(in_channels, dim, 1)
    weight_init.c2_xavier_fill(projection)
    return projection
