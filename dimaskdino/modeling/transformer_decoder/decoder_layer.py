"""One refining layer of the decoder (Eq. 9; layer 0 is Eq. 4)."""

import torch
from torch import Tensor, nn

from dimaskdino.layers import FeedForward, MSDeformAttn, MultiheadAttention
from dimaskdino.layers.attention import xavier_init
from dimaskdino.layers.ms_deform_attn import SpatialShapes
from dimaskdino.layers.padding import ValidCells


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
        valid: ValidCells | None = None,
    ) -> Tensor:
        """Update the queries' ``content`` (B, Q, C).

        Args:
            content: (B, Q, C).
            position: (B, Q, C) positional embedding of ``boxes``.
            boxes: (B, Q, 4) cxcywh in [0, 1], where the queries look.
            tokens: (B, N, C) feature tokens.
            spatial_shapes: (height, width) of each level.
            attn_mask: (P, Q) bool, True where one of the first P queries must not see another; the others see all but
                the first P. None when all see all.
            valid: the tokens on the images, where padding is to be ignored; ``boxes`` are then parts of the image.
        """
        query = content + position
        content = self.norm2(content + self._attend(query, content, attn_mask))
        content = self.norm1(content + self.cross_attn(content + position, boxes, tokens, spatial_shapes, valid))
        return self.feed_forward(content, self.norm3)

    def _attend(self, query: Tensor, content: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Self-attention of ``query`` (B, Q, C) to ``content`` (B, Q, C)."""
        if attn_mask is None:
            return self.self_attn(query, query, content)
        first = len(attn_mask)
        masked = self.self_attn(query[:, :first], query, content, attn_mask)
        others = query[:, first:]
        return torch.cat((masked, self.self_attn(others, others, content[:, first:])), dim=1)
