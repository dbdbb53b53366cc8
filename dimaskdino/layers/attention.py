"""Multi-layer perceptrons, and attention with its feed-forward block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimaskdino.layers.exporting import is_watched

_WIDE_VALUES = 8 * 2**20  # of the wide tensor of a feed-forward block that is there at once in evaluation


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        input_dim: channels of the input.
        hidden_dim: channels between the layers.
        output_dim: channels of the output.
        num_layers: number of linear layers, at least 1.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(narrow, wide) for narrow, wide in zip(widths[:-1], widths[1:], strict=True)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def zero_last_layer(self) -> None:
        """Start from an output of zero."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return self.layers[-1](x)


def relu(x: Tensor) -> Tensor:
    """ReLU of the output of a linear layer, in place if no gradient is needed.

    With gradients, working in place would be slow: the output is a view, so autograd would copy all of it twice.
    """
    return F.relu(x, inplace=not x.requires_grad)


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that is batch first and returns the output alone, so that the fused kernel is used."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]  # one tensor instead of (output, weights)
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: (B, Q, C).
            key: (B, K, C).
            value: (B, K, C).
            attn_mask: (Q, K) bool, True where a query must not see a key; shared by the batch.

        Returns:
            (B, Q, C).
        """
        output, _ = super().forward(query, key, value, attn_mask=attn_mask, need_weights=False)
        return output


class FeedForward(nn.Module):
    """Mixin of the layers that end in ``norm(x + W2 relu(W1 x))``.

    The two linear layers and the norm belong to the layer itself (``linear1``, ``linear2`` and the norm that is passed
    in), as in the releases' weights.
    """

    linear1: nn.Linear
    linear2: nn.Linear

    def add_feed_forward(self, dim: int, hidden_dim: int, dropout: float) -> None:
        """Create the two linear layers; call from the constructor."""
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def feed_forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or is_watched():
            return self._feed_forward(x, norm)
        # Where nothing is kept for a backward pass, the wide tensor is made for some of the tokens at a time.
        step = max(1, _WIDE_VALUES // (len(x) * self.linear1.out_features))
        return torch.cat([self._feed_forward(piece, norm) for piece in x.split(step, dim=1)], dim=1)

    def _feed_forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        hidden = self.drop(relu(self.linear1(x)))
        return norm(x + self.drop(self.linear2(hidden)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout with the layer's probability; the identity in evaluation."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class AttentionLayer(FeedForward):
    """Attention and a feed-forward block, both post-norm.

    Args:
        dim: channels C.
        hidden_dim: width of the feed-forward block.
        num_heads: attention heads; must divide ``dim``.
        attention_name: name of the attention module, and so of its weights in checkpoints.
    """

    def __init__(self, *, dim: int, hidden_dim: int, num_heads: int, attention_name: str) -> None:
        super().__init__()
        self.attention_name = attention_name
        self.add_module(attention_name, MultiheadAttention(dim, num_heads))
        self.norm1 = nn.LayerNorm(dim)
        self.add_feed_forward(dim, hidden_dim, dropout=0.0)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, content: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Update ``content`` (B, N, C) by what ``query`` (B, N, C) finds in ``key`` and ``value`` (B, K, C)."""
        attended = self.get_submodule(self.attention_name)(query, key, value)
        return self.feed_forward(self.norm1(content + attended), self.norm2)


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform for every weight of two or more dimensions under ``module``, as DETR's transformers start."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
