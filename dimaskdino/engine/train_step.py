"""One optimisation step: losses, gradients, clipping, update, and the record of what happened."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.optim import Optimizer

from dimaskdino.engine.optimizer import GradientClipper
from dimaskdino.engine.resuming import check_optimizer_state
from dimaskdino.errors import DatasetError

Batch = list[dict[str, Any]]


class TrainStep:
    """Trains ``model`` by one batch per call of :meth:`run_step`, in fp32 or with fp16 autocast and loss scaling.

    detectron2's DefaultTrainer calls it ``_trainer``. The losses are averaged over the processes for the record, so
    the model must return the same terms in every process.

    Args:
        model: maps a batch to ``{name: weighted scalar loss}`` in training mode; may be wrapped for distribution.
        data_loader: yields batches for ever; may be set later, before the first step.
        optimizer: over the parameters of ``model``.
        clipper: limits the gradients once they are unscaled.
        amp: whether to autocast to fp16.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        data_loader: Iterable[Batch] | None = None,
        optimizer: Optimizer,
        clipper: GradientClipper,
        amp: bool,
    ) -> None:
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.clipper = clipper
        self.amp = amp
        self.iter = 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=amp)
        self._batches: Iterator[Batch] | None = None

    def run_step(self) -> None:
        """Draw a batch and update the model by it.

        Raises:
            FloatingPointError: a prediction, a loss, or without loss scaling a gradient, is not finite.
            DatasetError: the batch does not fit the model. Both name iteration, process and images.
        """
        start = time.perf_counter()
        batch = self._next_batch()
        data_time = time.perf_counter() - start

        with torch.autocast(self._device.type, enabled=self.amp):
            losses = self._losses(batch)
            total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        self._scaler.scale(total).backward()
        # Clipping must see true gradients, so the loss scale comes off first.
        self._scaler.unscale_(self.optimizer)
        grad_norm = self.clipper(self._parameters)

        self._record(batch, losses, grad_norm, data_time)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        try:
            return self.model(batch)
        except (FloatingPointError, DatasetError) as error:
            raise type(error)(f"{error} ({self._place_of(batch)})") from error

    def _place_of(self, batch: Batch) -> str:
        images = ", ".join(str(image.get("file_name", image.get("image_id", "?"))) for image in batch)
        return f"iteration {self.iter}, process {comm.get_rank()}, images {images}"

    def _next_batch(self) -> Batch:
        if self._batches is None:
            if self.data_loader is None:
                raise RuntimeError("The training step has no data loader yet.")
            self._batches = iter(self.data_loader)
        return next(self._batches)

    def _record(self, batch: Batch, losses: dict[str, Tensor], grad_norm: Tensor, data_time: float) -> None:
        """Check what was computed and write the averages over the processes to the event storage."""
        names = sorted(losses)
        values = torch.stack([losses[name].detach().float() for name in names] + [grad_norm.detach().float()])
        local = values.tolist()
        self._check_finite(batch, dict(zip(names, local, strict=False)), local[-1])
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            local = (values / comm.get_world_size()).tolist()
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", data_time)
        storage.put_scalar("total_loss", sum(local[:-1]))
        storage.put_scalars(**dict(zip(names, local, strict=False)))
        # A step that the loss scaler is about to skip has no norm worth recording.
        if _is_finite(local[-1]):
            storage.put_scalar("grad_norm", local[-1])

    def _check_finite(self, batch: Batch, losses: dict[str, float], grad_norm: float) -> None:
        bad = {name: value for name, value in losses.items() if not _is_finite(value)}
        if not bad and not self.amp and not _is_finite(grad_norm):
            bad = {"grad_norm": grad_norm}
        if bad:
            terms = ", ".join(f"{name} = {value}" for name, value in bad.items())
            raise FloatingPointError(f"Not finite: {terms} ({self._place_of(batch)}).")

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and loss scale; the iteration is the trainer's."""
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; the scale of a run without loss scaling is empty.

        Raises:
            CheckpointError: the state is of another optimiser.
        """
        check_optimizer_state(self.optimizer, state["optimizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.amp and state["grad_scaler"]:
            self._scaler.load_state_dict(state["grad_scaler"])


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")
