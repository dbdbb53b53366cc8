"""The decoder: queries from selected tokens, layer 0 (Eq. 4), BATO, refinement (Eq. 9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn

from dimaskdino.layers import MLP
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.ms_deform_attn import SpatialShapes
from dimaskdino.layers.position import box_sine_embedding, pixel_sine_embedding
from dimaskdino.modeling.decoder_config import check_decoder_config, num_first_selected, uses_no_object_class
from dimaskdino.modeling.decoder_layer import DecoderLayer
from dimaskdino.modeling.denoising import Denoising, DenoisingQueries
from dimaskdino.modeling.encoder import EncoderOutput
from dimaskdino.modeling.heads import PredictionHeads, StagePrediction
from dimaskdino.modeling.registry import (
    BATO_REGISTRY,
    DE_IMBALANCE_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
    get_registered,
)
from dimaskdino.modeling.selection import FirstSelection, Tokens
from dimaskdino.modeling.targets import Targets


@dataclass(frozen=True)
class DecoderOutput:
    """Everything that the decoder predicts.

    Attributes:
        stages: predictions in the order they are made: "interm", "di.i", then "initial" and "layer.l" of the matching
            queries. The last one is the model's result. In evaluation also "selection.n", where it is asked for.
        denoising_stages: "dn.initial" and "dn.layer.l"; empty without denoising.
        denoising: the denoising queries that those belong to.
    """

    stages: list[StagePrediction]
    denoising_stages: list[StagePrediction]
    denoising: DenoisingQueries | None


@dataclass(frozen=True)
class FeatureTokens:
    """Feature maps flattened into one sequence.

    Attributes:
        tokens: (B, N, C).
        position: (N, C) sine positions.
        spatial_shapes: (height, width) of each level.
    """

    tokens: Tensor
    position: Tensor
    spatial_shapes: SpatialShapes

    def finest_level(self, tokens: Tensor) -> Tensor:
        """The level with most pixels of ``tokens`` (B, N, C), as a map (B, C, h, w)."""
        areas = [height * width for height, width in self.spatial_shapes]
        finest = max(range(len(areas)), key=areas.__getitem__)
        chunk = tokens.split(areas, dim=1)[finest]
        return chunk.transpose(1, 2).unflatten(-1, self.spatial_shapes[finest])


@TRANSFORMER_DECODER_REGISTRY.register()
class DIMaskDINODecoder(nn.Module):
    """Selection, De-Imbalance, BATO and the refining layers.

    Args:
        dim: width C of queries and tokens.
        input_proj: projections of the encoder's levels to C, in their order; empty where none is needed.
        heads: class, box and mask heads.
        selection: first selection; None for learned queries.
        num_first_selected: tokens that it keeps.
        query_feat: learned content of the queries, or None to take that of the selected tokens.
        query_embed: learned boxes (logits), for learned queries alone.
        denoising: makes denoising queries in training.
        de_imbalance: the De-Imbalance module, or None.
        bato: the BATO module, or None.
        layers: of the decoder, layer 0 included.
        initial_prediction: predict before layer 0 as well.
        guidance: the queries that guide BATO: ``q_bal`` (output of layer 0), ``t_s2``, ``t_s1``, ``t_i`` (DI off).
        random_position: draw the boxes of the matching queries at random (Table 3).
    """

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        input_proj: Sequence[nn.Module],
        heads: PredictionHeads,
        selection: FirstSelection | None,
        num_first_selected: int,
        query_feat: nn.Embedding | None,
        query_embed: nn.Embedding | None,
        denoising: Denoising,
        de_imbalance: nn.Module | None,
        bato: nn.Module | None,
        layers: Sequence[nn.Module],
        initial_prediction: bool,
        guidance: str,
        random_position: bool,
    ) -> None:
        super().__init__()
        self.dim, self.num_first_selected = dim, num_first_selected
        self.initial_prediction, self.guidance, self.random_position = initial_prediction, guidance, random_position
        self.input_proj = nn.ModuleList(input_proj)
        self.heads, self.selection, self.denoising = heads, selection, denoising
        self.query_feat, self.query_embed = query_feat, query_embed
        self.de_imbalance, self.bato = de_imbalance, bato
        self.query_pos = MLP(2 * dim, dim, dim, 2)
        xavier_init(self.query_pos)
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts from MODEL.MaskDINO.

        Raises:
            ConfigError: for values that cannot work together.
        """
        check_decoder_config(cfg)
        node, head = cfg.MODEL.MaskDINO, cfg.MODEL.SEM_SEG_HEAD
        dim, num_levels = node.HIDDEN_DIM, head.TOTAL_NUM_FEATURE_LEVELS
        project = dim != head.CONVS_DIM or node.ENFORCE_INPUT_PROJ
        num_logits = head.NUM_CLASSES + uses_no_object_class(cfg)
        learned_content = node.LEARN_TGT or not node.TWO_STAGE
        return {
            "dim": dim,
            "input_proj": [_projection(head.CONVS_DIM, dim) for _ in range(num_levels if project else 0)],
            "heads": PredictionHeads(dim=dim, num_logits=num_logits, mask_dim=head.MASK_DIM),
            "selection": FirstSelection(dim=dim, initialize_box_type=node.INITIALIZE_BOX_TYPE)
            if node.TWO_STAGE
            else None,
            "num_first_selected": num_first_selected(cfg),
            "query_feat": nn.Embedding(node.NUM_OBJECT_QUERIES, dim) if learned_content else None,
            "query_embed": None if node.TWO_STAGE else nn.Embedding(node.NUM_OBJECT_QUERIES, 4),
            "denoising": Denoising(
                dim=dim,
                num_classes=head.NUM_CLASSES,
                num_queries=node.DN_NUM if node.DN != "no" else 0,
                noise_scale=node.DN_NOISE_SCALE,
            ),
            "de_imbalance": get_registered(DE_IMBALANCE_REGISTRY, node.DI.NAME, "MODEL.MaskDINO.DI.NAME")(cfg)
            if node.DI.ENABLED
            else None,
            "bato": get_registered(BATO_REGISTRY, node.BATO.NAME, "MODEL.MaskDINO.BATO.NAME")(cfg)
            if node.BATO.ENABLED
            else None,
            "layers": [
                DecoderLayer(dim=dim, hidden_dim=node.DIM_FEEDFORWARD, num_levels=num_levels, num_heads=node.NHEADS)
                for _ in range(node.DEC_LAYERS)
            ],
            "initial_prediction": node.INITIAL_PRED,
            "guidance": node.BATO.GUIDANCE,
            "random_position": node.DI.RANDOM_POSITION,
        }

    def forward(self, encoded: EncoderOutput, targets: Sequence[Targets] | None = None) -> DecoderOutput:
        """Predict from the encoder's output.

        Args:
            encoded: feature levels and mask features.
            targets: of each image, for denoising; None in evaluation.

        Returns:
            The predictions of all stages.
        """
        t_i = self._flatten(encoded.levels)
        t_s1, t_s2, stages = self._select(t_i, encoded.mask_features, training=targets is not None)
        matching = self._matching_queries(t_s2)
        denoising = None if targets is None else self.denoising(targets)
        queries, attn_mask = _prepend(denoising, matching)
        refined = self._refine(queries, attn_mask, t_i, encoded.mask_features, t_s1, t_s2)
        if denoising is None:
            if targets is not None:
                refined[-1] = self._touch_denoising(refined[-1])
            return DecoderOutput(stages + refined, [], None)
        pairs = [stage.split(denoising.num_queries) for stage in refined]
        return DecoderOutput(stages + [matching for _, matching in pairs], [dn for dn, _ in pairs], denoising)

    def _flatten(self, levels: list[Tensor]) -> FeatureTokens:
        """T_i: the levels in the opposite of the encoder's order, with positions that carry no level embedding."""
        if len(self.input_proj):
            levels = [proj(level) for proj, level in zip(self.input_proj, levels, strict=True)]
        levels = levels[::-1]
        spatial_shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        device = tokens.device
        position = torch.cat([pixel_sine_embedding(*shape, self.dim, device) for shape in spatial_shapes])
        return FeatureTokens(tokens, position, spatial_shapes)

    def _select(
        self, t_i: FeatureTokens, mask_features: Tensor, *, training: bool = False
    ) -> tuple[Tokens, Tokens, list[StagePrediction]]:
        """T_s1 and T_s2 (the same where De-Imbalance is off), and what they predict."""
        batch = t_i.tokens.shape[0]
        if self.selection is None:
            assert self.query_feat is not None
            assert self.query_embed is not None
            learned = Tokens(
                self.query_feat.weight.expand(batch, -1, -1), self.query_embed.weight.sigmoid().expand(batch, -1, -1)
            )
            return learned, learned, []
        t_s1, interm = self.selection(
            t_i.tokens, t_i.spatial_shapes, mask_features, self.heads, self.num_first_selected
        )
        stages = [interm]
        t_s2 = t_s1
        if self.de_imbalance is not None:
            evaluated = not training and getattr(self.de_imbalance, "evaluate_selections", False)
            more = (mask_features,) if evaluated else ()
            t_s2, interactions = self.de_imbalance(t_s1, self.heads, *more)
            stages += interactions
        return t_s1, t_s2, stages

    def _matching_queries(self, t_s2: Tokens) -> Tokens:
        """What layer 0 starts from: T_s2, with learned content or random boxes where the configuration says so."""
        content, boxes = t_s2.content, t_s2.boxes
        if self.query_feat is not None:
            content = self.query_feat.weight[: content.shape[1]].expand_as(content)
        return Tokens(content, torch.rand_like(boxes) if self.random_position else boxes)

    def _refine(
        self,
        queries: Tokens,
        attn_mask: Tensor | None,
        t_i: FeatureTokens,
        mask_features: Tensor,
        t_s1: Tokens,
        t_s2: Tokens,
    ) -> list[StagePrediction]:
        """The decoder layers with BATO before layer 1; "initial" and "layer.l" of all queries.

        A stage's box starts from the undetached box of the layer before (look forward twice), while the reference that
        the layers look at is detached after each of them.
        """
        heads = self.heads
        content, reference = queries.content, queries.boxes
        stages = [heads("initial", content, reference, mask_features)] if self.initial_prediction else []
        previous, tokens, renewed = reference, t_i.tokens, mask_features
        for index, layer in enumerate(self.layers):
            position = self._embed_boxes(reference)
            if index == 1 and self.bato is not None:
                tokens, renewed = self._optimize_tokens(t_i, mask_features, content, position, t_s1, t_s2)
            with torch.autocast(content.device.type, enabled=False):
                content = layer(
                    content.float(), position.float(), reference, tokens.float(), t_i.spatial_shapes, attn_mask
                )
            normed = heads.norm(content)
            supervised = heads.refine_box(normed, previous)
            stages.append(heads(f"layer.{index}", normed, supervised, renewed))
            previous = heads.refine_box(content, reference)
            reference = previous.detach()
        return stages

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        return self.query_pos(box_sine_embedding(boxes, self.dim))

    def _optimize_tokens(
        self, t_i: FeatureTokens, mask_features: Tensor, content: Tensor, position: Tensor, t_s1: Tokens, t_s2: Tokens
    ) -> tuple[Tensor, Tensor]:
        """T_bal and the mask features renewed from it, guided by the queries that BATO.GUIDANCE names."""
        assert self.bato is not None
        if self.guidance in ("t_s1", "t_s2"):
            chosen = t_s1 if self.guidance == "t_s1" else t_s2
            guide, guide_position = chosen.content, self._embed_boxes(chosen.boxes)
        else:
            # Denoising queries stand first and must not guide.
            num_matching = t_s2.content.shape[1]
            guide, guide_position = content[:, -num_matching:], position[:, -num_matching:]
        t_bal = self.bato(t_i.tokens, t_i.position, guide, guide_position, self.heads)
        return t_bal, self.bato.renew_mask_features(mask_features, t_i.finest_level(t_bal))  # type: ignore[operator]

    def _touch_denoising(self, stage: StagePrediction) -> StagePrediction:
        """Give the label embedding a zero gradient where a batch denoises nothing, as data-parallel training needs."""
        zero = 0.0 * self.denoising.label_embed.weight.sum()
        return StagePrediction(stage.name, stage.logits + zero, stage.boxes, stage.masks)


@TRANSFORMER_DECODER_REGISTRY.register()
class MaskDINODecoder(DIMaskDINODecoder):
    """MaskDINO: the same decoder without De-Imbalance and BATO."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO as if DI.ENABLED and BATO.ENABLED were False."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.MaskDINO.DI.ENABLED = False
        cfg.MODEL.MaskDINO.BATO.ENABLED = False
        return super().from_config(cfg)


def _prepend(denoising: DenoisingQueries | None, matching: Tokens) -> tuple[Tokens, Tensor | None]:
    """Denoising queries before the matching ones, and who sees whom."""
    if denoising is None:
        return matching, None
    content = torch.cat((denoising.tokens.content, matching.content), dim=1)
    boxes = torch.cat((denoising.tokens.boxes, matching.boxes), dim=1)
    return Tokens(content, boxes), denoising.attention_mask(matching.content.shape[1])


def _projection(in_channels: int, dim: int) -> nn.Module:
    projection = Conv2d(in_channels, dim, 1)
    weight_init.c2_xavier_fill(projection)
    return projection
