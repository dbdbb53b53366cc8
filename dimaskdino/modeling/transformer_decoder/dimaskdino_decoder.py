"""DI-MaskDINO's decoder: Mask DINO's with De-Imbalance before the queries and BATO after layer 0."""

from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from dimaskdino.modeling.registry import (
    BATO_REGISTRY,
    DE_IMBALANCE_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
    get_registered,
)
from dimaskdino.modeling.transformer_decoder.checks import check_dimaskdino, num_selected
from dimaskdino.modeling.transformer_decoder.maskdino_decoder import MaskDINODecoder
from dimaskdino.modeling.transformer_decoder.query_decoder import Queries, Selection
from dimaskdino.structures import FeatureTokens, Stage, StagePrediction, Tokens


@TRANSFORMER_DECODER_REGISTRY.register()
class DIMaskDINODecoder(MaskDINODecoder):
    """DI-MaskDINO (NeurIPS 2024).

    Args:
        de_imbalance: the De-Imbalance module, or None.
        bato: the BATO module, or None.
        guidance: the queries that guide BATO: ``q_bal`` (output of layer 0), ``t_s2``, ``t_s1``, ``t_i`` (DI off).
        parts: those of :class:`MaskDINODecoder`.
    """

    @configurable
    def __init__(self, *, de_imbalance: nn.Module | None, bato: nn.Module | None, guidance: str, **parts: Any) -> None:
        super().__init__(**parts)
        self.de_imbalance, self.bato, self.guidance = de_imbalance, bato, guidance

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Mask DINO's parts, and those of MODEL.MaskDINO.DI and .BATO where they are enabled.

        Raises:
            ConfigError: for values that cannot work together.
        """
        check_dimaskdino(cfg)
        node = cfg.MODEL.MaskDINO
        parts = super().from_config(cfg) | {"de_imbalance": None, "bato": None, "guidance": node.BATO.GUIDANCE}
        if node.DI.ENABLED:
            build = get_registered(DE_IMBALANCE_REGISTRY, node.DI.NAME, "MODEL.MaskDINO.DI.NAME")
            parts |= {"de_imbalance": build(cfg), "num_first_selected": num_selected(cfg)[0]}
        if node.BATO.ENABLED:
            parts["bato"] = get_registered(BATO_REGISTRY, node.BATO.NAME, "MODEL.MaskDINO.BATO.NAME")(cfg)
        return parts

    @property
    def selection_stages(self) -> tuple[Stage, ...]:
        """Every selection once: the last one is the stage "initial" unless the queries take more than its tokens."""
        later = getattr(self.de_imbalance, "selection_stages", ())
        queries_are_tokens = self.query_feat is None and not self.random_position
        if queries_are_tokens and self.query_stages[0].kind == "initial":
            later = later[:-1]
        return (*super().selection_stages, *later)

    def select(self, t_i: FeatureTokens, mask_features: Tensor | None, *, training: bool) -> Selection:
        """T_s1 and T_s2 (Eqs. 1 to 3)."""
        selection = super().select(t_i, mask_features, training=training)
        if self.de_imbalance is None:
            return selection

        def predict(stage: Stage, tokens: Tokens) -> StagePrediction:
            return self.heads(stage, tokens.content, tokens.boxes, mask_features)

        reported = not training and any(stage.kind == "selection" for stage in self.selection_stages)
        t_s2, predictions = self.de_imbalance(selection.first, self.heads, *([predict] if reported else []))
        return Selection(selection.first, t_s2, selection.predictions + predictions)

    def refine(
        self, queries: Queries, t_i: FeatureTokens, mask_features: Tensor | None, selection: Selection
    ) -> list[StagePrediction]:
        """The residual layer (Eq. 4), BATO (Eqs. 5 to 8), the remaining layers (Eq. 9)."""
        if self.bato is None:
            return super().refine(queries, t_i, mask_features, selection)
        q_bal, residual = self.run_layers(slice(0, 1), queries, t_i, mask_features)
        t_bal = self._optimize_tokens(t_i, q_bal, selection)
        renewed = self.bato.renew_mask_features(mask_features, t_bal.finest_level)  # type: ignore[operator]
        _, refined = self.run_layers(slice(1, None), q_bal, t_bal, renewed)
        return residual + refined

    def _optimize_tokens(self, t_i: FeatureTokens, q_bal: Queries, selection: Selection) -> FeatureTokens:
        """T_bal, guided by the queries that BATO.GUIDANCE names."""
        assert self.bato is not None
        if self.guidance in ("t_s1", "t_s2"):
            chosen = selection.first if self.guidance == "t_s1" else selection.last
            guide, boxes = chosen.content, chosen.boxes
        else:
            # Denoising queries come first and must not guide.
            num_matching = selection.last.content.shape[1]
            guide, boxes = q_bal.content[:, -num_matching:], q_bal.reference[:, -num_matching:]
        return replace(t_i, tokens=self.bato(t_i.tokens, t_i.position, guide, self.embed_boxes(boxes), self.heads))
