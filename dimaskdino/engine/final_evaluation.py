"""Evaluation while a model is trained, and at the end of a training that has one."""

from detectron2.engine.hooks import EvalHook


class EvaluateIfTrained(EvalHook):
    """detectron2's EvalHook, which takes an error in the last iteration for the end of a training.

    There it would evaluate a model that is not trained to its end and write its results; in several processes the one
    that failed would wait for the others in the evaluation, and they for its gradients.
    """

    def after_train(self) -> None:
        """Evaluate where the loop has come to its end: only then has it counted beyond its last iteration."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
        else:
            del self._func  # It may hold the trainer, which holds this hook.
