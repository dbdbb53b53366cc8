"""Checkpoints without the weights that a run does not train, such as those of a frozen backbone with adapters."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dimaskdino.errors import CheckpointError
from dimaskdino.layers.shards import gathered

logger = logging.getLogger(__name__)

# Entries of a checkpoint: the file of the other weights ("" where the model's construction gives them); their digest.
BASE, DIGEST = "frozen_weights", "frozen_digest"


def frozen_names(model: nn.Module) -> list[str]:
    """The parameters that are not trained."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def without_frozen(model: nn.Module, state: Mapping[str, Tensor], base: str) -> dict[str, Any]:
    """Entries of a checkpoint that leaves out the frozen parameters.

    Args:
        model: in training.
        state: its weights.
        base: the file that the frozen ones are from.
    """
    frozen = set(frozen_names(model))
    kept = {name: value for name, value in state.items() if name not in frozen}
    return {"model": kept, BASE: base, DIGEST: digest({name: state[name] for name in sorted(frozen)})}


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights, by which another run knows that it has the same."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def fill_frozen(model: nn.Module, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a file, with the frozen ones that it left out as the model has them.

    Raises:
        CheckpointError: the model has others than the run that wrote the file.
    """
    missing = [name for name in frozen_names(model) if name not in state]
    own = gathered(model.state_dict(), keep=True)
    filled = {**state, **{name: own[name] for name in missing}}
    if digest({name: own[name] for name in missing}) != about[DIGEST]:
        source = about[BASE] or "the pretrained weights (MODEL.VIT.PRETRAINED, MODEL.TIMM.PRETRAINED)"
        raise CheckpointError(
            f"The file leaves out the frozen weights, and the model's are not those of its training: {source}. "
            "Set the same keys as in that run's config.yaml."
        )
    return filled
