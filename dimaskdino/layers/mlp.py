"""Multi-layer perceptron."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """ReLU of the result of a linear map, in its place where no gradient is asked for.

    With gradients that would be slow: the result is a view, so that autograd copies all of it back and forth.
    """
    return F.relu(x, inplace=not x.requires_grad)
