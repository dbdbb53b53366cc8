"""What a training is made of: model, optimizer, hooks, data and evaluation, each by a method to override."""

import argparse
import contextlib
import logging
import math
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook, IterationTimer, LRScheduler, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from dimaskdino import data, evaluation, solver
from dimaskdino.checkpoint import AVERAGE, Checkpointer
from dimaskdino.data.loaders import test_entries
from dimaskdino.data.validation.segmentation import mapping_truth_of
from dimaskdino.engine import hooks, run_folder
from dimaskdino.engine.devices import distribute, evaluation_autocast, is_sharding, training_dtype, whole_weights
from dimaskdino.engine.ema import AveragedWeights
from dimaskdino.engine.nonfinite import unwrapped
from dimaskdino.engine.pictures import DrawPredictions
from dimaskdino.engine.resumable import ResumableTrainer
from dimaskdino.engine.setup import setup
from dimaskdino.engine.train_step import TrainStep
from dimaskdino.engine.writers import build_writers
from dimaskdino.errors import UserError
from dimaskdino.modeling.meta_arch import build_model, needs_masks
from dimaskdino.modeling.policies import checkpoint_activations
from dimaskdino.prediction.augmented import AugmentedModel, whole_images
from dimaskdino.seeds import VALIDATION, seed_from

logger = logging.getLogger(__name__)

# What behaves otherwise in training than in evaluation, apart from the model itself: batch norm, dropout, and the
# drop-path of backbones, which have classes of their own.
_IN_EVALUATION = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
_DROP_PATH = "DropPath"


