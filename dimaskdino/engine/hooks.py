"""The trainer's hooks: progress, evaluation, records, the best checkpoint, batch norm, and those of a user."""

import datetime
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter, PreciseBN
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from fvcore.common.registry import Registry
from torch import Tensor, nn

from dimaskdino.checkpoint import BEST, Checkpointer
from dimaskdino.engine.writers import WINDOW
from dimaskdino.errors import ConfigError, check_choice, check_range, make_part
from dimaskdino.modeling.meta_arch import needs_masks
from dimaskdino.structures import is_final_loss

logger = logging.getLogger(__name__)

_LONGEST_SILENCE_S = 10.0
HOOK_REGISTRY = Registry("HOOK")
HOOK_REGISTRY.__doc__ = """
Builders of hooks by the names in SOLVER.HOOKS. Each is called as ``builder(cfg)`` in every process and returns one of
detectron2's ``HookBase``. They run after evaluation and before the records are written, so what they put into
``self.trainer.storage`` is in metrics.json. A hook with ``state_dict`` and ``load_state_dict`` is resumed as well.
"""


def is_due(done: int, max_iter: int, *periods: int) -> bool:
    """Whether one of the periods, or the run, ends after ``done`` iterations; a period of 0 never ends."""
    return done == max_iter or any(period > 0 and done % period == 0 for period in periods)


class ProgressLog(HookBase):
    """Logs a :func:`progress_line` every 20 iterations, and every 10 seconds if they are slow; of ``images`` each."""

    def __init__(self, *, images: int) -> None:
        self._images = images
        self._last = 0.0

    def before_train(self) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def after_step(self) -> None:
        """Log a line if one is due."""
        done = self.trainer.iter + 1
        now = time.perf_counter()
        if is_due(done, self.trainer.max_iter, WINDOW) or now - self._last >= _LONGEST_SILENCE_S:
            self._last = now
            logger.info(progress_line(self.trainer.storage, done, self.trainer.max_iter, images=self._images))


def progress_line(storage: EventStorage, done: int, max_iter: int, *, images: int = 0) -> str:
    """The last iterations in one line: total loss and, as far as they are measured, times, lr, grad_norm and others.

    Of the losses, those of the last stage; metrics.json and TensorBoard have every term.
    """
    histories = storage.histories()
    parts = [f"{done}/{max_iter}"]
    if "time" in histories:
        seconds = histories["time"].median(1000)
        parts.insert(0, f"eta {datetime.timedelta(seconds=int(seconds * (max_iter - done)))}")
    shown = ["total_loss", *sorted(name for name in histories if name.startswith("loss_") and is_final_loss(name))]
    shown += [name for name in ("grad_norm", "time", "data_time") if name in histories]
    parts += [f"{name} {histories[name].median(WINDOW):.4g}" for name in shown if name in histories]
    if "lr" in histories:
        parts.append(f"lr {histories['lr'].latest():.4g}")
    if images and "time" in histories:
        parts.append(f"rate {images / max(histories['time'].median(WINDOW), 1e-9):.3g} images/s")
    if "skipped_steps" in histories:
        parts.append(f"skipped_steps {histories['skipped_steps'].latest():.0f}")
    parts.append(f"max_mem {peak_memory() / 2**20:.0f}M")
    return "  ".join(parts)


def peak_memory() -> int:
    """The most memory in bytes that this process has used: of its GPU, or without one, of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class EvaluateWhenTrained(EvalHook):
    """detectron2's EvalHook, except that a run that fails in its last iteration is not evaluated.

    detectron2 would evaluate the unfinished model and write its results. With several processes, the one that failed
    would wait for the others in the evaluation, and the others for its gradients. Subclasses that override ``_do_eval``
    do something else at the same times.
    """

    def after_train(self) -> None:
        """Evaluate if the loop finished: only then does the iteration count exceed the last iteration."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
        else:
            del self._func  # It may hold the trainer, which holds this hook.


class WriteRecords(PeriodicWriter):
    """detectron2's PeriodicWriter, which also writes with each evaluation.

    So a checkpoint whose iteration is due but has no record was followed by an evaluation that did not finish.
    """

    def __init__(self, writers: list[EventWriter], *, eval_period: int) -> None:
        super().__init__(writers, period=WINDOW)
        self._eval_period = eval_period

    def after_step(self) -> None:
        """Write if a record is due."""
        if is_due(self.trainer.iter + 1, self.trainer.max_iter, WINDOW, self._eval_period):
            for writer in self._writers:
                writer.write()
            self.trainer.storage.clear_images()

    def after_train(self) -> None:
        """Write the last record of a run that is done; a run that will be resumed has no record where it stopped."""
        if self.trainer.iter < self.trainer.max_iter:
            for writer in self._writers:
                writer.close()
            return
        super().after_train()


