"""Evaluation: COCO's AP of boxes and masks, of the final result and of every stage; inference speed."""

from dimaskdino.evaluation.build import (
    EVALUATOR_REGISTRY,
    ImageEvaluator,
    build_evaluator,
    check_classes,
    check_evaluators,
    class_names,
)
from dimaskdino.evaluation.coco import CocoEvaluator
from dimaskdino.evaluation.report import (
    LayerwiseEvaluator,
    class_table,
    coco_table,
    layer_table,
    run_table,
    write_results,
)
from dimaskdino.evaluation.speed import LAST_MEASURED_BATCH, BackgroundEvaluator, ForwardTimer, SpeedEvaluator, timed

__all__ = [
    "EVALUATOR_REGISTRY",
    "LAST_MEASURED_BATCH",
    "BackgroundEvaluator",
    "CocoEvaluator",
    "ForwardTimer",
    "ImageEvaluator",
    "LayerwiseEvaluator",
    "SpeedEvaluator",
    "build_evaluator",
    "check_classes",
    "check_evaluators",
    "class_names",
    "class_table",
    "coco_table",
    "layer_table",
    "run_table",
    "timed",
    "write_results",
]
