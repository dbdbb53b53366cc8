"""De-Imbalance: selection, token interaction, second selection (Eqs. 1 to 3). Eq. 4 is decoder layer 0."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers import MLP, FeedForward, MultiheadAttention
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.boxes import inverse_sigmoid
from dimaskdino.layers.position import box_sine_embedding
from dimaskdino.modeling.decoder_config import evaluates_selections, num_selected
from dimaskdino.modeling.heads import PredictionHeads, StagePrediction
from dimaskdino.modeling.registry import DE_IMBALANCE_REGISTRY
from dimaskdino.modeling.selection import Tokens, highest_scores


class TokenInteractionLayer(FeedForward):
    """Self-attention among the selected tokens and a feed-forward block, both post-norm (Eq. 2)."""

    def __init__(self, *, dim: int, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.add_feed_forward(dim, hidden_dim, dropout=0.0)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        """Renew ``content`` (B, k, C), given ``position`` (B, k, C)."""
        query = content + position
        content = self.norm1(content + self.self_attn(query, query, content))
        return self.feed_forward(content, self.norm2)


@DE_IMBALANCE_REGISTRY.register()
class DeImbalance(nn.Module):
    """T_s1 to T_s2: the selected tokens interact, then the best of them are selected again.

    Args:
        dim: channels C.
        hidden_dim: width of the feed-forward blocks.
        num_heads: attention heads.
        num_layers: token-interaction layers before each selection.
        num_selected: tokens that each selection keeps, the first one (which the decoder makes) included: (600, 300) is
            the paper's double selection, (600, 450, 300) its triple one.
        single_delta_boxes: supervise the box that was refined once.
        evaluate_selections: whether evaluation asks for what the tokens of the later selections predict.

    Deviation: the releases supervise token interaction on boxes to which the shared box head was applied twice; their
    weights were trained so, and it is the default. ``single_delta_boxes`` gives the once-applied form.
    """

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_heads: int,
        num_layers: int,
        num_selected: Sequence[int],
        single_delta_boxes: bool,
        evaluate_selections: bool = False,
    ) -> None:
        super().__init__()
        if (
            len(num_selected) < 2
            or min(num_selected) < 1
            or any(later > earlier for earlier, later in zip(num_selected, num_selected[1:], strict=False))
        ):
            raise ConfigError(
                f"MODEL.MaskDINO.DI.NUM_SELECTED is {list(num_selected)}; De-Imbalance needs two or more positive "
                "numbers, none larger than the one before (single selection is DI.ENABLED False)."
            )
        self.num_selected = tuple(num_selected)
        self.layers_per_selection = num_layers
        self.single_delta_boxes = single_delta_boxes
        self.evaluate_selections = evaluate_selections
        self.layers = nn.ModuleList(
            TokenInteractionLayer(dim=dim, hidden_dim=hidden_dim, num_heads=num_heads)
            for _ in range(num_layers * (len(num_selected) - 1))
        )
        self.query_pos = MLP(2 * dim, dim, dim, 2)
        self.norm = nn.LayerNorm(dim)
        self.box_embed = MLP(dim, dim, 4, 3)
        self.dim = dim
        xavier_init(self)
        self.box_embed.zero_last_layer()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO."""
        node = cfg.MODEL.MaskDINO
        return {
            "dim": node.HIDDEN_DIM,
            "hidden_dim": node.DIM_FEEDFORWARD,
            "num_heads": node.NHEADS,
            "num_layers": node.TI_LAYERS,
            "num_selected": num_selected(cfg),
            "single_delta_boxes": node.DI.SINGLE_DELTA_BOXES,
            "evaluate_selections": evaluates_selections(cfg),
        }

    def forward(
        self, t_s1: Tokens, heads: PredictionHeads, mask_features: Tensor | None = None
    ) -> tuple[Tokens, list[StagePrediction]]:
        """Interact and select, once per number after the first.

        Args:
            t_s1: (B, k1, .) the first selection, detached; runs in float32.
            heads: the decoder's prediction heads (norm and class head are shared with them).
            mask_features: (B, C_mask, h, w), to evaluate the selections as well; None in training.

        Returns:
            T_s2 (B, k_last, .), in the graph; one prediction "di.i" (class and box) per layer, and, with mask features,
            one "selection.n" per selection after the first: what the heads predict from the tokens that it keeps, as
            from the queries before layer 0.
        """
        with torch.autocast(t_s1.content.device.type, enabled=False):
            tokens = Tokens(t_s1.content.float(), t_s1.boxes.float())
            predictions: list[StagePrediction] = []
            for number, count in enumerate(self.num_selected[1:], start=2):
                first = (number - 2) * self.layers_per_selection
                for index in range(first, first + self.layers_per_selection):
                    tokens, prediction = self._interact(index, tokens, heads)
                    predictions.append(prediction)
                tokens = tokens.gather(highest_scores(heads.class_embed(self.norm(tokens.content)), count))
                if mask_features is not None:
                    predictions.append(heads(f"selection.{number}", tokens.content, tokens.boxes, mask_features))
            return tokens, predictions

    def _interact(self, index: int, tokens: Tokens, heads: PredictionHeads) -> tuple[Tokens, StagePrediction]:
        """Layer ``index``: renew the content, then the boxes."""
        reference = tokens.boxes.detach()
        position = self.query_pos(box_sine_embedding(reference, self.dim))
        content = self.layers[index](tokens.content, position)
        refined = self._move(content, reference)
        normed = self.norm(content)
        supervised = self._move(normed, tokens.boxes if self.single_delta_boxes else refined)
        return Tokens(content, refined), heads(f"di.{index}", normed, supervised, None)

    def _move(self, content: Tensor, boxes: Tensor) -> Tensor:
        return (self.box_embed(content) + inverse_sigmoid(boxes)).sigmoid()
