"""What a model predicts, stage by stage, before losses or results are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimaskdino.structures.stages import Stage
from dimaskdino.structures.tokens import FeatureTokens, Tokens

Matches = list[tuple[Tensor, Tensor]]
"""For each image, (query, target) indices that belong together, each (m,) int64."""


@dataclass(frozen=True)
class MaskLogits:
    """Predicted masks as the factors of a dot product, so that only the masks or points in use are ever computed."""

    embed: Tensor  #: (B, Q, C) mask embeddings of the queries
    features: Tensor  #: (B, C, h, w) mask features

    def dense(self) -> Tensor:
        """All masks: (B, Q, h, w) logits."""
        return torch.einsum("bqc,bchw->bqhw", self.embed, self.features)

    def select(self, image: int, queries: Tensor) -> Tensor:
        """Masks of some queries of one image: ``queries`` (N,) int64 to (N, h, w) logits."""
        return mask_logits(self.embed[image, queries], self.features[image])


def mask_logits(embed: Tensor, features: Tensor) -> Tensor:
    """Masks of one image: embeddings (N, C) and features (C, h, w) to (N, h, w) logits."""
    return torch.einsum("nc,chw->nhw", embed, features)


@dataclass(frozen=True)
class StagePrediction:
    """What the heads predict from the queries of one stage."""

    stage: Stage  #: which one
    logits: Tensor  #: (B, Q, K) class logits
    boxes: Tensor  #: (B, Q, 4) cxcywh in [0, 1]
    masks: MaskLogits | None = None  #: mask logits, or None where the stage predicts no masks
    queries: Tensor | None = None  #: (B, Q, C) that the class head reads, normed; None in training
    #: (B, Q, ...) of each head of MODEL.EXTRA_HEADS, by its registered name
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.stage.name

    def split(self, num_denoising: int, num_padding: int = 0) -> tuple["StagePrediction", "StagePrediction"]:
        """The predictions of the denoising queries, which come first after any padding, and those of the others."""
        end = num_padding + num_denoising
        first = self._take(slice(num_padding, end))
        return replace(first, stage=self.stage.of_denoising()), self._take(slice(end, None))

    def _take(self, queries: slice) -> "StagePrediction":
        masks = self.masks and replace(self.masks, embed=self.masks.embed[:, queries])
        own = None if self.queries is None else self.queries[:, queries]
        extra = {name: values[:, queries] for name, values in self.extra.items()}
        logits, boxes = self.logits[:, queries], self.boxes[:, queries]
        return replace(self, logits=logits, boxes=boxes, masks=masks, queries=own, extra=extra)


def group_by_mask_features(predictions: Sequence[StagePrediction]) -> list[list[int]]:
    """Indices of the predictions with masks, grouped by the mask features (the same tensor) that they share."""
    groups: dict[int, list[int]] = {}
    for index, prediction in enumerate(predictions):
        if prediction.masks is not None:
            groups.setdefault(id(prediction.masks.features), []).append(index)
    return list(groups.values())


@dataclass(frozen=True)
class DenoisingQueries:
    """Noised ground truth, in groups, to be put in front of the matching queries."""

    #: (B, padding + P, .) with P = groups * places per group; unused places and the padding in front hold zeros at the
    #: box (.5, .5, .5, .5)
    tokens: Tokens
    #: for each image the (query, target) indices that belong together, each (m,) int64; queries count from the first
    #: group
    matches: Matches
    num_groups: int  #: copies of every object
    group_size: int  #: places per group
    num_padding: int = 0  #: queries before the groups that stand for nothing

    @property
    def num_queries(self) -> int:
        """Places of all groups, P."""
        return self.num_groups * self.group_size

    def attention_mask(self, num_matching: int) -> Tensor:
        """(padding + P, padding + P + Q) bool, True where a query of padding or denoising must not see another.

        Groups do not see each other; denoising queries see the matching ones. Nothing sees the padding but itself.
        Matching queries, which have no row, see all matching queries and no other: a mask of all pairs would be the
        one tensor that grows with the square of their number.
        """
        device = self.tokens.content.device
        group = torch.arange(self.num_queries, device=device) // max(self.group_size, 1)
        group = torch.cat((group.new_full((self.num_padding,), -2), group))
        return F.pad(group[:, None] != group[None, :], (0, num_matching))


@dataclass(frozen=True)
class DecoderOutput:
    """Everything that the decoder predicts."""

    #: predictions in the order in which they are made; the last one is the model's result
    stages: list[StagePrediction]
    #: of the denoising queries, one per stage of the matching queries; empty without denoising
    denoising_stages: list[StagePrediction]
    denoising: DenoisingQueries | None  #: the denoising queries that those belong to
    t_i: FeatureTokens | None = None  #: the encoder's tokens


def on_cpu(result: Any) -> Any:
    """A model's result, a dictionary, with every tensor on the CPU."""
    if isinstance(result, dict):
        return {name: on_cpu(value) for name, value in result.items()}
    if isinstance(result, tuple):  # a panoptic map and its segments
        return tuple(map(on_cpu, result))
    return result.to("cpu") if hasattr(result, "to") else result
