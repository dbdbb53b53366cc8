"""Prediction heads N_det and N_seg (Eqs. 10 and 11)."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dimaskdino.errors import ConfigError
from dimaskdino.layers import MLP
from dimaskdino.layers.boxes import BOX_EPS, move_boxes
from dimaskdino.structures import MaskLogits, Stage, StagePrediction


class PredictionHeads(nn.Module):
    """Class, box and mask heads; in Mask DINO one set for the first selection and all decoder layers.

    Args:
        dim: channels C of the queries.
        num_logits: class logits: K, or K + 1 with a no-object class.
        mask_dim: channels of the mask features; None for a model without masks.
        norm: normalize the content; False where that is done already.
        eps: distance from 0 and 1 at which boxes are kept when they are moved.
        no_object_class: whether the last logit is that of no object, in a softmax.
        extra: further heads by name, each (B, Q, C) to (B, Q, ...).
    """

    def __init__(
        self,
        *,
        dim: int,
        num_logits: int,
        mask_dim: int | None,
        norm: bool = True,
        eps: float = BOX_EPS,
        no_object_class: bool = False,
        extra: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        for name, head in extra.items():
            if not isinstance(head, nn.Module):
                raise ConfigError(f"MODEL.EXTRA_HEADS: {name} makes a {type(head).__name__}, not a torch.nn.Module.")
        self.dim = dim
        self.eps, self.no_object_class = eps, no_object_class
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.class_embed = nn.Linear(dim, num_logits)
        self.box_embed = MLP(dim, dim, 4, 3)
        self.mask_embed = None if mask_dim is None else MLP(dim, dim, mask_dim, 3)
        self.extra = nn.ModuleDict(extra)
        # A new model predicts the reference box itself.
        self.box_embed.zero_last_layer()

    def refine_box(self, content: Tensor, boxes: Tensor) -> Tensor:
        """Move ``boxes`` (B, Q, 4) cxcywh in [0, 1] by the offsets predicted from ``content`` (B, Q, C), in logits."""
        return move_boxes(boxes, self.box_embed(content), self.eps)

    def class_scores(self, content: Tensor) -> Tensor:
        """Scores (B, N, K) of the classes of normed content (B, N, C), by which selections rank tokens.

        Deviation: where there is a no-object class, the releases rank by its logit as well; here by the probability of
        the best other class. No released configuration selects with such a class.
        """
        logits = self.class_embed(content)
        return logits.log_softmax(-1)[..., :-1] if self.no_object_class else logits

    def forward(self, stage: Stage, content: Tensor, boxes: Tensor, mask_features: Tensor | None) -> StagePrediction:
        """Predict classes and masks from the normed content, and attach the boxes.

        Args:
            stage: which the prediction belongs to.
            content: (B, Q, C).
            boxes: (B, Q, 4) cxcywh in [0, 1], predicted already.
            mask_features: (B, C_mask, h, w), or None to predict no masks.
        """
        normed = self.norm(content)
        masks = None
        if mask_features is not None and self.mask_embed is not None:
            masks = MaskLogits(self.mask_embed(normed), mask_features)
        queries = None if self.training else normed
        return StagePrediction(stage, self.class_embed(normed), boxes, masks, queries, self.extra_values(normed))

    def extra_values(self, normed: Tensor) -> dict[str, Tensor]:
        """What the further heads give for normed queries (B, Q, C).

        Raises:
            ConfigError: something else than (B, Q, ...).
        """
        extra = {name: head(normed) for name, head in self.extra.items()}
        for name, values in extra.items():
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            if not isinstance(values, Tensor) or values.shape[:2] != normed.shape[:2]:
                raise ConfigError(
                    f"MODEL.EXTRA_HEADS: {name} gives {shape} for queries {tuple(normed.shape)}; give a tensor that "
                    "begins with the number of images and of queries."
                )
        return extra

    def check_extra(self) -> None:
        """Raise ConfigError if a further head gives something else than values of its queries."""
        if len(self.extra):
            self.extra_values(torch.zeros(2, 37, self.dim, device=self.class_embed.weight.device))
