"""Weights made from the key alone: the rule under which the reference runs were recorded, so nothing is downloaded."""

import zlib

import numpy as np
import torch
from torch import Tensor

INTEGER_BUFFERS = ("num_batches_tracked", "relative_position_index")


def weight_of(key: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """The float32 weight that the rule gives to `key`.

    Args:
        key: a name as the release writes it; its CRC32 seeds the numbers.
        shape: the tensor's shape.
    """
    shape = tuple(shape)
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    n = rng.standard_normal(int(np.prod(shape))).reshape(shape).astype(np.float32)
    if key.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif key.endswith("running_mean"):
        n = 0.1 * n
    elif len(shape) >= 2:
        n = n / np.sqrt(np.float32(np.prod(shape[1:])))
    elif len(shape) == 1 and key.endswith(".weight"):
        n = 1 + 0.1 * n
    else:
        n = 0.1 * n
    return torch.from_numpy(n.astype(np.float32))


def reference_state_dict(keys: dict[str, list[int]], alias: dict[str, str]) -> dict[str, Tensor]:
    """A state dict as a release would save it, with the made-up weights.

    Args:
        keys: every key and its shape, in the release's order.
        alias: key -> the earlier key whose tensor it is.

    Returns:
        Every key of `keys`, aliases being the very tensor they alias, except integer buffers, whose values follow from
        the architecture. `criterion.empty_weight` is what the release's criterion holds: ones, and 0.1 for no-object.
    """
    state: dict[str, Tensor] = {}
    for key, shape in keys.items():
        if key in alias:
            state[key] = state[alias[key]]
        elif key.startswith("criterion."):
            state[key] = torch.ones(shape)
            state[key][-1] = 0.1
        elif not key.endswith(INTEGER_BUFFERS):
            state[key] = weight_of(key, shape)
    return state
