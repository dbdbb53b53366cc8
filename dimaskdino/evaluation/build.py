"""What a dataset is scored by, LVIS's AP and evaluators of a user's own among it, and whether its classes fit."""

import contextlib
import inspect
import io
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from statistics import fmean
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import NoOpTransform, TransformList
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.registry import Registry

from dimaskdino.data.annotations import annotations_to_instances
from dimaskdino.data.datasets.registration import class_names, load_dataset
from dimaskdino.data.label_maps import labeled_objects
from dimaskdino.data.validation.segmentation import truth_of
from dimaskdino.errors import ConfigError, DatasetError, check_choice, make_part
from dimaskdino.evaluation.coco import CocoEvaluator, Result, Scores
from dimaskdino.evaluation.coco_options import CocoOptions
from dimaskdino.evaluation.report import LayerwiseEvaluator
from dimaskdino.evaluation.segmentation import (
    EvaluatorGroup,
    PanopticEvaluator,
    SemanticEvaluator,
    ThingsEvaluator,
    numbers_of,
    register_things,
)
from dimaskdino.structures import on_cpu

logger = logging.getLogger(__name__)

_MOST_SHOWN = 5  # classes that differ
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300")


class LvisEvaluator(CocoEvaluator):
    """As :class:`CocoEvaluator`, with LVIS's rules.

    Up to 300 detections of an image count. Detections of a class that neither has an object in an image nor is in its
    neg_category_ids are not counted; nor are those of not_exhaustive_category_ids that match no object.

    Source: LVIS (Gupta et al., 2019).
    """

    def _scores(self, results: list[Result], task: str, seen: list[int] | None) -> Scores:
        evaluation = self._evaluation(results, task, lvis_style=True)
        if seen is not None:
            evaluation.params.img_ids = seen
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(io.StringIO()):  # It prints its table, which the log has as well.
            evaluation.summarize()
        found = evaluation.get_results()
        scores = {name: 100 * found[name] if found[name] > -1 else math.nan for name in _METRICS}
        self._check_measured(scores, seen)
        if all(math.isnan(scores[name]) for name in ("APr", "APc", "APf")):
            logger.warning("The categories have no frequency (r, c, or f), so APr, APc, and APf are not measured.")
        return scores


