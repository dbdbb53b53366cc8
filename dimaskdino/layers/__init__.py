"""Building blocks that know nothing of detection."""

from dimaskdino.layers.attention import MLP, AttentionLayer, FeedForward, MultiheadAttention
from dimaskdino.layers.ms_deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused

__all__ = [
    "MLP",
    "AttentionLayer",
    "FeedForward",
    "MSDeformAttn",
    "MultiheadAttention",
    "ms_deform_attn",
    "ms_deform_attn_fused",
]
