"""The decoder: queries from selected tokens, layer 0 (Eq. 4), BATO, refinement (Eq. 9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers import MLP, FeedForward, MSDeformAttn, MultiheadAttention
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.ms_deform_attn import SpatialShapes
from dimaskdino.layers.position import box_sine_embedding, pixel_sine_embedding
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

_BOX_TYPES = ("no", "mask2box", "bitmask")
_DN_KINDS = ("no", "standard", "seg")
_GUIDANCE = ("q_bal", "t_s2", "t_s1", "t_i")


@dataclass(frozen=True)
class DecoderOutput:
    """Everything that the decoder predicts.

    Attributes:
        stages: predictions in the order they are made: "interm", "di.i", then "initial" and "layer.l" of the matching
            queries. The last one is the model's result.
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


class DecoderLayer(FeedForward):
    """Self-attention, deformable cross-attention to the feature tokens and a feed-forward block, post-norm."""

    def __init__(self, *, dim: int, hidden_dim: int, num_levels: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(dim=dim, num_levels=num_levels, num_heads=num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = MultiheadAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.add_feed_forward(dim, hidden_dim, dropout=0.0)
        self.norm3 = nn.LayerNorm(dim)
        xavier_init(self)
        self.cross_attn.reset_parameters()

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        boxes: Tensor,
        tokens: Tensor,
        spatial_shapes: SpatialShapes,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Renew the queries' ``content`` (B, Q, C).

        Args:
            content: (B, Q, C).
            position: (B, Q, C) positional embedding of ``boxes``.
            boxes: (B, Q, 4) cxcywh in [0, 1], where the queries look.
            tokens: (B, N, C) feature tokens.
            spatial_shapes: (height, width) of each level.
            attn_mask: (Q, Q) bool, True where a query must not see another; None when all see all.
        """
        query = content + position
        content = self.norm2(content + self.self_attn(query, query, content, attn_mask))
        content = self.norm1(content + self.cross_attn(content + position, boxes, tokens, spatial_shapes))
        return self.feed_forward(content, self.norm3)


@TRANSFORMER_DECODER_REGISTRY.register()
class DIMaskDINODecoder(nn.Module):
    """Selection, De-Imbalance, BATO and the refining layers.

    Args:
        in_channels: width of the encoder's levels.
        dim: width C of queries and tokens.
        num_classes: classes K; denoising draws labels from them.
        num_logits: class logits, K, or K + 1 with a no-object class.
        num_queries: queries that the decoder refines.
        num_levels: feature levels.
        num_layers: decoder layers, layer 0 included.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward blocks.
        mask_dim: channels of the mask features.
        two_stage: queries from selected tokens; otherwise learned ones.
        learn_content: learned content on the selected boxes.
        initial_prediction: predict before layer 0 as well.
        initialize_box_type: ``no``, ``mask2box`` or ``bitmask``.
        enforce_input_projection: project the levels although their width fits.
        denoising: ``no``, ``standard`` or ``seg``.
        dn_num_queries: denoising queries per image.
        dn_noise_scale: noise on denoising labels and boxes.
        num_first_selected: tokens of the first selection.
        de_imbalance: the De-Imbalance module, or None.
        bato: the BATO module, or None.
        guidance: the queries that guide BATO: ``q_bal`` (output of layer 0), ``t_s2``, ``t_s1``, ``t_i`` (DI off).
        random_position: draw the boxes of the matching queries at random (Table 3).
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        dim: int,
        num_classes: int,
        num_logits: int,
        num_queries: int,
        num_levels: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mask_dim: int,
        two_stage: bool,
        learn_content: bool,
        initial_prediction: bool,
        initialize_box_type: str,
        enforce_input_projection: bool,
        denoising: str,
        dn_num_queries: int,
        dn_noise_scale: float,
        num_first_selected: int,
        de_imbalance: nn.Module | None,
        bato: nn.Module | None,
        guidance: str,
        random_position: bool,
    ) -> None:
        super().__init__()
        self.dim, self.num_queries, self.num_first_selected = dim, num_queries, num_first_selected
        self.initial_prediction, self.guidance, self.random_position = initial_prediction, guidance, random_position
        self.use_denoising = denoising != "no"
        self.input_proj = nn.ModuleList()
        if in_channels != dim or enforce_input_projection:
            self.input_proj.extend(Conv2d(in_channels, dim, 1) for _ in range(num_levels))
            for proj in self.input_proj:
                weight_init.c2_xavier_fill(proj)
        self.selection = FirstSelection(dim=dim, initialize_box_type=initialize_box_type) if two_stage else None
        self.query_feat = nn.Embedding(num_queries, dim) if learn_content or not two_stage else None
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 4)
        self.heads = PredictionHeads(dim=dim, num_logits=num_logits, mask_dim=mask_dim)
        self.denoising = Denoising(
            dim=dim, num_classes=num_classes, num_queries=dn_num_queries, noise_scale=dn_noise_scale
        )
        self.de_imbalance = de_imbalance
        self.bato = bato
        self.query_pos = MLP(2 * dim, dim, dim, 2)
        xavier_init(self.query_pos)
        self.layers = nn.ModuleList(
            DecoderLayer(dim=dim, hidden_dim=hidden_dim, num_levels=num_levels, num_heads=num_heads)
            for _ in range(num_layers)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO.

        Raises:
            ConfigError: for values that cannot work together.
        """
        node = cfg.MODEL.MaskDINO
        _check_config(cfg)
        use_de_imbalance = node.DI.ENABLED
        return {
            "in_channels": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
            "dim": node.HIDDEN_DIM,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "num_logits": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES + uses_no_object_class(cfg),
            "num_queries": node.NUM_OBJECT_QUERIES,
            "num_levels": cfg.MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS,
            "num_layers": node.DEC_LAYERS,
            "num_heads": node.NHEADS,
            "hidden_dim": node.DIM_FEEDFORWARD,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "two_stage": node.TWO_STAGE,
            "learn_content": node.LEARN_TGT,
            "initial_prediction": node.INITIAL_PRED,
            "initialize_box_type": node.INITIALIZE_BOX_TYPE,
            "enforce_input_projection": node.ENFORCE_INPUT_PROJ,
            "denoising": node.DN,
            "dn_num_queries": node.DN_NUM,
            "dn_noise_scale": node.DN_NOISE_SCALE,
            "num_first_selected": (node.DI.NUM_SELECTED or [node.FIRST_SELECTED_QUERIES])[0]
            if use_de_imbalance
            else node.NUM_OBJECT_QUERIES,
            "de_imbalance": get_registered(DE_IMBALANCE_REGISTRY, node.DI.NAME, "MODEL.MaskDINO.DI.NAME")(cfg)
            if use_de_imbalance
            else None,
            "bato": get_registered(BATO_REGISTRY, node.BATO.NAME, "MODEL.MaskDINO.BATO.NAME")(cfg)
            if node.BATO.ENABLED
            else None,
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
        t_s1, t_s2, stages = self._select(t_i, encoded.mask_features)
        denoising = self.denoising(targets) if self.use_denoising and targets is not None else None
        queries, attn_mask = _prepend(denoising, t_s2)
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

    def _select(self, t_i: FeatureTokens, mask_features: Tensor) -> tuple[Tokens, Tokens, list[StagePrediction]]:
        """T_s1 and T_s2 (the same where De-Imbalance is off), and what they predict."""
        batch = t_i.tokens.shape[0]
        if self.selection is None:
            assert self.query_feat is not None
            assert self.query_embed is not None
            learned = Tokens(
                self.query_feat.weight.expand(batch, -1, -1), self.query_embed.weight.sigmoid().expand(batch, -1, -1)
            )
            return learned, self._randomize(learned), []
        t_s1, interm = self.selection(
            t_i.tokens, t_i.spatial_shapes, mask_features, self.heads, self.num_first_selected
        )
        stages = [interm]
        t_s2 = t_s1
        if self.de_imbalance is not None:
            t_s2, interactions = self.de_imbalance(t_s1, self.heads)
            stages += interactions
        if self.query_feat is not None:
            num_selected = t_s2.content.shape[1]
            t_s2 = Tokens(self.query_feat.weight[:num_selected].expand(batch, -1, -1), t_s2.boxes)
        return t_s1, self._randomize(t_s2), stages

    def _randomize(self, tokens: Tokens) -> Tokens:
        return Tokens(tokens.content, torch.rand_like(tokens.boxes)) if self.random_position else tokens

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


def uses_no_object_class(cfg: CfgNode) -> bool:
    """Whether the class head has a no-object logit: semantic segmentation with softmax cross entropy."""
    test = cfg.MODEL.MaskDINO.TEST
    return bool(test.SEMANTIC_ON and cfg.MODEL.MaskDINO.SEMANTIC_CE_LOSS and not test.PANOPTIC_ON)


def _prepend(denoising: DenoisingQueries | None, matching: Tokens) -> tuple[Tokens, Tensor | None]:
    """Denoising queries before the matching ones, and who sees whom."""
    if denoising is None:
        return matching, None
    content = torch.cat((denoising.tokens.content, matching.content), dim=1)
    boxes = torch.cat((denoising.tokens.boxes, matching.boxes), dim=1)
    return Tokens(content, boxes), denoising.attention_mask(matching.content.shape[1])


def _check_config(cfg: CfgNode) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: naming the keys and what to change.
    """
    node = cfg.MODEL.MaskDINO
    for key, value, allowed in (
        ("INITIALIZE_BOX_TYPE", node.INITIALIZE_BOX_TYPE, _BOX_TYPES),
        ("DN", node.DN, _DN_KINDS),
        ("BATO.GUIDANCE", node.BATO.GUIDANCE, _GUIDANCE),
    ):
        if value not in allowed:
            raise ConfigError(f"MODEL.MaskDINO.{key} is {value!r}; it must be one of {', '.join(allowed)}.")
    selected = node.DI.NUM_SELECTED
    if node.DI.ENABLED and selected and selected[-1] != node.NUM_OBJECT_QUERIES:
        raise ConfigError(
            f"MODEL.MaskDINO.DI.NUM_SELECTED ends in {selected[-1]}, but NUM_OBJECT_QUERIES is "
            f"{node.NUM_OBJECT_QUERIES}; the last selection gives the decoder its queries."
        )
    problems = {
        "DI.ENABLED needs TWO_STAGE: De-Imbalance selects from tokens.": node.DI.ENABLED and not node.TWO_STAGE,
        "INITIALIZE_BOX_TYPE needs TWO_STAGE: learned queries bring their own boxes.": (
            node.INITIALIZE_BOX_TYPE != "no" and not node.TWO_STAGE
        ),
        "INITIALIZE_BOX_TYPE needs INITIAL_PRED, as in MaskDINO.": (
            node.INITIALIZE_BOX_TYPE != "no" and not node.INITIAL_PRED
        ),
        "BATO.ENABLED needs DEC_LAYERS of at least 2: it acts before layer 1.": (
            node.BATO.ENABLED and node.DEC_LAYERS < 2
        ),
        "BATO.GUIDANCE t_i means that De-Imbalance is off: set DI.ENABLED False.": (
            node.BATO.ENABLED and node.BATO.GUIDANCE == "t_i" and node.DI.ENABLED
        ),
        "BATO.ENABLED needs HIDDEN_DIM and SEM_SEG_HEAD.MASK_DIM to be equal.": (
            node.BATO.ENABLED and node.HIDDEN_DIM != cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
        ),
        "DEC_LAYERS must be at least 1.": node.DEC_LAYERS < 1,
        "NUM_GUIDING_TOKENS must be at least 1.": node.BATO.ENABLED and node.NUM_GUIDING_TOKENS < 1,
        "DN_NUM must be at least 1 (or set DN no).": node.DN != "no" and node.DN_NUM < 1,
    }
    for message, applies in problems.items():
        if applies:
            raise ConfigError(f"MODEL.MaskDINO.{message}")