class RepeatablePreciseBN(PreciseBN):
    """detectron2's PreciseBN on the same images each time, so that a resumed run has the same statistics."""

    def update_stats(self) -> None:
        """Restart the images, then update."""
        self._data_iter = None
        super().update_stats()


def average_statistics_before_use(trainer: Any) -> None:
    """Call :func:`average_running_statistics` after iterations whose model is evaluated or saved, as the last one's.

    All processes must call it, before the hooks that evaluate and save, even if only the main one has those.
    """
    cfg = trainer.cfg
    if is_due(trainer.iter + 1, trainer.max_iter, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD):
        average_running_statistics(trainer.model)


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give every process the running statistics of the images of all processes; all processes must call this.

    Each process has the mean and variance of its own, equally large share of the images. The mean of all images is the
    mean of the means. Their variance, E[x^2] - E[x]^2, is the mean of the variances plus the variance of the means;
    without the second term it would be too small if the shares differ, as they do in short runs and with few images
    per process. The second term is computed from the distances to the common mean: in float32 this neither cancels
    nor becomes negative.

    Training does not change, since it normalizes by the batch. Frozen batch norm is not touched.
    """
    buffers = list(running_statistics(model).values())
    if comm.get_world_size() == 1 or not buffers:
        return
    means, variances = torch.cat(buffers[::2]).float(), torch.cat(buffers[1::2]).float()
    common_mean = _average(means)
    common_variance = _average(variances + (means - common_mean).square())
    sizes = [len(mean) for mean in buffers[::2]]
    for own, common in ((buffers[::2], common_mean), (buffers[1::2], common_variance)):
        for buffer, values in zip(own, common.split(sizes), strict=True):
            buffer.copy_(values)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running mean and then the variance of each batch or instance norm that updates them, by buffer name.

    The frozen batch norms of detectron2 and timm are other classes.
    """
    return {
        f"{name}.{buffer}" if name else buffer: getattr(norm, buffer)
        for name, norm in model.named_modules()
        if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.running_mean is not None
        for buffer in ("running_mean", "running_var")
    }


def _average(values: Tensor) -> Tensor:
    """Average over the processes, with the same bits in each."""
    total = values.clone()
    dist.all_reduce(total)
    return total / comm.get_world_size()


def check_hooks(cfg: CfgNode) -> None:
    """Raise ConfigError if SOLVER.HOOKS names what is not registered."""
    for name in cfg.SOLVER.HOOKS:
        check_choice("An entry of SOLVER.HOOKS", name, [known for known, _ in HOOK_REGISTRY])


def build_own_hooks(cfg: CfgNode) -> list[HookBase]:
    """The hooks that SOLVER.HOOKS names; raises ConfigError if a name is not registered, or what is makes no hook."""
    check_hooks(cfg)
    hooks = [make_part("SOLVER.HOOKS", HOOK_REGISTRY.get(name), cfg) for name in cfg.SOLVER.HOOKS]
    for name, hook in zip(cfg.SOLVER.HOOKS, hooks, strict=True):
        if not isinstance(hook, HookBase):
            raise ConfigError(
                f"SOLVER.HOOKS {name} ({HOOK_REGISTRY.get(name).__module__}) gives a {type(hook).__name__}, not one of "
                "detectron2's HookBase."
            )
    return hooks


