"""The training loop: detectron2's loop and hooks around our own step."""

import contextlib
import logging
import os
import sys
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset, verify_results
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dimaskdino.checkpoint import FINAL, Checkpointer
from dimaskdino.data import build_test_loader, build_train_loader, register_all
from dimaskdino.data.loaders import images_per_process
from dimaskdino.engine.best import KeepBest
from dimaskdino.engine.hooks import (
    AverageRunningStatistics,
    EvaluateWhenTrained,
    ProgressLog,
    RepeatablePreciseBN,
    WriteRecords,
    average_running_statistics,
    is_record_due,
)
from dimaskdino.engine.run_folder import (
    METRICS_FILE,
    build_writers,
    check_free_space,
    check_same_checkpoint,
    full_disk_in_one_line,
    read_run_id,
    set_earlier_run_aside,
    write_config,
)
from dimaskdino.engine.run_state import (
    changed_settings,
    cut_records,
    last_record,
    recent_scalars,
    record_of,
    restore_scalars,
)
from dimaskdino.engine.signals import StopSignals, folder_lock
from dimaskdino.engine.train_step import TrainStep
from dimaskdino.errors import CheckpointError, UserError, file_errors_in_one_line
from dimaskdino.evaluation import (
    ForwardTimer,
    SpeedEvaluator,
    build_evaluator,
    check_classes,
    class_names,
    timed,
    write_results,
)
from dimaskdino.modeling.meta_arch import build_model, needs_masks
from dimaskdino.solver import (
    NEW_RUN,
    GradientClipper,
    build_lr_scheduler,
    build_optimizer,
    restored_settings,
    warn_of_kept_settings,
)

logger = logging.getLogger(__name__)


class _Stopped(BaseException):
    """Ends the loop before the last iteration. No Exception: detectron2's loop logs those as failures."""


