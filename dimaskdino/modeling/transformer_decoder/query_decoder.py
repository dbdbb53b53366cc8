"""What all decoders of this family share: queries from selected tokens, denoising, refinement layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dimaskdino.layers import MLP
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.padding import ValidCells
from dimaskdino.layers.position import box_sine_embedding
from dimaskdino.layers.precision import float32_block
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.modeling.transformer_decoder.selection import FirstSelection
from dimaskdino.structures import (
    DecoderOutput,
    EncoderOutput,
    FeatureTokens,
    Stage,
    StagePrediction,
    Targets,
    Tokens,
    decoder_stages,
)


@dataclass(frozen=True)
class Queries:
    """The queries between two layers."""

    content: Tensor  # (B, Q, C)
    reference: Tensor  # (B, Q, 4) cxcywh in [0, 1], the boxes that the next layer looks at, cut from the graph
    # the same boxes in the graph, from which the next stage's supervised boxes start (look forward twice)
    previous: Tensor
    # (P, Q) bool, True where one of the P denoising queries, which come first, must not see another; the others see all
    # but those. None when all see all.
    attn_mask: Tensor | None


@dataclass(frozen=True)
class Selection:
    """The tokens from which the queries are made."""

    first: Tokens  # T_s1, those of the first selection
    last: Tokens  # those of the last selection; T_s2 with De-Imbalance, else T_s1
    predictions: list[StagePrediction]  # of the selections, in order


class QueryDecoder(nn.Module):
    """Selection, denoising, and layers that refine queries, with a prediction after each.

    Args:
        dim: width C of queries and tokens.
        heads: class, box and mask heads; a decoder with several sets of them says in :meth:`heads_of` which is whose.
        selection: first selection; None for learned queries.
        num_first_selected: tokens that it keeps.
        query_feat: learned content of the queries, or None to take that of the selected tokens.
        query_embed: learned boxes (logits), for learned queries alone.
        denoising: makes denoising queries from targets in training, or gives None for a batch without any.
        layers: decoder layers, layer 0 included.
        initial_prediction: predict before layer 0 as well.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: nn.Module,
        selection: FirstSelection | None,
        num_first_selected: int,
        query_feat: nn.Embedding | None,
        query_embed: nn.Embedding | None,
        denoising: nn.Module,
        layers: Sequence[nn.Module],
        initial_prediction: bool,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.heads, self.denoising, self.num_first_selected = heads, denoising, num_first_selected
        self.selection, self.query_feat, self.query_embed = selection, query_feat, query_embed
        self.query_pos = MLP(2 * dim, dim, dim, 2)
        xavier_init(self.query_pos)
        self.layers = nn.ModuleList(layers)
        self.query_stages = decoder_stages(len(self.layers), initial=initial_prediction)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages whose results can be evaluated, in the order in which they are predicted; the last is the result."""
        return (*self.selection_stages, *self.query_stages)

    @property
    def selection_stages(self) -> tuple[Stage, ...]:
        """The stages before the decoder's queries that can be evaluated: the first selection, where there is one."""
        return () if self.selection is None else (Stage("interm"),)

    @property
    def predicts_masks(self) -> bool:
        """Whether the stages have masks."""
        return self.heads_of(self.query_stages[-1]).mask_embed is not None

    def heads_of(self, stage: Stage) -> PredictionHeads:
        """The heads that predict a stage."""
        return self.heads  # type: ignore[return-value]

    def forward(self, encoded: EncoderOutput, targets: Sequence[Targets] | None = None) -> DecoderOutput:
        """Predict all stages from the encoder's output; the targets are for denoising, None in evaluation."""
        t_i = self.feature_tokens(encoded)
        selection = self.select(t_i, encoded.mask_features, training=targets is not None)
        queries, attn_mask = self.matching_queries(selection.last), None
        denoising = None if targets is None else self.denoising(targets)
        if denoising is not None:
            attn_mask = denoising.attention_mask(queries.content.shape[1])
            queries = queries.prepend(denoising.tokens)
        start = Queries(queries.content, queries.boxes, queries.boxes, attn_mask)
        predictions = self.predict_initial(start, encoded.mask_features)
        predictions += self.refine(start, t_i, encoded.mask_features, selection)
        if denoising is None:
            if targets is not None:
                predictions[-1] = self._touch_denoising(predictions[-1])
            return DecoderOutput(selection.predictions + predictions, [], None, t_i)
        pairs = [prediction.split(denoising.num_queries, denoising.num_padding) for prediction in predictions]
        matching = [matching for _, matching in pairs]
        return DecoderOutput(selection.predictions + matching, [noised for noised, _ in pairs], denoising)

    def feature_tokens(self, encoded: EncoderOutput) -> FeatureTokens:
        """T_i, the tokens of all levels."""
        raise NotImplementedError

    def select(self, t_i: FeatureTokens, mask_features: Tensor | None, *, training: bool) -> Selection:
        """T_s1 and what it predicts, or the learned queries."""
        if self.selection is None:
            assert self.query_feat is not None
            assert self.query_embed is not None
            batch = t_i.tokens.shape[0]
            content, boxes = self.query_feat.weight, self.query_embed.weight.float().sigmoid()
            learned = Tokens(content.expand(batch, -1, -1), boxes.expand(batch, -1, -1))
            return Selection(learned, learned, [])
        heads = self.heads_of(Stage("interm"))
        t_s1, interm = self.selection(t_i, mask_features, heads, self.num_first_selected)
        return Selection(t_s1, t_s1, [interm])

    def matching_queries(self, tokens: Tokens) -> Tokens:
        """What layer 0 starts from: the tokens of the last selection, with learned content where there is any."""
        if self.query_feat is None:
            return tokens
        content = self.query_feat.weight[: tokens.content.shape[1]].expand_as(tokens.content)
        return Tokens(content, tokens.boxes)

    def predict_initial(self, queries: Queries, mask_features: Tensor | None) -> list[StagePrediction]:
        """The prediction before layer 0, in a list; empty where there is none."""
        stage = self.query_stages[0]
        if stage.kind != "initial":
            return []
        return [self.heads_of(stage)(stage, queries.content, queries.reference, mask_features)]

    def refine(
        self, queries: Queries, t_i: FeatureTokens, mask_features: Tensor | None, selection: Selection
    ) -> list[StagePrediction]:
        """The predictions of all layers."""
        return self.run_layers(slice(None), queries, t_i, mask_features)[1]

    def run_layers(
        self, layers: slice, queries: Queries, tokens: FeatureTokens, mask_features: Tensor | None
    ) -> tuple[Queries, list[StagePrediction]]:
        """Refine the queries by some of the layers, with a prediction after each."""
        predictions = []
        stages = self.query_stages[-len(self.layers) :]
        dtype = self.query_pos.dtype
        for stage, layer in zip(stages[layers], self.layers[layers], strict=True):
            position = self.embed_boxes(queries.reference, tokens.valid)
            with float32_block("decoder layer", position.device):
                content = layer(
                    queries.content.to(dtype),
                    position.to(dtype),
                    queries.reference,
                    tokens.tokens.to(dtype),
                    tokens.spatial_shapes,
                    queries.attn_mask,
                    tokens.valid,
                )
            prediction, boxes = self.predict(stage, content, queries, mask_features)
            predictions.append(prediction)
            queries = replace(queries, content=content, reference=boxes.detach(), previous=boxes)
        return queries, predictions

    def predict(
        self, stage: Stage, content: Tensor, queries: Queries, mask_features: Tensor | None
    ) -> tuple[StagePrediction, Tensor]:
        """The prediction of a layer, and the boxes (B, Q, 4) that the next layer starts from.

        Args:
            stage: of the layer.
            content: (B, Q, C) that the layer gives.
            queries: that it was given.
            mask_features: (B, C_mask, h, w), or None.
        """
        heads = self.heads_of(stage)
        normed = heads.norm(content)
        supervised = heads.refine_box(normed, queries.previous)
        prediction = heads(stage, normed, supervised, mask_features)
        return prediction, heads.refine_box(content, queries.reference)

    def embed_boxes(self, boxes: Tensor, valid: ValidCells | None = None) -> Tensor:
        """Positional embedding (B, Q, C) of boxes (B, Q, 4), which are parts of the image where ``valid`` is given."""
        if valid is not None:
            # Parts of the first level, as in DINO: levels are padded by slightly different shares.
            boxes = boxes * valid.ratios[:, :1].repeat(1, 1, 2)
        return self.query_pos(box_sine_embedding(boxes, self.dim).to(self.query_pos.dtype))

    def _touch_denoising(self, prediction: StagePrediction) -> StagePrediction:
        """Give denoising's weights a zero gradient where a batch denoises nothing, as data-parallel training needs."""
        logits = prediction.logits
        for weight in self.denoising.parameters():
            logits = logits + 0.0 * weight.sum()
        return replace(prediction, logits=logits)