class KeepBest(EvaluateWhenTrained):
    """Saves model_best.pth after each evaluation with a higher TEST.BEST_METRIC than all before.

    Register it in every process, after the hook that evaluates. After TEST.EARLY_STOP_PATIENCE evaluations without a
    higher score, the run is over.
    """

    def __init__(self, cfg: CfgNode, checkpointer: Checkpointer) -> None:
        super().__init__(cfg.TEST.EVAL_PERIOD, None)
        self._metric, self._patience = cfg.TEST.BEST_METRIC, cfg.TEST.EARLY_STOP_PATIENCE
        self._checkpointer = checkpointer
        self.best, self.best_at, self._seen, self._without_gain = -math.inf, -1, -1, 0

    @property
    def is_over(self) -> bool:
        """Whether the run has had too many evaluations without a higher score."""
        return 0 < self._patience <= self._without_gain

    def describe(self) -> str:
        """Why the run is over."""
        return (
            f"in {self._without_gain} evaluations, {self._metric} was not above {self.best:.4g}, its value after "
            f"{self.best_at + 1} iterations (TEST.EARLY_STOP_PATIENCE is {self._patience}; --resume with a larger one "
            "trains on)"
        )

    def after_train(self) -> None:
        """Look at the score of the last evaluation."""
        super().after_train()
        if self.trainer.iter >= self.trainer.max_iter:
            self.trainer.save("model_final", self.trainer.max_iter - 1)  # with this score, in case the run goes on

    def _do_eval(self) -> None:
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        results = comm.all_gather(flatten_results_dict(self.trainer._last_eval_results or {}))[0]
        if self._metric not in results:
            raise ConfigError(
                f"TEST.BEST_METRIC is {self._metric!r}, but the evaluation gives only {', '.join(sorted(results))}."
            )
        if math.isnan(results[self._metric]):
            logger.warning("TEST.BEST_METRIC %s is not measured here, so this model is not the best one.", self._metric)
        if self.count(results, iteration):
            self._checkpointer.write(BEST, iteration=iteration)

    def count(self, results: Mapping[str, float], iteration: int) -> bool:
        """Count an evaluation, once; returns whether its score is the best."""
        if iteration <= self._seen or self._metric not in results:
            return False
        self._seen = iteration
        if not results[self._metric] > self.best:  # also where it is NaN
            self._without_gain += 1
            return False
        self.best, self.best_at, self._without_gain = float(results[self._metric]), iteration, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best score, and what came after it."""
        return {
            "metric": self._metric,
            "best": self.best,
            "best_at": self.best_at,
            "seen": self._seen,
            "without_gain": self._without_gain,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict` of the same metric."""
        if state["metric"] == self._metric:
            self.best, self.best_at = state["best"], state["best_at"]
            self._seen, self._without_gain = state["seen"], state["without_gain"]


def check_best(cfg: CfgNode) -> None:
    """Check the keys of :class:`KeepBest`, before data is read; raises ConfigError."""
    metric, patience = cfg.TEST.BEST_METRIC, cfg.TEST.EARLY_STOP_PATIENCE
    check_range("TEST.EARLY_STOP_PATIENCE", patience, 0)
    check_range("SOLVER.CHECKPOINT_KEEP", cfg.SOLVER.CHECKPOINT_KEEP, 0)
    if metric and not cfg.DATASETS.TEST:
        raise ConfigError(f"TEST.BEST_METRIC is {metric!r}, but DATASETS.TEST is empty; name a dataset, or unset it.")
    if metric and (reason := _why_never_computed(cfg, metric)):
        raise ConfigError(f"TEST.BEST_METRIC is {metric!r}, but no evaluation gives it: {reason}.")
    if patience and not (metric and cfg.TEST.EVAL_PERIOD > 0):
        raise ConfigError(
            f"TEST.EARLY_STOP_PATIENCE is {patience}, but nothing is measured during training; set TEST.BEST_METRIC "
            "and TEST.EVAL_PERIOD, or set it to 0."
        )


def _why_never_computed(cfg: CfgNode, metric: str) -> str:
    """The key that keeps a score from being computed; "" if some evaluator, perhaps a user's own, may give it."""
    first, _, rest = metric.partition("/")
    if first == "ema":
        return _why_never_computed(cfg, rest) if cfg.SOLVER.EMA.ENABLED else "SOLVER.EMA.ENABLED is False"
    if len(cfg.DATASETS.TEST) > 1:
        if first not in cfg.DATASETS.TEST:
            return f"it begins with one of DATASETS.TEST, {', '.join(cfg.DATASETS.TEST)}"
        first = rest.partition("/")[0]
    elif first in cfg.DATASETS.TEST:
        return f"with one test set it is {rest!r}"
    if first == "loss":
        return "" if cfg.TEST.LOSS else "TEST.LOSS is False"
    key = {"bbox": "INSTANCE_ON", "segm": "INSTANCE_ON", "sem_seg": "SEMANTIC_ON", "panoptic_seg": "PANOPTIC_ON"}.get(
        first
    )
    if key is None or (first == "bbox" and not needs_masks(cfg)):
        return ""
    if not needs_masks(cfg):
        return f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} as configured predicts no masks"
    return "" if cfg.MODEL.MaskDINO.TEST[key] else f"MODEL.MaskDINO.TEST.{key} is False"
