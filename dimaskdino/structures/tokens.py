"""Tokens and queries: what each holds, and where it looks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dimaskdino.layers.exporting import split_levels, to_map
from dimaskdino.layers.ms_deform_attn import SpatialShapes
from dimaskdino.layers.padding import ValidCells


@dataclass(frozen=True)
class Tokens:
    """Tokens or queries."""

    content: Tensor  #: (B, N, C)
    boxes: Tensor  #: (B, N, 4) cxcywh in [0, 1], the position part

    def gather(self, index: Tensor) -> "Tokens":
        """The tokens at ``index`` (B, k) int64."""
        return Tokens(take(self.content, index), take(self.boxes, index))

    def detach(self) -> "Tokens":
        """The same tokens, cut from the graph."""
        return Tokens(self.content.detach(), self.boxes.detach())

    def prepend(self, first: "Tokens") -> "Tokens":
        """``first``, then these tokens."""
        return Tokens(torch.cat((first.content, self.content), 1), torch.cat((first.boxes, self.boxes), 1))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of ``values`` (B, N, C) at ``index`` (B, k), as (B, k, C)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class EncoderOutput(NamedTuple):
    """What the encoder gives the decoder."""

    levels: list[Tensor]  #: feature maps (B, C, h_l, w_l), in the order that MODEL.SEM_SEG_HEAD.FEATURE_ORDER names
    #: (B, C_mask, h, w) at the common stride (4), with which predicted masks are dot products; None for a model without
    #: masks
    mask_features: Tensor | None
    valid: ValidCells | None = None  #: the cells of the levels that lie on the images, where padding is to be ignored


@dataclass(frozen=True)
class FeatureTokens:
    """T_i or T_bal: feature maps flattened into one sequence."""

    tokens: Tensor  #: (B, N, C)
    position: Tensor | None  #: (N, C) sine positions; None for a decoder that uses none
    spatial_shapes: SpatialShapes  #: (height, width) of each level
    valid: ValidCells | None = None  #: the tokens that lie on the images, where padding is to be ignored

    @property
    def finest_level(self) -> Tensor:
        """The level with the most pixels, as a map (B, C, h, w)."""
        areas = [height * width for height, width in self.spatial_shapes]
        finest = max(range(len(areas)), key=areas.__getitem__)
        return to_map(split_levels(self.tokens, self.spatial_shapes)[finest], self.spatial_shapes[finest])


def flatten_levels(levels: list[Tensor]) -> tuple[Tensor, SpatialShapes]:
    """Join feature maps (B, C, h_l, w_l) into tokens (B, N, C); also gives the (height, width) of each level."""
    spatial_shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1), spatial_shapes


def highest_scores(logits: Tensor, num_selected: int) -> Tensor:
    """S(., k): (B, min(k, N)) int64, the tokens whose best class logit of (B, N, K) is highest, best first."""
    return logits.max(-1).values.topk(min(num_selected, logits.shape[1]), dim=1).indices
