"""The part of the trainer that makes a run one run, however often it is interrupted."""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.evaluation import verify_results
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer

from dimaskdino.checkpoint import AVERAGE, FINAL, Checkpointer
from dimaskdino.data.loaders import images_in_a_group
from dimaskdino.engine import hooks, run_folder, writers
from dimaskdino.engine.devices import is_sharding
from dimaskdino.engine.ema import AveragedWeights
from dimaskdino.engine.nonfinite import NonFiniteError, NonFiniteSteps
from dimaskdino.engine.train_step import TrainStep
from dimaskdino.errors import CheckpointError, file_errors_in_one_line
from dimaskdino.solver.optimizer import NEW_RUN, restored_settings, warn_of_kept_settings
from dimaskdino.solver.schedule import batch_factor, scale_learning_rate, take_configured_rates

logger = logging.getLogger(__name__)


class _Stopped(BaseException):
    """Ends the loop before the last iteration. No Exception: detectron2's loop logs those as failures."""


class ResumableTrainer(TrainerBase):
    """detectron2's loop in a run folder; after an interruption it continues as if there had been none.

    Subclasses set :attr:`step`, :attr:`scheduler` and :attr:`checkpointer`, and build the loader.
    """

    iter: int
    step: TrainStep
    scheduler: LRMultiplier
    checkpointer: Checkpointer

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self._given_cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.cfg = cfg = scale_learning_rate(DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()))
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._last_eval_results: dict[str, Any] | None = None
        self._first_batch = 0  # number of batches of this run that were drawn before start_iter
        self._group_size = images_in_a_group(cfg)
        self._saved_scalars: dict[str, Any] = {}
        self._periodic: PeriodicCheckpointer | None = None
        self._best: hooks.KeepBest | None = None
        self.nonfinite = NonFiniteSteps(cfg)
        self._average: AveragedWeights | None = None

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0, group_size: int = 0) -> Any:
        """Endless training batches after the first ``start_iter``."""
        raise NotImplementedError

    @property
    def model(self) -> nn.Module:
        """The model in training, wrapped for distribution if the job has several processes."""
        return self.step.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the model."""
        return self.step.optimizer

    @property
    def data_loader(self) -> Iterable[Any]:
        """The training batches, once :meth:`train` has built the loader."""
        return self.step.data_loader

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in OUTPUT_DIR if ``resume``, else load MODEL.WEIGHTS and start at 0.

        Raises:
            UserError: the processes find different checkpoints, or the checkpoint has another model or optimizer.
        """
        run_folder.check_same_checkpoint(self.checkpointer, resume=resume)
        if resume and not self.checkpointer.has_checkpoint():
            logger.warning("--resume: no checkpoint in %s; starting from MODEL.WEIGHTS.", self.cfg.OUTPUT_DIR)
            resume = False
        configured = restored_settings(self.optimizer)
        content = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self._average:
            self._average.restart(content.get(AVERAGE) if resume else None)
        if not resume:
            return
        warn_of_kept_settings(configured, restored_settings(self.optimizer))
        # The checkpoint holds the iteration that it was saved after.
        self.start_iter = self.iter + 1
        if self.start_iter >= self.max_iter:
            logger.warning(
                "--resume: this run is finished: its last checkpoint follows iteration %d, and SOLVER.MAX_ITER is %d. "
                "It is evaluated again; to continue training, set a larger SOLVER.MAX_ITER.",
                self.start_iter,
                self.max_iter,
            )

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to SOLVER.MAX_ITER; a new run sets an earlier one in its folder aside.

        Returns the results of the last evaluation on the main process, if there is a test set.
        """
        self.step.data_loader = self._build_seeded_loader(self._first_batch)
        # Where the weights are sharded, all processes are needed to write them down.
        self.step.seed = self.seed
        self.step.agrees_on_failures = self.nonfinite.skips or is_sharding(self.cfg, "full")
        # If any process cannot start, the folder stays as it is.
        comm.synchronize()
        folder = Path(self.cfg.OUTPUT_DIR)
        with contextlib.ExitStack() as stack:
            if comm.is_main_process():
                self._claim_folder(folder, stack)
            signals = run_folder.StopSignals()
            stack.enter_context(signals.caught())
            stack.callback(self.step.end)
            self.step.wants_to_stop = lambda: bool(signals.received)
            try:
                super().train(self.start_iter, self.max_iter)
            except _Stopped as reason:
                logger.warning("The run stops: %s.", reason)
                comm.synchronize()  # No process leaves while another one still saves.
                if self.step.stops:
                    raise SystemExit(signals.exit_status) from None
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results or {})
        return self._last_eval_results

    def _build_seeded_loader(self, first_batch: int) -> Any:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed
        # A run that goes on with another number of processes keeps its batches.
        options = {} if self._group_size == images_in_a_group(cfg) else {"group_size": self._group_size}
        return self.build_train_loader(cfg, first_batch, **options)

    def _claim_folder(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Make OUTPUT_DIR the folder of this run: from now on config.yaml describes the checkpoints there."""
        with run_folder.full_disk_in_one_line(folder), file_errors_in_one_line():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_folder.folder_lock(folder))
            run_folder.check_free_space(folder, self.model, copies=3 + 2 * bool(self._average))
            if self.start_iter:
                self._remove_old_checkpoints()
                writers.cut_records(folder / writers.METRICS_FILE, self.start_iter - 1)
            else:
                run_folder.set_earlier_run_aside(folder)
                self.checkpointer.run_id = uuid.uuid4().hex
            run_folder.write_config(self._given_cfg, folder, self.checkpointer.run_id)

    def _remove_old_checkpoints(self) -> None:
        """Remove what the run was about to remove when it was interrupted; detectron2's hook removes one at a time."""
        keep = self.cfg.SOLVER.CHECKPOINT_KEEP
        while keep and self._periodic and len(self._periodic.recent_checkpoints) > keep:
            Path(self._periodic.recent_checkpoints.pop(0)).unlink(missing_ok=True)

    def before_train(self) -> None:
        """Run the hooks before the first iteration; a resumed run first completes the iteration of its checkpoint."""
        super().before_train()
        if self.start_iter:
            writers.restore_scalars(self.storage, self._saved_scalars)
            if self.start_iter >= self.max_iter and Path(self.checkpointer.get_checkpoint_file()).name != FINAL:
                self.save("model_final", self.start_iter - 1)  # The run was cut off before it, or it is damaged.
            if self._saved_scalars and comm.all_gather(self._lacks_record())[0]:
                self._complete_step()
            elif self._best:
                # The checkpoint was saved before this evaluation.
                metrics = Path(self.cfg.OUTPUT_DIR) / writers.METRICS_FILE
                record = writers.record_of(metrics, self.start_iter - 1)
                self._best.count(comm.all_gather(record)[0], self.start_iter - 1)
            if self._best and self._best.is_over:
                self._stop(self._best.describe(), self.start_iter - 1)

    def save(self, name: str, iteration: int) -> None:
        """Save a checkpoint, to go on after ``iteration``."""
        now, self.iter = self.iter, iteration
        self.checkpointer.save(name, iteration=iteration)
        self.iter = now

    def _lacks_record(self) -> bool:
        due = hooks.is_due(self.start_iter, self.max_iter, writers.WINDOW, self.cfg.TEST.EVAL_PERIOD)
        return due and writers.last_record(Path(self.cfg.OUTPUT_DIR) / writers.METRICS_FILE) < self.start_iter - 1

    def _complete_step(self) -> None:
        """Do what came after the checkpoint was saved: evaluate, and write the records."""
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks:
            if isinstance(hook, hooks.EvaluateWhenTrained | hooks.WriteRecords):
                hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def run_step(self) -> None:
        """One iteration."""
        self.step.iter = self.iter
        try:
            self.step.run_step()
        except NonFiniteError as error:
            self.nonfinite.handle(error, self.step)
        if self.nonfinite.skipped:
            self.storage.put_scalar("skipped_steps", self.nonfinite.skipped, smoothing_hint=False)

    def after_step(self) -> None:
        """Run the hooks, which evaluate, save and log."""
        with run_folder.full_disk_in_one_line(Path(self.cfg.OUTPUT_DIR)):
            super().after_step()
            if self.iter + 1 < self.max_iter:
                if self._best and self._best.is_over:
                    self._stop(self._best.describe(), self.iter)
                elif self.step.stops:
                    self._save_and_stop()

    def _stop(self, reason: str, last: int) -> None:
        """End the run before its last iteration."""
        self.save("model_final", last)
        raise _Stopped(reason)

    def _save_and_stop(self) -> None:
        """Save, unless this iteration was saved, and end the run."""
        hooks.average_running_statistics(self.model)
        name = f"model_{self.iter:07d}"
        last = self.checkpointer.get_checkpoint_file() if comm.is_main_process() else ""
        if comm.all_gather(last)[0] != os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth"):
            self.save(name, self.iter)
        raise _Stopped(f"a signal asked for it; go on after iteration {self.iter + 1} with --resume")

    def after_train(self) -> None:
        """Run the hooks at the end of the training, or after an error ended it."""
        self.iter = min(self.iter, self.max_iter)  # detectron2 counts one more where nothing was left to train.
        with run_folder.full_disk_in_one_line(Path(self.cfg.OUTPUT_DIR)):
            super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks (with the schedule), step (with the optimizer), and what makes the run repeatable."""
        batches = self._first_batch + self.iter + 1 - self.start_iter
        run = {
            "seed": self.seed,
            "images_drawn": batches * self.cfg.SOLVER.IMS_PER_BATCH,
            "group_size": self._group_size,
            "config": self._given_cfg.dump(),
            "periodic": [os.path.basename(path) for path in getattr(self._periodic, "recent_checkpoints", ())],
            "scalars": writers.recent_scalars(self.storage) if hasattr(self, "storage") else {},
            "nonfinite": {"skipped": self.nonfinite.skipped},
        }
        return {**super().state_dict(), "step": self.step.state_dict(), "run": run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`."""
        if "step" not in state_dict:
            raise CheckpointError(f"its training state ({', '.join(state_dict)}) is of another trainer; {NEW_RUN}.")
        super().load_state_dict(state_dict)
        configured = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.step.load_state_dict(state_dict["step"], self.checkpointer.loaded_names)
        # The schedule saved these in the order of the groups.
        self.scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        run = state_dict.get("run")
        if run and batch_factor(yaml.safe_load(run["config"])["SOLVER"]) != batch_factor(self._given_cfg.SOLVER):
            take_configured_rates(self.scheduler, configured)
        self._restore_run(run)

    def _restore_run(self, run: dict[str, Any] | None) -> None:
        if run is None:
            self._first_batch = self.iter + 1
            logger.warning(
                "--resume: the checkpoint is from an earlier version, which did not save the whole state of a run: the "
                "images around the interruption and all later random numbers differ from an uninterrupted run's."
            )
            return
        if changes := writers.changed_settings(run["config"], self._given_cfg.dump()):
            logger.warning("--resume: settings changed since the checkpoint: %s.", "; ".join(changes))
        if self.cfg.SEED not in (run["seed"], -1):
            logger.warning("--resume keeps the seed of the run, %d. To train with another, %s.", run["seed"], NEW_RUN)
        self.seed, self._group_size, self._saved_scalars = run["seed"], run["group_size"], run["scalars"]
        if self._periodic:
            saved = os.path.basename(self.checkpointer.get_checkpoint_file())
            names = [*run["periodic"], *([] if saved == FINAL else [saved])]
            self._periodic.recent_checkpoints = [os.path.join(self.cfg.OUTPUT_DIR, name) for name in names]
        self.nonfinite.skipped = run.get("nonfinite", {}).get("skipped", 0)
        self._first_batch = run["images_drawn"] // self.cfg.SOLVER.IMS_PER_BATCH
        if self.cfg.SOLVER.IMS_PER_BATCH % self._group_size:
            self._group_size = images_in_a_group(self.cfg)
