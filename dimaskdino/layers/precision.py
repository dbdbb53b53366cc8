"""Precision: which parts compute in float32 under autocast, and why.

Everything else runs in the dtype that autocast chooses. Without autocast a model computes in the dtype of its weights,
float32 or, in evaluation, bfloat16. Boxes, their logits, scores, and losses are float32 in any case: where they are
made, the code says ``.float()``. With weights in bfloat16 these are float32 as well: the mean and the deviation of the
pixels, the sums in softmax, norms and deformable attention, and the places that the latter samples.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from torch import Tensor

from dimaskdino.errors import ConfigError, check_choice

PRECISIONS = ("float32", "bfloat16", "auto")
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
    if tensor.dtype == torch.float64 or not is_under_autocast(tensor.device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def is_under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device, which may be of a kind that has none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def evaluation_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights for one of :data:`PRECISIONS`.

    Raises:
        ConfigError: another precision, or one that the device would emulate, many times slower.
    """
    check_choice("MODEL.MaskDINO.TEST.PRECISION", precision, PRECISIONS)
    if precision == "float32":
        return torch.float32
    if computes_in_bfloat16(device):
        return torch.bfloat16
    if precision == "bfloat16":
        raise ConfigError(
            f"MODEL.MaskDINO.TEST.PRECISION is bfloat16, which the {device.type} of this machine emulates, many times "
            "slower; use float32, or auto."
        )
    return torch.float32


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16; True for types of devices that do not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test is not None and test() for test in tests)