class ImageEvaluator(DatasetEvaluator):
    """Averages what :meth:`measure` of a subclass gives; in results.json under the name of the class.

    Register the subclass in EVALUATOR_REGISTRY and name it in TEST.EVALUATORS, beside what the dataset is scored by.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str, output_folder: str) -> None:
        self.cfg, self.dataset_name, self.output_folder = cfg, dataset_name, output_folder
        fields = cfg.INPUT.ANNOTATION_FIELDS
        self._entries = {entry["image_id"]: entry for entry in load_dataset(dataset_name, fields)}
        self.reset()

    def measure(self, image: dict[str, Any], output: dict[str, Any], truth: Instances) -> Mapping[str, float]:
        """Measure one image.

        Args:
            image: what the model was given, with "file_name", "image_id", "height" and "width".
            output: what it gave, such as "instances".
            truth: the objects at the image's own size: gt_classes, gt_boxes (xyxy px), gt_masks (BitMasks), and the
                fields of INPUT.ANNOTATION_FIELDS; without crowd regions.

        Returns:
            Numbers by name; leave out what this image does not tell.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all images."""
        self._measured: list[Mapping[str, float]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Measure a batch."""
        for image, output in zip(inputs, outputs, strict=True):
            measured = self.measure(image, on_cpu(output), self.truth(image))
            self._measured.append(numbers_of("measure", type(self), measured))

    def truth(self, image: dict[str, Any]) -> Instances:
        """The objects of an image at its own size."""
        entry, size = self._entries[image["image_id"]], (image["height"], image["width"])
        head = self.cfg.MODEL.SEM_SEG_HEAD
        return annotations_to_instances(
            list(labeled_objects(entry, num_classes=head.NUM_CLASSES, ignore=head.IGNORE_VALUE)),
            transforms=TransformList([NoOpTransform()]),
            source_size=size,
            target_size=size,
            num_classes=head.NUM_CLASSES,
            file_name=entry["file_name"],
            fields=self.cfg.INPUT.ANNOTATION_FIELDS,
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The mean of each number over the images that have it; empty on other processes than the main one."""
        gathered = comm.gather(self._measured)
        if not comm.is_main_process():
            return {}
        values = defaultdict(list)
        for measured in chain.from_iterable(gathered):
            for name, value in measured.items():
                values[name].append(value)
        means = {name: fmean(numbers) for name, numbers in sorted(values.items())}
        kind = type(self).__name__
        logger.info("%s of %s: %s", kind, self.dataset_name, ", ".join(f"{k} {v:.4g}" for k, v in means.items()))
        return {kind: means}


EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """
Builders of evaluators by the ``evaluator_type`` of a dataset's metadata, and those that TEST.EVALUATORS names beside
them. Each is called as ``builder(cfg, dataset_name, output_folder)``. Datasets whose type has no builder get that of
``coco``.
"""


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """Build what a dataset is scored by; predictions and tables go to ``output_folder``."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in EVALUATOR_REGISTRY:
        logger.warning("%s is scored by COCO's AP; its own metric (%s) is not available.", dataset_name, kind)
        kind = "coco"
    check_evaluators(cfg)
    parts = []
    for name in (kind, *cfg.TEST.EVALUATORS):
        build = EVALUATOR_REGISTRY.get(name)
        parts.append(make_part("TEST.EVALUATORS", build, cfg, dataset_name, output_folder))
        _check_methods(name, build.__module__, parts[-1])
    return EvaluatorGroup(parts) if parts[1:] else parts[0]


def check_evaluators(cfg: CfgNode) -> None:
    """Raise ConfigError if TEST.COCO is wrong, or TEST.EVALUATORS names what is not registered or no evaluator."""
    CocoOptions.from_config(cfg)
    if len(set(cfg.TEST.EVALUATORS)) < len(cfg.TEST.EVALUATORS):
        raise ConfigError(f"TEST.EVALUATORS is {list(cfg.TEST.EVALUATORS)}; name each once.")
    for name in cfg.TEST.EVALUATORS:
        check_choice("An entry of TEST.EVALUATORS", name, [known for known, _ in EVALUATOR_REGISTRY])
        build = EVALUATOR_REGISTRY.get(name)
        if isinstance(build, type):
            _check_methods(name, build.__module__, build)
        try:
            inspect.signature(build).bind(cfg, "dataset", "folder")
        except TypeError as error:
            raise ConfigError(
                f"TEST.EVALUATORS {name} ({build.__module__}) takes no (cfg, dataset_name, output_folder): {error}."
            ) from error


def _check_methods(name: str, module: str, made: Any) -> None:
    missing = [each for each in ("reset", "process", "evaluate") if not hasattr(made, each)]
    missing += ["measure"] if getattr(made, "measure", None) is ImageEvaluator.measure else []
    if missing:
        raise ConfigError(
            f"TEST.EVALUATORS {name} ({module}) has no {missing[0]}; derive it from ImageEvaluator, or from "
            "detectron2's DatasetEvaluator."
        )


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """AP of boxes and masks, of several stages where TEST.EVAL_LAYERS names them."""
    options = CocoOptions.from_config(cfg)
    final = CocoEvaluator(dataset_name=dataset_name, options=options, **_of_instances(cfg, output_folder))
    return _by_stage(cfg, final, output_folder)


@EVALUATOR_REGISTRY.register()
def lvis(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """LVIS's AP of boxes and masks, of several stages where TEST.EVAL_LAYERS names them."""
    final = LvisEvaluator(dataset_name=dataset_name, **_of_instances(cfg, output_folder))
    return _by_stage(cfg, final, output_folder)


@EVALUATOR_REGISTRY.register()
def coco_panoptic_seg(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """What the model gives of AP of the things, PQ, and mIoU; several stages where TEST.EVAL_LAYERS names them."""
    if truth_of(dataset_name) != "panoptic":  # detectron2's "separated" datasets
        return coco(cfg, dataset_name, output_folder)
    test = cfg.MODEL.MaskDINO.TEST
    parts: list[DatasetEvaluator] = []
    instances, things = register_things(dataset_name)
    if test.INSTANCE_ON and things:
        arguments = {"options": CocoOptions.from_config(cfg), **_of_instances(cfg, output_folder)}
        parts.append(ThingsEvaluator(things=things, dataset_name=instances, **arguments))
    if test.PANOPTIC_ON:
        parts.append(PanopticEvaluator(dataset_name=dataset_name, output_dir=output_folder))
    if test.SEMANTIC_ON:
        parts.append(_semantic(cfg, dataset_name, output_folder))
    return _by_stage(cfg, EvaluatorGroup(parts), output_folder)


@EVALUATOR_REGISTRY.register()
def sem_seg(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """MIoU and accuracy, of several stages where TEST.EVAL_LAYERS names them."""
    return _by_stage(cfg, _semantic(cfg, dataset_name, output_folder), output_folder)


@EVALUATOR_REGISTRY.register()
def cityscapes_sem_seg(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """As :func:`sem_seg`, at the size of the images."""
    return sem_seg(cfg, dataset_name, output_folder)


def _of_instances(cfg: CfgNode, output_folder: str) -> dict[str, Any]:
    """Arguments of every evaluator of instances."""
    # Of a part of a dataset, only that part is scored.
    seen_only = bool(cfg.DATASETS.MAX_IMAGES > 0 or cfg.DATASETS.FOLDS.NUM)
    return {"output_dir": output_folder, "seen_only": seen_only, "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE}


def _semantic(cfg: CfgNode, dataset_name: str, output_folder: str) -> SemanticEvaluator:
    ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    return SemanticEvaluator(dataset_name=dataset_name, output_dir=output_folder, ignore=ignore)


def _by_stage(cfg: CfgNode, final: DatasetEvaluator, output_folder: str) -> DatasetEvaluator:
    return LayerwiseEvaluator(final=final, output_dir=output_folder) if cfg.TEST.EVAL_LAYERS else final


def check_classes(cfg: CfgNode) -> None:
    """Check that each DATASETS.TEST has the classes, in the order, of the datasets that the model was trained on.

    A class is a number to the model: against other classes, or another order, AP is a plausible wrong number. Training
    datasets with another number of classes than the model, or whose files are not on this machine, are not compared.
    The DatasetError shows the classes of both.
    """
    for tested in cfg.DATASETS.TEST:
        ours = class_names(tested)
        for trained in cfg.DATASETS.TRAIN:
            theirs = class_names(trained)
            if ours and theirs != ours and len(theirs) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
                raise DatasetError(_difference(trained, theirs, tested, ours))


def _difference(trained: str, theirs: list[str], tested: str, ours: list[str]) -> str:
    kind = "the same classes in different orders" if sorted(theirs) == sorted(ours) else "different classes"
    return (
        f"{trained} (DATASETS.TRAIN) and {tested} (DATASETS.TEST) have {kind}, so AP would compare one class with "
        f"another. {trained}: {_shown(theirs, ours)}. {tested}: {_shown(ours, theirs)}. Give both the same categories "
        "in the same order, or set DATASETS.TRAIN to the dataset that the weights were trained on."
    )


def _shown(names: list[str], others: list[str]) -> str:
    """The number of classes and the first that differ, by class index."""
    shown = [f"{index} {name!r}" for index, name in enumerate(names) if others[index : index + 1] != [name]]
    more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return f"{len(names)} classes" + (f", with {', '.join(shown[:_MOST_SHOWN])}{more}" if shown else "")
