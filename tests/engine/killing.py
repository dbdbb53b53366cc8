"""A trainer that dies where a test wants it to."""

import functools
import os
import signal
from typing import Any

from detectron2.utils import comm

from dimaskdino.engine import Trainer
from tests.engine import toy


class Killed(BaseException):
    """Ends a run as a signal 9 would: nothing else is done."""


class KillableTrainer(Trainer):
    """Dies in a given iteration: before the step, or before its evaluation or its records.

    In the phase "signal", the last process of the job gets SIGTERM; in the phase "error", the step fails, and the run
    ends as it does after an error.
    """

    kill_at, phase = -1, "step"

    def run_step(self) -> None:
        """Die, or train."""
        self._die_in("step")
        self._die_in("error")
        if self.iter == self.kill_at and self.phase == "signal" and comm.get_rank() == comm.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        super().run_step()

    def _evaluate(self) -> dict[str, Any]:
        self._die_in("evaluation")
        return {"bbox": {"AP": sum(p.sum().item() for p in self.model.parameters())}}

    def after_step(self) -> None:
        """Run the hooks; die before the last but one, which writes the records."""
        if self.iter == self.kill_at and self.phase == "records":
            for hook in self._hooks[:-2]:
                hook.after_step()
            raise Killed
        super().after_step()

    def after_train(self) -> None:
        """Do nothing after death."""
        if self.iter != self.kill_at or self.phase in ("signal", "error"):
            super().after_train()

    def _die_in(self, phase: str) -> None:
        if self.iter == self.kill_at and self.phase == phase:
            raise Killed


train = functools.partial(toy.train, kind=KillableTrainer)  # until the end or death
