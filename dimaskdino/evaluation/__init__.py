"""Evaluation: COCO's AP of boxes and masks, of the final result and of every stage; inference speed."""

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from dimaskdino.data.loaders import max_images
from dimaskdino.evaluation.coco import CocoEvaluator
from dimaskdino.evaluation.layerwise import LayerwiseEvaluator
from dimaskdino.evaluation.report import class_table, coco_table, layer_table, write_results
from dimaskdino.evaluation.speed import ForwardTimer, SpeedEvaluator, timed

__all__ = [
    "CocoEvaluator",
    "ForwardTimer",
    "LayerwiseEvaluator",
    "SpeedEvaluator",
    "build_evaluator",
    "class_table",
    "coco_table",
    "layer_table",
    "timed",
    "write_results",
]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """COCO evaluation of ``dataset_name``, of several stages where TEST.EVAL_LAYERS names them.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered instance dataset.
        output_folder: where predictions and tables go.
    """
    final = CocoEvaluator(dataset_name=dataset_name, output_dir=output_folder, seen_only=max_images(cfg) > 0)
    if not cfg.TEST.EVAL_LAYERS:
        return final
    return LayerwiseEvaluator(final=final, output_dir=output_folder)
