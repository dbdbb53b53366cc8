"""State dicts of every public release: which one it is, and the way to our names and back."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from dimaskdino.checkpoint import names
from dimaskdino.checkpoint.dino import from_dino, source_of, to_dino
from dimaskdino.errors import CheckpointError


def is_release(keys: Iterable[str]) -> bool:
    """Whether any of ``keys`` has a name that only a release uses."""
    keys = list(keys)
    return source_of(keys) is not None or names.is_release(keys)


def from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of MaskDINO's, DI-MaskDINO's or DINO's release, or of detrex's DINO; names of ours stay.

    Raises:
        CheckpointError: two names of what is one tensor in the releases hold different values.
    """
    return from_dino(state) if source_of(state) else names.from_release(state)


def to_release(state: Mapping[str, Tensor], *, detrex: bool = False) -> dict[str, Tensor]:
    """Rename our state dict to the names of its model's release, or of detrex, with every alias that is stored there.

    Raises:
        CheckpointError: a model that detrex does not have.
    """
    if names.is_dino(state):
        return to_dino(state, "detrex" if detrex else "dino")
    if detrex:
        raise CheckpointError("detrex has DINO, but this is another model; convert it to its release's names.")
    return names.to_release(state)
