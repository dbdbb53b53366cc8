"""First-stage proposals and the first selection S(T_i, k1)."""

import torch
from torch import Tensor, nn

from dimaskdino.layers.boxes import inverse_sigmoid, masks_to_boxes, normalize_boxes, xyxy_to_cxcywh
from dimaskdino.layers.exporting import export_form
from dimaskdino.layers.ms_deform_attn import SpatialShapes
from dimaskdino.layers.padding import ValidCells, level_centers
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.structures import (
    FeatureTokens,
    MaskLogits,
    Stage,
    StagePrediction,
    Tokens,
    highest_scores,
    mask_logits,
    take,
)

_BASE_SIZE = 0.05
_MARGIN = 0.01
_MASKS_PER_CHUNK = 256


def grid_proposals(
    spatial_shapes: SpatialShapes, device: torch.device, valid: ValidCells | None = None
) -> tuple[Tensor, Tensor]:
    """One box per token: centered on its pixel, larger level by level.

    Args:
        spatial_shapes: (height, width) of each level; boxes of level l have sides 0.05 * 2^l.
        device: where the result lives.
        valid: the tokens on the images, where padding is to be ignored.

    Returns:
        (N, 4) float32 cxcywh, and (N,) bool that is False on padding and where a coordinate is outside (0.01, 0.99);
        with ``valid`` both of each image, (B, N, .).

    Source: Deformable DETR, appendix A.4 (two-stage variant).
    """
    boxes = [
        torch.cat((centers, torch.full_like(centers, _BASE_SIZE * 2.0**level)), dim=-1)
        for level, centers in enumerate(level_centers(spatial_shapes, device, valid))
    ]
    proposals = torch.cat(boxes, dim=1)
    usable = ((proposals > _MARGIN) & (proposals < 1 - _MARGIN)).all(-1)
    if valid is None:
        return proposals[0], usable[0]
    return proposals, usable & ~valid.is_padding


class FirstSelection(nn.Module):
    """T_s1 = S(T_i, k1), the first half of Eq. 1.

    Args:
        dim: channels C of the tokens.
        initialize_box_type: ``no`` keeps the box that the box head predicts; ``mask2box`` and ``bitmask`` replace it by
            the box of the predicted mask (see :func:`dimaskdino.layers.boxes.masks_to_boxes`).
    """

    def __init__(self, *, dim: int, initialize_box_type: str) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.initialize_box_type = initialize_box_type

    def forward(
        self, t_i: FeatureTokens, mask_features: Tensor | None, heads: PredictionHeads, num_selected: int
    ) -> tuple[Tokens, StagePrediction]:
        """Select tokens.

        Args:
            t_i: initial tokens.
            mask_features: (B, C_mask, h, w), or None for a model without masks.
            heads: the decoder's prediction heads.
            num_selected: k1.

        Returns:
            T_s1, detached, and the prediction "interm" that supervises it.
        """
        proposals, usable = grid_proposals(t_i.spatial_shapes, t_i.tokens.device, t_i.valid)
        tokens = self.norm(self.proj(t_i.tokens.masked_fill(~usable[..., None], 0)))
        index = highest_scores(heads.class_scores(tokens), num_selected)
        content = take(tokens, index)
        # A token without a usable proposal keeps the box (1, 1, 1, 1), as an infinite logit gives it.
        logits = torch.logit(proposals).masked_fill(~usable[..., None], torch.inf)
        logits = take(logits.expand(index.shape[0], -1, -1), index)
        boxes = (heads.box_embed(content).float() + logits).sigmoid()
        prediction = heads(Stage("interm"), content, boxes, mask_features)
        return Tokens(content.detach(), self._first_boxes(prediction)), prediction

    def _first_boxes(self, prediction: StagePrediction) -> Tensor:
        if self.initialize_box_type == "no" or prediction.masks is None:
            return prediction.boxes.detach()
        return boxes_of_masks(prediction.masks, inclusive=self.initialize_box_type == "mask2box")


@torch.no_grad()
def boxes_of_masks(masks: MaskLogits, *, inclusive: bool) -> Tensor:
    """Boxes (B, Q, 4) cxcywh of the predicted masks (logit > 0), in (0, 1), kept off 0 and 1 by 1e-5."""
    height, width = masks.features.shape[-2:]
    if export_form():  # A loop would fix the size of the batch.
        boxes = masks_to_boxes(masks.dense() > 0, inclusive=inclusive)
    else:  # A few at a time: the dense masks of all queries are the largest tensor of the model.
        boxes = torch.stack(
            [
                torch.cat(
                    [
                        masks_to_boxes(mask_logits(part, features) > 0, inclusive=inclusive)
                        for part in embed.split(_MASKS_PER_CHUNK)
                    ]
                )
                for embed, features in zip(masks.embed, masks.features, strict=True)
            ]
        )
    return inverse_sigmoid(normalize_boxes(xyxy_to_cxcywh(boxes), width, height)).sigmoid()
