"""How much of a difference between two runs is due to the choice of images."""

import json
import logging

from detectron2.data import MetadataCatalog

from dimaskdino.data.datasets import register_all
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.coco import CocoEvaluator
from dimaskdino.evaluation.segmentation import register_things
from dimaskdino.reproduction.runs import Run

logger = logging.getLogger(__name__)

Interval = tuple[float, float]
_TASKS = {"bbox/AP": "bbox", "segm/AP": "segm"}
_PREDICTIONS = "coco_instances_results.json"


def ap_interval(first: Run, other: Run, metric: str) -> Interval | None:
    """The 95% interval of AP of ``other`` minus AP of ``first``, in percent, over the images of the test set.

    Args:
        first: a finished run.
        other: a finished run on the same dataset.
        metric: "bbox/AP" or "segm/AP".

    Returns:
        None for another metric, or where predictions or the dataset are not on this machine.
    """
    files = [run.folder / "inference" / _PREDICTIONS for run in (first, other)]
    if metric not in _TASKS or not all(file.is_file() for file in files):
        return None
    try:
        before, after = (json.loads(file.read_bytes()) for file in files)
        return _evaluator(other).ap_difference(before, after, _TASKS[metric])
    except DatasetError as error:
        logger.warning("No interval of %s: %s", other.name, error)
        return None


def _evaluator(run: Run) -> CocoEvaluator:
    cfg = run.cfg.clone()
    cfg.OUTPUT_DIR = str(run.folder)
    register_all(cfg=cfg)
    name = cfg.DATASETS.TEST[0]
    if MetadataCatalog.get(name).get("evaluator_type") == "coco_panoptic_seg":
        name, _ = register_things(name)
    return CocoEvaluator(dataset_name=name, output_dir=str(run.folder / "inference"))
