"""DINO's decoder: mixed query selection, contrastive denoising, look forward twice; boxes alone."""

import copy
import math
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from dimaskdino.layers.attention import xavier_init
from dimaskdino.modeling.registry import (
    DENOISING_REGISTRY,
    HEAD_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
    build_registered,
    get_registered,
)
from dimaskdino.modeling.transformer_decoder.checks import check_dino, layer_sizes
from dimaskdino.modeling.transformer_decoder.decoder_layer import DecoderLayer
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.modeling.transformer_decoder.query_decoder import Queries, QueryDecoder
from dimaskdino.modeling.transformer_decoder.selection import FirstSelection
from dimaskdino.structures import EncoderOutput, FeatureTokens, Stage, StagePrediction, flatten_levels

# Distance from 0 and 1 at which boxes are kept before their logit is taken; Mask DINO's is smaller.
_EPS = 1e-3
# Probability of every class in a new model.
_PRIOR = 0.01


@TRANSFORMER_DECODER_REGISTRY.register()
class DINODecoder(QueryDecoder):
    """DINO (Zhang et al., 2023).

    Args:
        selection_heads: heads of the first selection; None for learned queries.
        look_forward_twice: let the loss of a layer reach the boxes of the layer before.
        parts: those of :class:`QueryDecoder`; ``heads`` is an ``nn.ModuleList`` of one that all layers share, or of
            one for each layer. They come without a norm: all layers share one.
    """

    @configurable
    def __init__(self, *, selection_heads: PredictionHeads | None, look_forward_twice: bool, **parts: Any) -> None:
        super().__init__(initial_prediction=False, **parts)
        self.selection_heads, self.look_forward_twice = selection_heads, look_forward_twice
        self.norm = nn.LayerNorm(self.dim)
        for module in filter(None, (self.selection, self.query_feat)):
            xavier_init(module)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts from MODEL.DINO.

        Raises:
            ConfigError: for values that cannot work together.
        """
        check_dino(cfg)
        node = cfg.MODEL.DINO
        dim, selects, num_queries = node.HIDDEN_DIM, node.QUERY_SELECTION != "none", node.NUM_QUERIES
        extra = build_registered(HEAD_REGISTRY, cfg.MODEL.EXTRA_HEADS, "MODEL.EXTRA_HEADS", cfg, dim)
        num_logits = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        heads = PredictionHeads(dim=dim, num_logits=num_logits, mask_dim=None, norm=False, eps=_EPS, extra=extra)
        nn.init.constant_(heads.class_embed.bias, -math.log((1 - _PRIOR) / _PRIOR))
        # All heads start as copies of these.
        return {
            "dim": dim,
            "heads": nn.ModuleList(copy.deepcopy(heads) for _ in range(1 if node.SHARED_HEADS else node.DEC_LAYERS)),
            "selection_heads": copy.deepcopy(heads) if selects else None,
            "selection": FirstSelection(dim=dim, initialize_box_type="no") if selects else None,
            "num_first_selected": num_queries,
            "query_feat": None if node.QUERY_SELECTION == "pure" else nn.Embedding(num_queries, dim),
            "query_embed": None if selects else nn.Embedding(num_queries, 4),
            "denoising": get_registered(DENOISING_REGISTRY, node.DN_NAME, "MODEL.DINO.DN_NAME")(cfg),
            "layers": [DecoderLayer(num_levels=node.NUM_LEVELS, **layer_sizes(node)) for _ in range(node.DEC_LAYERS)],
            "look_forward_twice": node.LOOK_FORWARD_TWICE,
        }

    def heads_of(self, stage: Stage) -> PredictionHeads:
        """The heads that predict a stage: those of the selection, of its layer, or of all layers."""
        if stage.kind == "interm":
            assert self.selection_heads is not None
            return self.selection_heads
        return self.heads[stage.index if len(self.heads) > 1 else 0]  # type: ignore[index, arg-type]

    def feature_tokens(self, encoded: EncoderOutput) -> FeatureTokens:
        """T_i: the encoder's levels in their order."""
        tokens, spatial_shapes = flatten_levels(encoded.levels)
        return FeatureTokens(tokens, None, spatial_shapes, encoded.valid)

    def predict(
        self, stage: Stage, content: Tensor, queries: Queries, mask_features: Tensor | None
    ) -> tuple[StagePrediction, Tensor]:
        """The prediction of a layer, from its normed output, and the boxes that the next layer starts from."""
        heads, normed = self.heads_of(stage), self.norm(content)
        start = queries.previous if self.look_forward_twice else queries.reference
        prediction = heads(stage, normed, heads.refine_box(normed, start), mask_features)
        return prediction, heads.refine_box(content, queries.reference)
