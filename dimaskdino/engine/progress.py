"""The console's view of a training: one line now and then with ETA, losses, speed and memory."""

import datetime
import logging
import re
import time

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

logger = logging.getLogger(__name__)

WINDOW = 20
# Names such as loss_mask_3, loss_box_dn_2 or loss_ce_interm are supervised stages besides the final one.
STAGE_SUFFIX = re.compile(r"_(\d+|interm|di|dn)(_\d+)?$")


class ProgressLog(HookBase):
    """Logs every ``period`` iterations, and every ``seconds`` where iterations are slow.

    The losses shown are the total and the final stage's; metrics.json and TensorBoard have every term.
    """

    def __init__(self, *, period: int = 20, seconds: float = 10.0) -> None:
        self._period = period
        self._seconds = seconds
        self._last = 0.0

    def before_train(self) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def after_step(self) -> None:
        """Log a line when one is due."""
        done = self.trainer.iter + 1
        now = time.perf_counter()
        if done % self._period and done != self.trainer.max_iter and now - self._last < self._seconds:
            return
        self._last = now
        logger.info(progress_line(self.trainer.storage, done, self.trainer.max_iter))


def progress_line(storage: EventStorage, done: int, max_iter: int) -> str:
    """What ``storage`` knows of the last iterations, as one line.

    Args:
        storage: with total_loss and, once measured, time, data_time, lr and grad_norm.
        done: iterations done.
        max_iter: iterations in all.
    """
    histories = storage.histories()
    parts = [f"{done}/{max_iter}"]
    if "time" in histories:
        seconds = histories["time"].median(1000)
        parts.insert(0, f"eta {datetime.timedelta(seconds=int(seconds * (max_iter - done)))}")
    shown = ["total_loss"] + sorted(name for name in histories if name.startswith("loss_") and _is_final(name))
    shown += [name for name in ("grad_norm", "time", "data_time") if name in histories]
    parts += [f"{name} {histories[name].median(WINDOW):.4g}" for name in shown]
    if "lr" in histories:
        parts.append(f"lr {histories['lr'].latest():.4g}")
    if torch.cuda.is_available():
        parts.append(f"max_mem {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
    return "  ".join(parts)


def _is_final(name: str) -> bool:
    return not STAGE_SUFFIX.search(name)
