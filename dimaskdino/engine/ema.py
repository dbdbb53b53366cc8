"""The exponential moving average of a model's weights (SOLVER.EMA)."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dimaskdino.layers.shards import local, part_of


class AveragedWeights:
    """Averages the trainable parameters of a model; all else in :meth:`state_dict` is the model's own.

    The model is not wrapped for distribution; all processes have the same average, or where its parameters are sharded
    (SOLVER.SHARDING full), their parts of it. ``decay`` is the part of the average that stays, in [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._model, self._decay = model, decay
        self._parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.clone() for name, p in self._parameters.items()}
        # What this process has of both, in the same memory.
        self._own = [local(p) for p in self._parameters.values()]
        self._own_average = [local(p) for p in self._average.values()]

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Move the average towards the weights; early averages forget faster, or they would hold initial weights."""
        decay = min(self._decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self._own_average, self._own, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the averaged model."""
        return {**self._model.state_dict(), **self._average}

    @torch.no_grad()
    def restart(self, saved: Mapping[str, Tensor] | None) -> None:
        """Go on from a saved :meth:`state_dict`, or from the model's own weights if there is none."""
        for name, average in self._average.items():
            average.copy_(self._parameters[name] if saved is None else part_of(saved[name], average))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While it is entered, the model has the averaged weights."""
        own = [parameter.clone() for parameter in self._own]
        with torch.no_grad():
            torch._foreach_copy_(self._own, self._own_average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._own, own)
