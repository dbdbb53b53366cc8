"""Weights of color images in models of images with other channels."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_COLORS = 3


def fit_channels(
    state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], names: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Give filters on three channels the number of channels of the model's images.

    The first three of more channels get the file's filters, the others zeros: where these are the colors, or the others
    are zero, the outputs are those of the file. One channel gets the sum of the filters, so that gray gives what it
    gave as three equal colors; two channels get the first two filters, times 3/2.

    Args:
        state: weights of a file.
        model_state: weights of the model.
        names: keys of the file to keys of the model; None where they are the same.

    Returns:
        ``state``, with those filters replaced.
    """
    fitted = dict(state)
    for theirs in state:
        ours = theirs if names is None else names.get(theirs, "")
        given, wanted = state[theirs], model_state.get(ours)
        if wanted is None or given.ndim != 4 or given.shape[1] != _COLORS or wanted.ndim != 4:
            continue
        channels = wanted.shape[1]
        if channels == _COLORS or wanted.shape[:1] + wanted.shape[2:] != given.shape[:1] + given.shape[2:]:
            continue
        fitted[theirs] = _filters(given, channels)
        how = "zeros for the others" if channels > _COLORS else "summed" if channels == 1 else "the first two times 3/2"
        logger.warning("%s: its filters on 3 channels are used for %d (%s).", ours, channels, how)
    return fitted


def _filters(given: Tensor, channels: int) -> Tensor:
    if channels == 1:
        return given.sum(1, keepdim=True)
    if channels == 2:
        return given[:, :2] * (_COLORS / 2)
    more = given.new_zeros(given.shape[0], channels - _COLORS, *given.shape[2:])
    return torch.cat((given, more), dim=1)