class Trainer(ResumableTrainer):
    """Trains the configured model and evaluates it; everything that a run writes is under OUTPUT_DIR.

    It has the methods of detectron2's DefaultTrainer to override, from ``build_model`` to ``test``. Beyond that
    trainer, it also runs on the CPU in several processes, resumes as if it had not been interrupted, clips and records
    the gradient norm, and evaluates and saves one set of running statistics of batch norm.
    """

    build_optimizer = staticmethod(solver.build_optimizer)
    build_lr_scheduler = staticmethod(solver.build_lr_scheduler)
    build_test_loader = staticmethod(data.build_test_loader)

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        cfg = self.cfg
        model = self.build_model(cfg)
        self.step = self.build_step(cfg, model)
        if cfg.SOLVER.EMA.ENABLED:  # all processes have the same weights by now
            self._average = AveragedWeights(model, decay=cfg.SOLVER.EMA.DECAY)
        self.scheduler = self.build_lr_scheduler(cfg, self.optimizer)
        names = evaluation.class_names(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else ()
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, class_names=names, trainer=weakref.proxy(self))
        self.checkpointer.run_id = run_folder.read_run_id(Path(cfg.OUTPUT_DIR))
        self.checkpointer.average = self._average.state_dict if self._average else None
        self.checkpointer.is_sharded = is_sharding(cfg)
        self.checkpointer.leaves_out_frozen = cfg.SOLVER.CHECKPOINT_WITHOUT_FROZEN
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """The hooks in the order in which they run."""
        cfg, average = self.cfg, self._average
        built = [
            IterationTimer(),
            LRScheduler(),
            CallbackHook(after_step=lambda trainer: average.update(trainer.iter)) if average else None,
            self._precise_batch_norm(),
            CallbackHook(after_step=hooks.average_statistics_before_use),
        ]
        if comm.is_main_process() or is_sharding(cfg):
            # The hook divides by its period; it saves the last checkpoint in any case.
            period = cfg.SOLVER.CHECKPOINT_PERIOD or sys.maxsize
            keep = cfg.SOLVER.CHECKPOINT_KEEP if comm.is_main_process() else 0  # The main process removes.
            self._periodic = PeriodicCheckpointer(self.checkpointer, period, max_to_keep=keep or None)
            built.append(self._periodic)
        # After the checkpointer, so that an evaluation that fails can be repeated.
        built.append(hooks.EvaluateWhenTrained(cfg.TEST.EVAL_PERIOD, self._evaluate))
        if cfg.TEST.BEST_METRIC:
            self._best = hooks.KeepBest(cfg, self.checkpointer)
            built.append(self._best)
        built += hooks.build_own_hooks(cfg)
        if cfg.LOG.PICTURES and cfg.DATASETS.TEST and (comm.is_main_process() or is_sharding(cfg, "full")):
            built.append(DrawPredictions(cfg, self.model))
        if comm.is_main_process():
            writers = hooks.WriteRecords(self.build_writers(), eval_period=cfg.TEST.EVAL_PERIOD)
            built += [writers, hooks.ProgressLog(images=cfg.SOLVER.IMS_PER_BATCH)]
        return built

    def _precise_batch_norm(self) -> HookBase | None:
        if not (self.cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SEED = self.seed
        loader = self.build_train_loader(cfg)
        return hooks.RepeatablePreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _evaluate(self) -> dict[str, Any]:
        test = self.test_with_views if self.iter >= self.max_iter else self.test
        results = test(self.cfg, self.model)
        if self._average:
            with self._average.applied():
                results = {**results, "ema": test(run_folder.in_subfolder(self.cfg, "ema"), self.model)}
        self._last_eval_results = results
        return results

    def build_writers(self) -> list[EventWriter]:
        """Those of LOG.WRITERS; :class:`ProgressLog` writes to the console."""
        this = weakref.proxy(self)
        return build_writers(self.cfg, lambda: this.start_iter)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The registered meta-architecture, on MODEL.DEVICE."""
        model = build_model(cfg)
        for name, part in model.named_children():
            if count := sum(p.numel() for p in part.parameters()):
                logger.info("%s: %.2f M parameters", name, count / 1e6)
        return model

    @classmethod
    def build_step(cls, cfg: CfgNode, model: nn.Module) -> TrainStep:
        """The step that trains ``model``, with its optimizer."""
        solver.freeze_parameters(cfg, model)
        checkpoint_activations(cfg, model)
        return TrainStep(
            model=distribute(cfg, model),  # before the optimizer, which has its parameters
            optimizer=cls.build_optimizer(cfg, model),
            clipper=solver.GradientClipper.from_config(cfg),
            autocast_to=training_dtype(cfg),
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0, group_size: int = 0) -> Any:
        """Endless training batches after the first ``start_iter``; see :func:`dimaskdino.data.build_train_loader`."""
        return data.build_train_loader(cfg, with_masks=needs_masks(cfg), first_batch=start_iter, group_size=group_size)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """See :func:`dimaskdino.evaluation.build_evaluator`."""
        data.register_all(cfg=cfg)
        return evaluation.build_evaluator(cfg, dataset_name, run_folder.inference_folder(cfg, dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate ``model`` on every DATASETS.TEST.

        The results also go to OUTPUT_DIR/inference/results.json, beside the config.yaml that produced them. The speed
        is measured as well, unless TEST.EVAL_LAYERS asks for more than the model's result.

        The evaluators, one for each dataset, are by default those of :meth:`build_evaluator`.

        Returns:
            Scores by task, by dataset and task if there are several datasets; empty on other processes than the main.
        """
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        results: dict[str, Any] = OrderedDict()
        with evaluation.timed(model) as timer, whole_weights(model):
            for index, name in enumerate(cfg.DATASETS.TEST):
                views = isinstance(model, AugmentedModel)
                loader = cls.build_test_loader(whole_images(cfg) if views else cfg, name)
                evaluator = evaluators[index] if evaluators else cls._evaluator_with_speed(cfg, name, timer)
                with evaluation_autocast(cfg):
                    results[name] = inference_on_dataset(model, loader, evaluator)
                    losses = validation_losses(cfg, model, name) if cfg.TEST.LOSS else {}
                if losses and comm.is_main_process():
                    results[name]["loss"] = losses
        if len(results) == 1:
            results = next(iter(results.values()))
        if comm.is_main_process():
            folder = Path(cfg.OUTPUT_DIR) / "inference"
            evaluation.write_results(results, str(folder / "results.json"))
            run_folder.write_config(cfg, folder)
        return results

    @classmethod
    def test_with_views(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """As :meth:`test`, with the results of :meth:`test_with_TTA` beside them where TEST.AUG.ENABLED."""
        results = cls.test(cfg, model)
        return {**results, **cls.test_with_TTA(cfg, model)} if cfg.TEST.AUG.ENABLED else results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:  # noqa: N802 (detectron2's name)
        """As :meth:`test` with the views of TEST.AUG; files are under OUTPUT_DIR/tta, and names end in ``_TTA``."""
        cfg = run_folder.in_subfolder(cfg, "tta")
        cfg.TEST.EVAL_LAYERS, cfg.TEST.LOSS = [], False  # These are of the model's single view.
        results = cls.test(cfg, AugmentedModel(cfg, model=model))
        return {f"{name}_TTA": scores for name, scores in results.items()}

    @classmethod
    def _evaluator_with_speed(cls, cfg: CfgNode, dataset_name: str, timer: evaluation.ForwardTimer) -> DatasetEvaluator:
        evaluator = cls.build_evaluator(cfg, dataset_name)
        if cfg.TEST.SCORE_IN_BACKGROUND:
            first = 0 if cfg.TEST.EVAL_LAYERS else evaluation.LAST_MEASURED_BATCH
            evaluator = evaluation.BackgroundEvaluator(evaluator, context=lambda: evaluation_autocast(cfg), first=first)
        if cfg.TEST.EVAL_LAYERS:
            return evaluator
        speed = evaluation.SpeedEvaluator(timer, run_folder.inference_folder(cfg, dataset_name))
        return DatasetEvaluators([evaluator, speed])


def train_or_evaluate(args: argparse.Namespace) -> None:
    """Train or evaluate as the command line of train_net.py asks; every process of a job calls this."""
    cfg = setup(args)
    if args.eval_only:
        evaluate(cfg, resume=args.resume)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def evaluate(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or the last checkpoint in OUTPUT_DIR if ``resume``, on every DATASETS.TEST.

    Raises:
        UserError: there are no weights to evaluate, or the processes find different ones.
        SystemExit: on the main process, with status 1, if the results are not TEST.EXPECTED_RESULTS.
    """
    evaluation.check_classes(cfg)
    model = Trainer.build_model(cfg)
    names = evaluation.class_names(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else ()
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, class_names=names)
    checkpointer.run_id = run_folder.read_run_id(Path(cfg.OUTPUT_DIR))
    run_folder.check_same_checkpoint(checkpointer, resume=resume)
    if resume and not checkpointer.has_checkpoint():
        raise UserError(f"--eval-only --resume: no checkpoint in {cfg.OUTPUT_DIR}; train first, or set MODEL.WEIGHTS.")
    if not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only needs weights: set MODEL.WEIGHTS to a file, or give --resume.")
    content = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if set_precision := getattr(model, "set_precision", None):  # a model of the user's own may have none
        set_precision(cfg.MODEL.MaskDINO.TEST.PRECISION)
    with run_folder.full_disk_in_one_line(Path(cfg.OUTPUT_DIR)):
        results = Trainer.test_with_views(cfg, model)
        if resume and AVERAGE in content:
            model.load_state_dict(content[AVERAGE])
            results = {**results, "ema": Trainer.test_with_views(run_folder.in_subfolder(cfg, "ema"), model)}
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


@torch.no_grad()
def validation_losses(cfg: CfgNode, model: nn.Module, dataset_name: str) -> dict[str, float]:
    """The losses of a dataset in one image a batch, averaged over its images with objects; all processes must call it.

    Batch norm, dropout and drop-path are in evaluation. Denoising and points are drawn from the number of an image, so
    that two evaluations differ by the weights alone. Several processes normalize by the objects of all their batches,
    as in training, so their losses differ from those of one process.

    Returns:
        Loss -> value, and their sum as "total_loss".
    """
    entries = test_entries(cfg, dataset_name)
    entries = [entry for entry in entries if entry.get("annotations") != []]
    options = {"is_train": False, "with_instances": True, "with_masks": needs_masks(cfg)}
    mapper = data.build_mapper(mapping_truth_of(cfg, dataset_name), **options)
    model = unwrapped(model)
    sums: dict[str, Tensor] = {}
    with _loss_mode(model):
        # Every process computes as many batches: the model sums up the objects of all.
        for first in range(math.ceil(len(entries) / comm.get_world_size())):
            index = first * comm.get_world_size() + comm.get_rank()
            seed_from(0, VALIDATION, index)
            losses = model([mapper(entries[index % len(entries)])])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0 * value) + value * (index < len(entries))
    if not sums:
        return {}
    values = torch.stack([sums[name].float() for name in sorted(sums)])
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
    averages = dict(zip(sorted(sums), (values / len(entries)).tolist(), strict=True))
    return {"total_loss": sum(averages.values()), **averages}


@contextlib.contextmanager
def _loss_mode(model: nn.Module) -> Iterator[None]:
    """Let a model compute losses without what training does at random or to its running statistics."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, _IN_EVALUATION) or type(module).__name__ == _DROP_PATH:
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
