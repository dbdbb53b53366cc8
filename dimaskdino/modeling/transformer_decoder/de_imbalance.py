"""De-Imbalance: selection, token interaction, second selection (Eqs. 1 to 3). Eq. 4 is decoder layer 0."""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers import MLP, AttentionLayer
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.boxes import move_boxes
from dimaskdino.layers.position import box_sine_embedding
from dimaskdino.layers.precision import float32_block
from dimaskdino.modeling.registry import DE_IMBALANCE_REGISTRY
from dimaskdino.modeling.transformer_decoder.checks import layer_sizes, num_selected
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.structures import Stage, StagePrediction, Tokens, highest_scores

PredictStage = Callable[[Stage, Tokens], StagePrediction]


@DE_IMBALANCE_REGISTRY.register()
class DeImbalance(nn.Module):
    """T_s1 to T_s2: the selected tokens interact, then the best of them are selected again.

    Args:
        dim: channels C.
        hidden_dim: width of the feed-forward blocks.
        num_heads: attention heads.
        num_layers: token-interaction layers before each selection.
        num_selected: tokens that each selection keeps, including the first one, which the decoder makes: (600, 300) is
            the paper's double selection, (600, 450, 300) its triple one.
        single_delta_boxes: supervise the box that was refined once.

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
        self.layers = nn.ModuleList(
            AttentionLayer(dim=dim, hidden_dim=hidden_dim, num_heads=num_heads, attention_name="self_attn")
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
            **layer_sizes(node),
            "num_layers": node.TI_LAYERS,
            "num_selected": num_selected(cfg),
            "single_delta_boxes": node.DI.SINGLE_DELTA_BOXES,
        }

    @property
    def selection_stages(self) -> tuple[Stage, ...]:
        """The selections after the first, which evaluation can report."""
        return tuple(Stage("selection", number) for number in range(2, len(self.num_selected) + 1))

    def forward(
        self, t_s1: Tokens, heads: PredictionHeads, predict: PredictStage | None = None
    ) -> tuple[Tokens, list[StagePrediction]]:
        """Interact and select, once per number after the first.

        Args:
            t_s1: (B, k1, .) the first selection, detached.
            heads: the decoder's prediction heads; the norm and the class head are shared with them.
            predict: predicts from the tokens of a selection as from the queries before layer 0; None in training.

        Returns:
            T_s2 (B, k_last, .), in the graph; one prediction "di.i" (class and box) per layer, and, with ``predict``,
            one "selection.n" per selection after the first.
        """
        predictions: list[StagePrediction] = []
        with float32_block("token interaction", t_s1.content.device):
            tokens = Tokens(t_s1.content.to(self.norm.weight.dtype), t_s1.boxes)
            for stage, count in zip(self.selection_stages, self.num_selected[1:], strict=True):
                first = (stage.index - 2) * self.layers_per_selection
                for index in range(first, first + self.layers_per_selection):
                    tokens, prediction = self._interact(index, tokens, heads)
                    predictions.append(prediction)
                tokens = tokens.gather(highest_scores(heads.class_scores(self.norm(tokens.content)), count))
                if predict is not None:
                    predictions.append(predict(stage, tokens))
            return tokens, predictions

    def _interact(self, index: int, tokens: Tokens, heads: PredictionHeads) -> tuple[Tokens, StagePrediction]:
        """Layer ``index`` (Eq. 2): update the content, then the boxes."""
        reference = tokens.boxes.detach()
        position = self.query_pos(box_sine_embedding(reference, self.dim).to(tokens.content.dtype))
        query = tokens.content + position
        content = self.layers[index](tokens.content, query, query, tokens.content)
        refined = move_boxes(reference, self.box_embed(content))
        normed = self.norm(content)
        supervised = move_boxes(tokens.boxes if self.single_delta_boxes else refined, self.box_embed(normed))
        return Tokens(content, refined), heads(Stage("di", index), normed, supervised, None)
