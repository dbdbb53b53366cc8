"""The checkpoint with the best score, and the end of a run that no longer gets better."""

import math
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from dimaskdino.checkpoint import BEST, Checkpointer
from dimaskdino.errors import ConfigError
from dimaskdino.modeling.meta_arch import needs_masks


class KeepBest(HookBase):
    """Saves model_best.pth after each evaluation that scores higher than all before; a higher score must be better.

    Register it in every process, after the hook that evaluates.

    Args:
        metric: name of the score, such as "segm/AP"; with several test sets, after the name of one of them.
        patience: evaluations in a row without a higher score after which the run stops; 0 means that it never does.
        eval_period: iterations between evaluations.
        checkpointer: saves.
    """

    def __init__(self, metric: str, *, patience: int, eval_period: int, checkpointer: Checkpointer) -> None:
        self._metric, self._patience, self._eval_period = metric, patience, eval_period
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

    def after_step(self) -> None:
        """Look at the score if there was an evaluation."""
        done = self.trainer.iter + 1
        if self._eval_period > 0 and done % self._eval_period == 0 and done != self.trainer.max_iter:
            self._look(done - 1)

    def after_train(self) -> None:
        """Look at the score of the last evaluation."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._look(self.trainer.max_iter - 1)
            self.trainer.save("model_final", self.trainer.max_iter - 1)  # with this score, in case the run goes on

    def _look(self, iteration: int) -> None:
        results = comm.all_gather(flatten_results_dict(self.trainer._last_eval_results or {}))[0]
        if self._metric not in results:
            raise ConfigError(
                f"TEST.BEST_METRIC is {self._metric!r}, but the evaluation gives only {', '.join(sorted(results))}."
            )
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
    """Check the keys of this module, before data is read.

    Raises:
        ConfigError: names the keys that contradict each other.
    """
    metric, patience = cfg.TEST.BEST_METRIC, cfg.TEST.EARLY_STOP_PATIENCE
    if patience < 0 or cfg.SOLVER.CHECKPOINT_KEEP < 0:
        key = "TEST.EARLY_STOP_PATIENCE" if patience < 0 else "SOLVER.CHECKPOINT_KEEP"
        raise ConfigError(f"{key} is {min(patience, cfg.SOLVER.CHECKPOINT_KEEP)}; it must be at least 0.")
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
    """The key that keeps a score from being computed; "" where it may be one, of an evaluator of one's own too."""
    first, _, rest = metric.partition("/")
    if first == "ema":
        return _why_never_computed(cfg, rest) if cfg.SOLVER.EMA.ENABLED else "SOLVER.EMA.ENABLED is False"
    if first in cfg.DATASETS.TEST:
        return _why_never_computed(cfg, rest) if len(cfg.DATASETS.TEST) > 1 else f"with one test set it is {rest!r}"
    if len(cfg.DATASETS.TEST) > 1:
        return f"it begins with one of DATASETS.TEST, {', '.join(cfg.DATASETS.TEST)}"
    if first == "loss":
        return "" if cfg.TEST.LOSS else "TEST.LOSS is False"
    if first == "segm" and not needs_masks(cfg):
        return f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} as configured predicts no masks"
    if first == "panoptic_seg" and not cfg.MODEL.MaskDINO.TEST.PANOPTIC_ON:
        return "MODEL.MaskDINO.TEST.PANOPTIC_ON is False"
    return ""
