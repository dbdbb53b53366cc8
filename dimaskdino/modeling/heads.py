"""Prediction heads N_det and N_seg (Eqs. 10 and 11), and the object that carries what they predict."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dimaskdino.layers import MLP
from dimaskdino.layers.boxes import inverse_sigmoid


@dataclass(frozen=True)
class MaskLogits:
    """Predicted masks as the factors of a dot product, so that only the masks or points in use are ever computed.

    Attributes:
        embed: (B, Q, C) mask embeddings of the queries.
        features: (B, C, h, w) mask features.
    """

    embed: Tensor
    features: Tensor

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
    """What the heads predict from the queries of one stage.

    Attributes:
        name: "interm", "di.0", "selection.2", "initial", "layer.3"; those of denoising queries begin with "dn.".
        logits: (B, Q, K) class logits.
        boxes: (B, Q, 4) cxcywh in [0, 1].
        masks: mask logits, or None where the stage predicts no masks.
    """

    name: str
    logits: Tensor
    boxes: Tensor
    masks: MaskLogits | None = None

    def split(self, num_denoising: int) -> tuple["StagePrediction", "StagePrediction"]:
        """The predictions of the first ``num_denoising`` queries (named "dn. ...") and those of the others."""
        first = self._take(slice(None, num_denoising))
        return replace(first, name=f"dn.{self.name}"), self._take(slice(num_denoising, None))

    def _take(self, queries: slice) -> "StagePrediction":
        masks = self.masks and replace(self.masks, embed=self.masks.embed[:, queries])
        return replace(self, logits=self.logits[:, queries], boxes=self.boxes[:, queries], masks=masks)


class PredictionHeads(nn.Module):
    """Class, box and mask heads, shared by the first selection and by all decoder layers.

    Args:
        dim: channels C of the queries.
        num_logits: class logits K.
        mask_dim: channels of the mask features.
    """

    def __init__(self, *, dim: int, num_logits: int, mask_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, num_logits)
        self.box_embed = MLP(dim, dim, 4, 3)
        self.mask_embed = MLP(dim, dim, mask_dim, 3)
        # A new model predicts the reference box itself.
        self.box_embed.zero_last_layer()

    def refine_box(self, content: Tensor, boxes: Tensor) -> Tensor:
        """Move ``boxes`` (B, Q, 4) cxcywh in [0, 1] by the offsets predicted from ``content`` (B, Q, C), in logits."""
        return (self.box_embed(content) + inverse_sigmoid(boxes)).sigmoid()

    def forward(self, name: str, content: Tensor, boxes: Tensor, mask_features: Tensor | None) -> StagePrediction:
        """Predict classes and masks from the normed content, and attach the boxes.

        Args:
            name: of the stage.
            content: (B, Q, C).
            boxes: (B, Q, 4) cxcywh in [0, 1], predicted already.
            mask_features: (B, C_mask, h, w), or None to predict no masks.
        """
        normed = self.norm(content)
        masks = None if mask_features is None else MaskLogits(self.mask_embed(normed), mask_features)
        return StagePrediction(name, self.class_embed(normed), boxes, masks)
