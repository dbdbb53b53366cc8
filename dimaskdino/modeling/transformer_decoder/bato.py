"""Balance-Aware Tokens Optimization: Q_bal guides the feature tokens (Eqs. 5 to 8)."""

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, get_norm
from fvcore.nn import weight_init
from torch import Tensor, nn

from dimaskdino.layers import MLP, AttentionLayer
from dimaskdino.layers.attention import relu, xavier_init
from dimaskdino.layers.precision import float32_block
from dimaskdino.modeling.registry import BATO_REGISTRY
from dimaskdino.modeling.transformer_decoder.checks import layer_sizes
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.structures import highest_scores, take

_GUIDE_LAYERS = 3  # linear layers of each MLP of the paper's form, as in the box and mask heads


@BATO_REGISTRY.register()
class BalanceAwareTokensOptimization(nn.Module):
    """T_bal = MHCA(T_i, T_g), and mask features renewed from it.

    Args:
        dim: channels C; also the channels of the mask features.
        hidden_dim: width of the feed-forward block.
        num_heads: attention heads.
        num_guiding_tokens: G, the queries with the highest class logit that guide.
        generate_guiding_tokens: make mask and box guiding tokens (Eqs. 5 to 7); otherwise the queries themselves guide.
        paper_form: make them as the paper prints Eqs. 5 to 8.

    Deviation: the paper makes both guiding tokens by an MLP of Q_bal and attends to their sum, which is
    ``paper_form``; the released code, and this default, uses the mask-embedding head and the positional embedding of
    the box, and attends with the sum as key and the mask part alone as value.
    """

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_heads: int,
        num_guiding_tokens: int,
        generate_guiding_tokens: bool,
        paper_form: bool = False,
    ) -> None:
        super().__init__()
        self.num_guiding_tokens = num_guiding_tokens
        self.generate_guiding_tokens = generate_guiding_tokens
        self.mask_guide = MLP(dim, dim, dim, _GUIDE_LAYERS) if paper_form else None
        self.box_guide = MLP(dim, dim, dim, _GUIDE_LAYERS) if paper_form else None
        self.attention = AttentionLayer(
            dim=dim, hidden_dim=hidden_dim, num_heads=num_heads, attention_name="multihead_attn"
        )
        self.mask_conv = Conv2d(dim, dim, 3, padding=1, bias=False, norm=get_norm("GN", dim), activation=relu)
        xavier_init(self.attention)
        weight_init.c2_xavier_fill(self.mask_conv)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO."""
        node = cfg.MODEL.MaskDINO
        return {
            **layer_sizes(node),
            "num_guiding_tokens": node.NUM_GUIDING_TOKENS,
            "generate_guiding_tokens": node.BATO.GTG,
            "paper_form": node.BATO.PAPER_FORM,
        }

    def forward(
        self, t_i: Tensor, token_position: Tensor, content: Tensor, position: Tensor, heads: PredictionHeads
    ) -> Tensor:
        """Optimize the feature tokens (Eq. 8).

        Args:
            t_i: (B, N, C) initial tokens.
            token_position: (N, C) sine positions of the tokens.
            content: (B, Q, C) of the guiding queries (Q_bal).
            position: (B, Q, C) positional embedding of their boxes.
            heads: the decoder's prediction heads; class head for the choice, mask head for the guiding tokens.

        Returns:
            T_bal (B, N, C), in the dtype of the weights.
        """
        keys, values = self._guiding_tokens(content, position, heads)
        dtype = self.attention.norm1.weight.dtype
        with float32_block("token optimization", t_i.device):
            tokens = t_i.to(dtype)
            query = tokens + token_position.to(dtype)
            return self.attention(tokens, query, keys.to(dtype), values.to(dtype))

    def choose_guides(self, class_scores: Tensor) -> Tensor:
        """Which queries guide, given their scores (B, Q, K): indices (B, G) int64; G may be Q where there are fewer."""
        return highest_scores(class_scores, self.num_guiding_tokens)

    def _guiding_tokens(self, content: Tensor, position: Tensor, heads: PredictionHeads) -> tuple[Tensor, Tensor]:
        """Keys and values T_g (B, G, C) (Eqs. 5 to 7)."""
        index = self.choose_guides(heads.class_scores(content))
        guide = take(content, index)
        if not self.generate_guiding_tokens:
            return guide, guide
        if self.mask_guide is not None and self.box_guide is not None:
            t_g = self.mask_guide(guide) + self.box_guide(guide)
            return t_g, t_g
        assert heads.mask_embed is not None
        t_g_mask = heads.mask_embed(guide)
        t_g_box = take(position, index)
        return t_g_mask + t_g_box, t_g_mask

    def renew_mask_features(self, mask_features: Tensor, finest_level: Tensor) -> Tensor:
        """Fuse the finest level of T_bal into the mask features.

        Args:
            mask_features: (B, C, h, w) at stride 4.
            finest_level: (B, C, h', w') of T_bal, at stride 8.

        Returns:
            (B, C, h, w).
        """
        upsampled = F.interpolate(finest_level, size=mask_features.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_conv(mask_features + upsampled)
