"""State dicts of every public release: which one it is, and the way to our names and back."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dimaskdino.checkpoint.dino import from_dino, source_of, to_dino
from dimaskdino.checkpoint.names import (
    CLASS_KEYS,
    DECODER,
    MASKDINO,
    RELEASES,
    count_modules,
    is_dino,
    our_name,
    to_ours,
    to_theirs,
)
from dimaskdino.errors import CheckpointError

# The releases' criterion stores the weight of the no-object class, which their focal loss does not read.
CRITERION_KEY = "criterion.empty_weight"
NO_OBJECT_WEIGHT = 0.1


def is_release(keys: Iterable[str]) -> bool:
    """Whether any of ``keys`` has a name that only a release uses."""
    keys = list(keys)
    return source_of(keys) is not None or any(key == CRITERION_KEY or our_name(key) != key for key in keys)


def from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of MaskDINO's, DI-MaskDINO's or DINO's release, or of detrex's DINO; names of ours stay.

    Raises:
        CheckpointError: two names of what is one tensor in the releases hold different values.
    """
    if source_of(state):
        return from_dino(state)
    return to_ours({key: value for key, value in state.items() if not key.startswith("criterion.")})


def to_release(state: Mapping[str, Tensor], *, detrex: bool = False) -> dict[str, Tensor]:
    """Rename our state dict to the names of its model's release, or of detrex, with every alias that is stored there.

    Raises:
        CheckpointError: a model that detrex does not have.
    """
    if is_dino(state):
        return to_dino(state, "detrex" if detrex else "dino")
    if detrex:
        raise CheckpointError("detrex has DINO, but this is another model; convert it to its release's names.")
    fitting = (table for prefix, table in RELEASES.items() if any(key.startswith(prefix) for key in state))
    layers, di = count_modules(state, DECODER + "layers."), count_modules(state, DECODER + "de_imbalance.layers.")
    theirs = to_theirs(state, next(fitting, MASKDINO), {"{layer}": layers, "{di}": di})
    labels = state.get(CLASS_KEYS[2], state.get(CLASS_KEYS[0]))
    if labels is not None:
        theirs[CRITERION_KEY] = torch.ones(len(labels) + 1)
        theirs[CRITERION_KEY][-1] = NO_OBJECT_WEIGHT
    return theirs