class Trainer(TrainerBase):
    """Trains the configured model and evaluates it; everything that a run writes is under OUTPUT_DIR.

    It has the methods of detectron2's DefaultTrainer to override, from ``build_model`` to ``test``. Beyond that
    trainer, it also runs on the CPU in several processes, resumes as if it had not been interrupted, clips and records
    the gradient norm, and evaluates and saves one set of running statistics of batch norm.
    """

    iter: int

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self._given_cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.max_iter = cfg.SOLVER.MAX_ITER

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.step = TrainStep(
            model=_distribute(model),
            optimizer=optimizer,
            clipper=GradientClipper.from_config(cfg),
            amp=_uses_amp(cfg),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        names = class_names(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else ()
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, class_names=names, trainer=weakref.proxy(self))
        self.checkpointer.run_id = read_run_id(Path(cfg.OUTPUT_DIR))
        self._last_eval_results: dict[str, Any] | None = None
        self._first_batch = 0  # number of batches of this run that were drawn before start_iter
        self._group_size = images_per_process(cfg)
        self._saved_scalars: dict[str, Any] = {}
        self._periodic: PeriodicCheckpointer | None = None
        self._best: KeepBest | None = None
        self.register_hooks(self.build_hooks())

    @property
    def model(self) -> nn.Module:
        """The model in training, wrapped for distribution if the job has several processes."""
        return self.step.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the model."""
        return self.step.optimizer

    @property
    def data_loader(self) -> Iterable[Any] | None:
        """The training batches; None before :meth:`train` builds the loader."""
        return self.step.data_loader

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in OUTPUT_DIR if ``resume``, else load MODEL.WEIGHTS and start at 0.

        Raises:
            UserError: the processes find different checkpoints, or the checkpoint has another model or optimizer.
        """
        check_same_checkpoint(self.checkpointer, resume=resume)
        resume = resume and self._has_checkpoint()
        configured = restored_settings(self.optimizer)
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if not resume:
            return
        warn_of_kept_settings(configured, restored_settings(self.optimizer))
        # The checkpoint holds the iteration that it was saved after.
        self.start_iter = self.iter + 1
        if self.start_iter >= self.max_iter:
            logger.warning(
                "--resume: this run is finished: its last checkpoint follows iteration %d, and SOLVER.MAX_ITER is %d. "
                "It is evaluated again; to train on, set a larger SOLVER.MAX_ITER.",
                self.start_iter,
                self.max_iter,
            )

    def _has_checkpoint(self) -> bool:
        if self.checkpointer.has_checkpoint():
            return True
        logger.warning("--resume: no checkpoint in %s; starting from MODEL.WEIGHTS.", self.cfg.OUTPUT_DIR)
        return False

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to SOLVER.MAX_ITER; a new run sets an earlier one in its folder aside.

        Returns:
            On the main process, the results of the last evaluation if there is a test set.
        """
        self.step.data_loader = self._build_seeded_loader(self._first_batch)
        self.step.seed = self.seed
        # If any process cannot start, the folder stays as it is.
        comm.synchronize()
        folder = Path(self.cfg.OUTPUT_DIR)
        with contextlib.ExitStack() as stack:
            if comm.is_main_process():
                self._claim_folder(folder, stack)
            signals = stack.enter_context(StopSignals())
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

    def _claim_folder(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Make OUTPUT_DIR the folder of this run: from now on config.yaml describes the checkpoints there."""
        with full_disk_in_one_line(folder), file_errors_in_one_line():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(folder))
            check_free_space(folder, self.model)
            if self.start_iter:
                self._remove_old_checkpoints()
                cut_records(folder / METRICS_FILE, self.start_iter - 1)
            else:
                set_earlier_run_aside(folder)
                self.checkpointer.run_id = uuid.uuid4().hex
            write_config(self._given_cfg, folder, self.checkpointer.run_id)

    def _remove_old_checkpoints(self) -> None:
        """Remove what the run was about to remove when it was interrupted; detectron2's hook removes one at a time."""
        keep = self.cfg.SOLVER.CHECKPOINT_KEEP
        while keep and self._periodic and len(self._periodic.recent_checkpoints) > keep:
            Path(self._periodic.recent_checkpoints.pop(0)).unlink(missing_ok=True)

    def before_train(self) -> None:
        """Run the hooks before the first iteration; a resumed run first completes the iteration of its checkpoint."""
        super().before_train()
        if self.start_iter:
            restore_scalars(self.storage, self._saved_scalars)
            if self.start_iter >= self.max_iter and Path(self.checkpointer.get_checkpoint_file()).name != FINAL:
                self.save("model_final", self.start_iter - 1)  # The run was cut off before it, or it is damaged.
            if self._saved_scalars and comm.all_gather(self._lacks_record())[0]:
                self._complete_step()
            elif self._best:
                # The checkpoint was saved before this evaluation.
                metrics = Path(self.cfg.OUTPUT_DIR) / METRICS_FILE
                self._best.count(comm.all_gather(record_of(metrics, self.start_iter - 1))[0], self.start_iter - 1)
            if self._best and self._best.is_over:
                self._stop(self._best.describe(), self.start_iter - 1)

    def save(self, name: str, iteration: int) -> None:
        """Save a checkpoint, to go on after ``iteration``."""
        now, self.iter = self.iter, iteration
        self.checkpointer.save(name, iteration=iteration)
        self.iter = now

    def _lacks_record(self) -> bool:
        due = is_record_due(self.start_iter, self.max_iter, self.cfg.TEST.EVAL_PERIOD)
        return due and last_record(Path(self.cfg.OUTPUT_DIR) / METRICS_FILE) < self.start_iter - 1

    def _complete_step(self) -> None:
        """Do what came after the checkpoint was saved: evaluate, and write the records."""
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks:
            if isinstance(hook, EvaluateWhenTrained | KeepBest | WriteRecords):
                hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def run_step(self) -> None:
        """One iteration."""
        self.step.iter = self.iter
        self.step.run_step()

    def after_step(self) -> None:
        """Run the hooks, which evaluate, save and log."""
        with full_disk_in_one_line(Path(self.cfg.OUTPUT_DIR)):
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
        average_running_statistics(self.model)
        name = f"model_{self.iter:07d}"
        if comm.is_main_process() and self.checkpointer.get_checkpoint_file() != self._path_of(name):
            self.save(name, self.iter)
        raise _Stopped(f"a signal asked for it; go on after iteration {self.iter + 1} with --resume")

    def _path_of(self, name: str) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth")

    def after_train(self) -> None:
        """Run the hooks at the end of the training, or after an error ended it."""
        self.iter = min(self.iter, self.max_iter)  # detectron2 counts one more where nothing was left to train.
        with full_disk_in_one_line(Path(self.cfg.OUTPUT_DIR)):
            super().after_train()

    def build_hooks(self) -> list[HookBase | None]:
        """The hooks in the order in which they run."""
        cfg = self.cfg
        hooks = [
            IterationTimer(),
            LRScheduler(),
            self._precise_batch_norm(),
            # Only the main process saves, but all take part in the average.
            AverageRunningStatistics(self.model, periods=(cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD)),
        ]
        if comm.is_main_process():
            # The hook divides by its period; it saves the last checkpoint in any case.
            period, keep = cfg.SOLVER.CHECKPOINT_PERIOD or sys.maxsize, cfg.SOLVER.CHECKPOINT_KEEP or None
            self._periodic = PeriodicCheckpointer(self.checkpointer, period, max_to_keep=keep)
            hooks.append(self._periodic)
        # After the checkpointer, so that an evaluation that fails can be repeated.
        hooks.append(EvaluateWhenTrained(cfg.TEST.EVAL_PERIOD, self._evaluate))
        if cfg.TEST.BEST_METRIC:
            options = {"patience": cfg.TEST.EARLY_STOP_PATIENCE, "eval_period": cfg.TEST.EVAL_PERIOD}
            self._best = KeepBest(cfg.TEST.BEST_METRIC, checkpointer=self.checkpointer, **options)
            hooks.append(self._best)
        if comm.is_main_process():
            hooks += [WriteRecords(self.build_writers(), eval_period=cfg.TEST.EVAL_PERIOD), ProgressLog()]
        return hooks

    def _precise_batch_norm(self) -> HookBase | None:
        if not (self.cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SEED = self.seed
        loader = self.build_train_loader(cfg)
        return RepeatablePreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def build_writers(self) -> list[EventWriter]:
        """metrics.json and TensorBoard; :class:`ProgressLog` writes to the console."""
        this = weakref.proxy(self)
        return build_writers(Path(self.cfg.OUTPUT_DIR), lambda: this.start_iter)

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks (with the schedule), step (with the optimizer), and what makes the run repeatable."""
        batches = self._first_batch + self.iter + 1 - self.start_iter
        run = {
            "seed": self.seed,
            "images_drawn": batches * self.cfg.SOLVER.IMS_PER_BATCH,
            "group_size": self._group_size,
            "config": self._given_cfg.dump(),
            "periodic": [os.path.basename(path) for path in self._periodic.recent_checkpoints]
            if self._periodic
            else [],
            "scalars": recent_scalars(self.storage) if hasattr(self, "storage") else {},
        }
        return {**super().state_dict(), "step": self.step.state_dict(), "run": run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`."""
        if "step" not in state_dict:
            raise CheckpointError(f"its training state ({', '.join(state_dict)}) is of another trainer; {NEW_RUN}.")
        super().load_state_dict(state_dict)
        self.step.load_state_dict(state_dict["step"], self.checkpointer.loaded_names)
        # The schedule saved these in the order of the groups.
        self.scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        self._restore_run(state_dict.get("run"))

    def _restore_run(self, run: dict[str, Any] | None) -> None:
        if run is None:
            self._first_batch = self.iter + 1
            logger.warning(
                "--resume: the checkpoint is of an earlier version, which did not save all of a run: the images around "
                "the interruption and all further random numbers are others than those of an uninterrupted run."
            )
            return
        if changes := changed_settings(run["config"], self._given_cfg.dump()):
            logger.warning("--resume: settings changed since the checkpoint: %s.", "; ".join(changes))
        if self.cfg.SEED not in (run["seed"], -1):
            logger.warning("--resume keeps the seed of the run, %d. To train with another, %s.", run["seed"], NEW_RUN)
        self.seed, self._group_size, self._saved_scalars = run["seed"], run["group_size"], run["scalars"]
        if self._periodic:
            saved = os.path.basename(self.checkpointer.get_checkpoint_file())
            names = [*run["periodic"], *([] if saved == FINAL else [saved])]
            self._periodic.recent_checkpoints = [os.path.join(self.cfg.OUTPUT_DIR, name) for name in names]
        self._first_batch = run["images_drawn"] // self.cfg.SOLVER.IMS_PER_BATCH
        if self.cfg.SOLVER.IMS_PER_BATCH % self._group_size:
            self._group_size = images_per_process(self.cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The registered meta-architecture, on MODEL.DEVICE."""
        model = build_model(cfg)
        for name, part in model.named_children():
            logger.info("%s: %.2f M parameters", name, sum(p.numel() for p in part.parameters()) / 1e6)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See :func:`dimaskdino.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
        """See :func:`dimaskdino.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    def _build_seeded_loader(self, first_batch: int) -> Any:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed
        # A run that goes on with another number of processes keeps its batches.
        options = {} if self._group_size == images_per_process(cfg) else {"group_size": self._group_size}
        return self.build_train_loader(cfg, first_batch, **options)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0, group_size: int = 0) -> Any:
        """Endless training batches after the first ``start_iter``; see :func:`dimaskdino.data.build_train_loader`."""
        return build_train_loader(cfg, with_masks=needs_masks(cfg), first_batch=start_iter, group_size=group_size)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """See :func:`dimaskdino.data.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """COCO evaluation, of several stages if TEST.EVAL_LAYERS names them."""
        register_all(cfg=cfg)
        return build_evaluator(cfg, dataset_name, _inference_folder(cfg, dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate ``model`` on every DATASETS.TEST.

        The results also go to OUTPUT_DIR/inference/results.json, beside the config.yaml that produced them. The speed
        is measured as well, unless TEST.EVAL_LAYERS asks for more than the model's result.

        Args:
            cfg: the configuration.
            model: the model to evaluate.
            evaluators: a DatasetEvaluator for each dataset; by default :meth:`build_evaluator` makes them.

        Returns:
            Scores by task, by dataset and task if there are several datasets; empty on other processes than the main.
        """
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        results: dict[str, Any] = OrderedDict()
        with timed(model) as timer:
            for index, name in enumerate(cfg.DATASETS.TEST):
                loader = cls.build_test_loader(cfg, name)
                evaluator = evaluators[index] if evaluators else cls._evaluator_with_speed(cfg, name, timer)
                results[name] = inference_on_dataset(model, loader, evaluator)
        if len(results) == 1:
            results = next(iter(results.values()))
        if comm.is_main_process():
            folder = Path(cfg.OUTPUT_DIR) / "inference"
            write_results(results, str(folder / "results.json"))
            write_config(cfg, folder)
        return results

    @classmethod
    def _evaluator_with_speed(cls, cfg: CfgNode, dataset_name: str, timer: ForwardTimer) -> DatasetEvaluator:
        evaluator = cls.build_evaluator(cfg, dataset_name)
        if cfg.TEST.EVAL_LAYERS:
            return evaluator
        return DatasetEvaluators([evaluator, SpeedEvaluator(timer, _inference_folder(cfg, dataset_name))])


def evaluate(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or the last checkpoint in OUTPUT_DIR if ``resume``, on every DATASETS.TEST.

    Raises:
        UserError: there are no weights to evaluate, or the processes find different ones.
        SystemExit: on the main process, with status 1, if the results are not TEST.EXPECTED_RESULTS.
    """
    check_classes(cfg)
    model = Trainer.build_model(cfg)
    names = class_names(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else ()
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, class_names=names)
    checkpointer.run_id = read_run_id(Path(cfg.OUTPUT_DIR))
    check_same_checkpoint(checkpointer, resume=resume)
    if resume and not checkpointer.has_checkpoint():
        raise UserError(f"--eval-only --resume: no checkpoint in {cfg.OUTPUT_DIR}; train first, or set MODEL.WEIGHTS.")
    if not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only needs weights: set MODEL.WEIGHTS to a file, or give --resume.")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    with full_disk_in_one_line(Path(cfg.OUTPUT_DIR)):
        results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """The folder of the results on a dataset: its own one if there are several datasets."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return os.path.join(folder, dataset_name) if len(cfg.DATASETS.TEST) > 1 else folder


def _distribute(model: nn.Module) -> nn.Module:
    """Wrap ``model`` to average gradients if the job has several processes."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = None if device.type == "cpu" else [device.index]
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def _uses_amp(cfg: CfgNode) -> bool:
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        logger.info("SOLVER.AMP.ENABLED has no effect on the CPU: training in fp32.")
        return False
    return cfg.SOLVER.AMP.ENABLED
