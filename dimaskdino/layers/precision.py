"""Precision: which parts compute in float32 under autocast, and why.

Everything else runs in the dtype that autocast chooses. Without autocast a model computes in the dtype of its weights,
float32 or, in evaluation, bfloat16. Boxes, their logits, scores, and losses are float32 in any case: where they are
made, the code says ``.float()``.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from torch import Tensor

FLOAT32_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "encoder": "half precision cannot tell the pixels of a large level apart; released weights were trained so",
        "decoder layer": "as the encoder: it samples large levels around boxes",
        "token interaction": "each layer refines the boxes of the one before, in logits",
        "token optimization": "released weights were trained so",
        "matching": "the cost of a large mask is a sum over its points, which overflows float16",
    }
)


def float32_block(part: str, device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off inside ``part``, one of :data:`FLOAT32_PARTS`.

    Inputs that autocast has made half must be cast to the weights' dtype, for example by ``x.to(weight.dtype)``.
    """
    if part not in FLOAT32_PARTS:
        raise KeyError(f"{part!r} is not in FLOAT32_PARTS; name it there with the reason.")
    return torch.autocast(device.type, enabled=False)


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """``tensor`` in autocast's dtype where autocast is on for its device, for ops that autocast does not know.

    float64 stays, as under autocast.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not (
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
