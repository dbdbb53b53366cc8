"""The training loop: detectron2's trainer and hooks around our own step."""

import logging
import os
import sys
import weakref
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, verify_results
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.data import build_test_loader, build_train_loader, register_all
from dimaskdino.engine.final_evaluation import EvaluateIfTrained
from dimaskdino.engine.optimizer import GradientClipper, build_optimizer
from dimaskdino.engine.progress import ProgressLog
from dimaskdino.engine.resuming import NEW_RUN, check_common_checkpoint, settings_of, warn_of_restored_settings
from dimaskdino.engine.run_folder import MetricsWriter, set_earlier_run_aside, write_config
from dimaskdino.engine.running_statistics import AverageRunningStatistics
from dimaskdino.engine.sampler import ResumableSampler
from dimaskdino.engine.schedule import build_lr_scheduler
from dimaskdino.engine.train_step import TrainStep
from dimaskdino.errors import CheckpointError, UserError, file_errors_told_in_one_line
from dimaskdino.evaluation import ForwardTimer, SpeedEvaluator, build_evaluator, check_classes, timed, write_results
from dimaskdino.modeling.meta_arch import build_model

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains the configured model and evaluates it; what a run writes lies under OUTPUT_DIR.

    Beyond detectron2's trainer: runs on the CPU in several processes too, saves the optimiser with either version of
    detectron2, goes on with the order of the images when it resumes, clips and records the gradient norm, evaluates
    and saves one set of running statistics of batch norm.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own constructor distributes a model over GPUs only and knows two kinds of step.
        TrainerBase.__init__(self)
        self._given_cfg = cfg
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = TrainStep(
            model=_distribute(model),
            optimizer=optimizer,
            clipper=GradientClipper.from_config(cfg),
            amp=_uses_amp(cfg),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint of OUTPUT_DIR if ``resume``, else load MODEL.WEIGHTS and start at 0.

        Raises:
            UserError: the processes find different checkpoints; or the checkpoint is not of this model and optimiser.
        """
        check_common_checkpoint(self.checkpointer, resume=resume)
        if resume and not self.checkpointer.has_checkpoint():
            logger.warning("--resume: no checkpoint in %s; starting from MODEL.WEIGHTS.", self.cfg.OUTPUT_DIR)
        configured = settings_of(self.optimizer)
        super().resume_or_load(resume=resume)
        warn_of_restored_settings(configured, settings_of(self.optimizer))
        if self.start_iter and self.cfg.SEED >= 0:
            # The random numbers of iteration 0 were spent on other images; draw different ones from here.
            seed_all_rng(self.cfg.SEED + comm.get_rank() + self.start_iter * comm.get_world_size())

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to SOLVER.MAX_ITER; a run that starts anew sets an earlier one of its folder aside.

        Returns:
            The last evaluation's results on the main process where there is a test set.
        """
        self.data_loader = self.build_train_loader(self.cfg, self.start_iter)
        # A job that one of its processes cannot start leaves the folder as it is.
        comm.synchronize()
        if comm.is_main_process():
            self._claim_folder(Path(self.cfg.OUTPUT_DIR))
        super().train()
        return getattr(self, "_last_eval_results", None)

    def _claim_folder(self, folder: Path) -> None:
        """Make OUTPUT_DIR the folder of this run: config.yaml says from now on what its checkpoints are."""
        with file_errors_told_in_one_line():
            if not self.start_iter:
                set_earlier_run_aside(folder)
            write_config(self._given_cfg, folder)

    def build_hooks(self) -> list[HookBase]:
        """detectron2's hooks, common statistics for those that evaluate and save, and progress on the console."""
        hooks = [self._in_its_place(hook) for hook in super().build_hooks()]
        # Only the main process saves, but all take part in the average.
        first_user = next(i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicCheckpointer | EvalHook))
        periods = (self.cfg.TEST.EVAL_PERIOD, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        hooks.insert(first_user, AverageRunningStatistics(self.model, periods=periods))
        if comm.is_main_process():
            hooks.append(ProgressLog())
        return hooks

    def _in_its_place(self, hook: HookBase) -> HookBase:
        """``hook``, or what does its work here."""
        if isinstance(hook, EvalHook):
            return EvaluateIfTrained(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        if isinstance(hook, PeriodicCheckpointer) and not hook.period:
            hook.period = sys.maxsize  # The hook divides by it; it saves the last checkpoint in any case.
        return hook

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def build_writers(self) -> list[EventWriter]:
        """metrics.json and TensorBoard; the console has :class:`ProgressLog`."""
        with file_errors_told_in_one_line():
            os.makedirs(self.cfg.OUTPUT_DIR, exist_ok=True)
            return [MetricsWriter(Path(self.cfg.OUTPUT_DIR)), TensorboardXWriter(self.cfg.OUTPUT_DIR)]

    def state_dict(self) -> dict[str, Any]:
        """Iteration and hooks (schedule), and the step (optimiser)."""
        return {**TrainerBase.state_dict(self), "step": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if "step" not in state_dict:
            raise CheckpointError(
                f"its state of a training ({', '.join(state_dict)}) is of another trainer; {NEW_RUN}."
            )
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["step"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The registered meta-architecture, on MODEL.DEVICE."""
        model = build_model(cfg)
        for name, part in model.named_children():
            logger.info("%s: %.2f M parameters", name, sum(p.numel() for p in part.parameters()) / 1e6)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See :func:`dimaskdino.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
        """See :func:`dimaskdino.engine.schedule.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0) -> Any:
        """Endless training batches, after those of the first ``start_iter`` iterations."""
        if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
            return build_train_loader(cfg)
        return build_train_loader(cfg, make_sampler=lambda size: ResumableSampler.from_config(cfg, size, start_iter))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """See :func:`dimaskdino.data.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """COCO evaluation, of several stages where TEST.EVAL_LAYERS names them."""
        register_all(cfg=cfg)
        return build_evaluator(cfg, dataset_name, _inference_folder(cfg, dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate ``model`` on every DATASETS.TEST.

        The results also go to OUTPUT_DIR/inference/results.json, beside the config.yaml that they were made with. The
        speed is measured as well, except where TEST.EVAL_LAYERS asks for more than the model's result.
        """
        with timed(model) as timer:
            if evaluators is None and not cfg.TEST.EVAL_LAYERS:
                evaluators = [cls._with_speed(cfg, name, timer) for name in cfg.DATASETS.TEST]
            results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            folder = Path(cfg.OUTPUT_DIR) / "inference"
            write_results(results, str(folder / "results.json"))
            write_config(cfg, folder)
        return results

    @classmethod
    def _with_speed(cls, cfg: CfgNode, dataset_name: str, timer: ForwardTimer) -> DatasetEvaluator:
        speed = SpeedEvaluator(timer, _inference_folder(cfg, dataset_name))
        return DatasetEvaluators([cls.build_evaluator(cfg, dataset_name), speed])


def evaluate(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or the last checkpoint of OUTPUT_DIR if ``resume``, on every DATASETS.TEST.

    Raises:
        UserError: there are no weights to evaluate, or not the same for all processes.
        SystemExit: on the main process, with status 1, if the results are not TEST.EXPECTED_RESULTS.
    """
    check_classes(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    check_common_checkpoint(checkpointer, resume=resume)
    if resume and not checkpointer.has_checkpoint():
        raise UserError(f"--eval-only --resume: no checkpoint in {cfg.OUTPUT_DIR}; train first, or set MODEL.WEIGHTS.")
    if not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only needs weights: set MODEL.WEIGHTS to a file, or give --resume.")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Where the results on a dataset go: a folder of its own where there are several."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return os.path.join(folder, dataset_name) if len(cfg.DATASETS.TEST) > 1 else folder


def _distribute(model: nn.Module) -> nn.Module:
    """Wrap ``model`` for gradient averaging where the job has several processes."""
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
