"""One optimization step: losses, gradients, clipping, update, and the record of what happened."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.optim import Optimizer

from dimaskdino.engine.hooks import running_statistics
from dimaskdino.engine.nonfinite import Batch, NonFiniteError
from dimaskdino.errors import DatasetError
from dimaskdino.seeds import STEP, seed_from
from dimaskdino.solver.optimizer import GradientClipper, check_optimizer_state, reorder_state, sharded_state


class TrainStep:
    """Trains ``model`` on one batch per call of :meth:`run_step`, in float32 or under autocast.

    The recorded losses are averages over the processes, so the model must return the same terms in every process.

    Args:
        model: maps a batch to ``{name: weighted scalar loss}`` in training mode; may be wrapped for distribution.
        data_loader: yields batches forever; may be set later, before the first step.
        optimizer: optimizes the parameters of ``model``.
        clipper: clips the gradients after loss scaling is undone.
        autocast_to: what autocast computes in; None for none. The loss is scaled for float16, whose small gradients
            would vanish.
        accumulation_steps: parts that the batch is computed in, one after the other; divides the images of a batch.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        data_loader: Iterable[Batch] = (),
        optimizer: Optimizer,
        clipper: GradientClipper,
        autocast_to: torch.dtype | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.clipper = clipper
        self.autocast_to = autocast_to
        self.accumulation_steps = accumulation_steps
        # If set, the random numbers that the model draws depend on it, the iteration and the process alone.
        self.seed: int | None = None
        self.iter = 0
        # Number of the process whose random numbers these are.
        self.process = comm.get_rank()
        # Of the step under way.
        self.batch: Batch = []
        # Whether all processes learn that a step of one of them is not finite, so that they can skip it together.
        self.agrees_on_failures = False
        # Whether this process was asked to stop, and whether any process of the job was; all learn it in the same step.
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self._job_stops = False
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._bare_model = getattr(model, "module", model)
        self._statistics = running_statistics(self._bare_model)
        self._statistics_before: list[Tensor] = []
        self._device = self._parameters[0].device
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=autocast_to is torch.float16)
        self._batches: Iterator[Batch] | None = None

    def run_step(self) -> None:
        """Draw a batch and update the model.

        Raises:
            NonFiniteError: a prediction, a loss, a running statistic or, without loss scaling, a gradient is not
                finite; no weight has changed, and :meth:`undo` forgets the step.
            DatasetError: the batch does not fit the model. Both errors name iteration, process and images.
        """
        start = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self.data_loader)
        self.batch = batch = next(self._batches)
        self._statistics_before = [buffer.clone() for buffer in self._statistics.values()]
        data_time = time.perf_counter() - start
        if self.seed is not None:
            seed_from(self.seed, STEP, self.iter, self.process)

        self.optimizer.zero_grad()
        losses = self._accumulate(batch)
        # Clipping needs the true gradients, so the loss scale comes off first.
        self._scaler.unscale_(self.optimizer)
        grad_norm = self.clipper(self._parameters)

        self._record(batch, losses, grad_norm, data_time)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def end(self) -> None:
        """Let the processes of the loader end; the garbage collector would wait five seconds for each of them."""
        self._batches = None

    @property
    def stops(self) -> bool:
        """Whether the job was asked to stop, the same in all processes."""
        return self.wants_to_stop() if comm.get_world_size() == 1 else self._job_stops

    def undo(self) -> None:
        """Forget a step that failed: its gradients, and what its images did to the running statistics."""
        self.optimizer.zero_grad()
        with contextlib.suppress(AssertionError):  # The step failed before its gradients were unscaled.
            self._scaler.update()
        for buffer, before in zip(self._statistics.values(), self._statistics_before, strict=True):
            buffer.copy_(before)

    def _accumulate(self, batch: Batch) -> dict[str, Tensor]:
        """Add up the gradients of the parts of ``batch``; returns the losses of all of it, out of the graph."""
        size = len(batch) // self.accumulation_steps
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        totals: dict[str, Tensor] = {}
        no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
        with self._parts_of(batch) as weight:
            for part in parts:
                # Processes average their gradients once a step, after its last part.
                stay_here = contextlib.nullcontext if part is parts[-1] else no_sync
                with stay_here():
                    lower = self.autocast_to
                    with torch.autocast(self._device.type, dtype=lower, enabled=lower is not None):
                        losses = self._losses(part)
                        losses = losses if weight == 1 else {name: loss * weight for name, loss in losses.items()}
                        total = torch.stack(list(losses.values())).sum()
                    self._scaler.scale(total).backward()
                totals = {name: totals.get(name, 0.0) + loss.detach() for name, loss in losses.items()}
        return totals

    @contextlib.contextmanager
    def _parts_of(self, batch: Batch) -> Iterator[float]:
        """Yields the weight of each part's losses: models of this package themselves divide by the whole batch."""
        share = getattr(self._bare_model, "losses_are_parts_of", None)
        if self.accumulation_steps == 1 or share is None:
            yield 1.0 / self.accumulation_steps
            return
        with share(batch):
            yield 1.0

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        failure: Exception | None = None
        try:
            losses = self.model(batch)
        except DatasetError as error:
            raise DatasetError(f"{error} ({self._place_of(batch)})") from error
        except FloatingPointError as error:
            failure = error
        if self._has_failed(failure is not None):
            what = str(failure or "A prediction of another process is not finite.")
            raise NonFiniteError(f"{what} ({self._place_of(batch)})", ["costs of the matching"]) from failure
        return losses

    def _has_failed(self, failed: bool) -> bool:
        """Whether this process has failed or, where the processes agree, any of them; then all must call this."""
        if not self.agrees_on_failures or comm.get_world_size() == 1:
            return failed
        flag = torch.tensor(float(failed), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _place_of(self, batch: Batch) -> str:
        images = ", ".join(str(image.get("file_name", image.get("image_id", "?"))) for image in batch)
        return f"iteration {self.iter}, process {self.process}, images {images}"

    def _record(self, batch: Batch, losses: dict[str, Tensor], grad_norm: Tensor, data_time: float) -> None:
        """Check what was computed and write the averages over the processes to the event storage."""
        names = [*sorted(losses), "grad_norm"]
        measured = losses | {"grad_norm": grad_norm}
        values = torch.stack([measured[name].detach().float() for name in names])
        # The one time that the host waits for the device.
        *local, statistics = torch.cat([values, self._sum_of_statistics()]).tolist()
        self._check_finite(batch, losses, dict(zip(names, local, strict=True)), statistics)
        if comm.get_world_size() > 1:
            values = torch.cat([values, values.new_tensor([self.wants_to_stop()])])
            dist.all_reduce(values)
            *local, stops = (values / comm.get_world_size()).tolist()
            self._job_stops = stops > 0
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        averages = dict(zip(names, local, strict=True))
        norm = averages.pop("grad_norm")
        storage.put_scalars(data_time=data_time, total_loss=sum(averages.values()), **averages)
        # If the loss scaler is about to skip the step, the norm is not worth recording.
        if math.isfinite(norm):
            storage.put_scalar("grad_norm", norm)

    def _sum_of_statistics(self) -> Tensor:
        """A number that is finite if all running statistics are, shape (1,)."""
        if not self._statistics:
            return torch.zeros(1, device=self._device)
        # A sum of finite values may overflow, a sum of zeros cannot.
        return (torch.cat(list(self._statistics.values())) * 0).sum()[None].float()

    def _check_finite(
        self, batch: Batch, losses: dict[str, Tensor], values: dict[str, float], statistics: float
    ) -> None:
        """Check losses, running statistics, and the gradient norm unless the loss scaler deals with it."""
        terms = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        # The norm follows from the losses; it is a cause of its own only if they are finite.
        bad = [term for term in terms if not term.startswith("grad_norm")]
        if not self._scaler.is_enabled():
            bad = bad or terms
        if not math.isfinite(statistics):
            bad += [name for name, buffer in self._statistics.items() if not buffer.isfinite().all()]
        remedy = (
            " Go on from the last checkpoint with --resume, and check these images, or lower SOLVER.BASE_LR; "
            "SOLVER.NONFINITE skip goes on without such steps."
        )
        if self._has_failed(bool(bad)):
            bad = bad or ["something of another process"]
            raise NonFiniteError(f"Not finite: {', '.join(bad)} ({self._place_of(batch)}).{remedy}", bad, losses)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and loss scale; the trainer saves the iteration."""
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any], saved_names: Sequence[str]) -> None:
        """Restore a :meth:`state_dict`, whose loss scale is empty if the run did not scale.

        ``saved_names`` are the names of the parameters in the order of the model that was saved.

        Raises:
            CheckpointError: the state is of another optimizer.
        """
        saved = reorder_state(self.optimizer, self._bare_model, state["optimizer"], saved_names)
        check_optimizer_state(self.optimizer, saved)
        self.optimizer.load_state_dict(sharded_state(self.optimizer, saved))
        if self._scaler.is_enabled() and state["grad_scaler"]:
            self._scaler.load_state_dict(state["grad_scaler"])
