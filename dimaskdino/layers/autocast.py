"""What autocast does to an argument, for code that it does not see."""

import torch
from torch import Tensor


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype of autocast where that is on for its device; float64 stays, as under autocast."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not (
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
