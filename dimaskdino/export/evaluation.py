"""AP and time of an exported file beside those of the model."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from dimaskdino.config import Config
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.build import build_evaluator
from dimaskdino.export.check import Result

WARM_UP = 3  # images that are not timed
Graph = Callable[[dict[str, np.ndarray]], Any]
Predict = Callable[[str, Graph], Result]


def dataset_entries(cfg: Config) -> list[dict[str, Any]]:
    """The images of the first of DATASETS.TEST.

    Raises:
        DatasetError: there is no such dataset on this machine.
    """
    name = next(iter(cfg.DATASETS.TEST), "")
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"DATASETS.TEST names {name or 'no dataset'}, which is not registered; register it (--import)."
        )
    return DatasetCatalog.get(name)


def evaluate(
    cfg: Config, predict: Predict, graph: Graph, folder: Path, entries: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], float]:
    """Score a graph on a dataset: the main figure of each task in percent, and the median seconds of a run."""
    evaluator = build_evaluator(cfg, cfg.DATASETS.TEST[0], str(folder))
    evaluator.reset()
    seconds: list[float] = []

    def timed(inputs: dict[str, np.ndarray]) -> Any:
        started = time.perf_counter()
        outputs = graph(inputs)
        seconds.append(time.perf_counter() - started)
        return outputs

    for entry in entries:
        result = predict(entry["file_name"], timed)
        height, width = result["size"]
        evaluator.process([{"height": height, "width": width, **entry}], [to_detectron2(result)])
    scores = evaluator.evaluate()
    main = {"bbox": "AP", "segm": "AP", "panoptic_seg": "PQ", "sem_seg": "mIoU"}
    return {
        f"{task} {main[task]}": values[main[task]] for task, values in scores.items() if task in main
    }, statistics.median(seconds[WARM_UP:] or seconds)


def to_detectron2(result: Result) -> dict[str, Any]:
    """A result of arrays in detectron2's form."""
    output: dict[str, Any] = {}
    if "scores" in result:
        boxes, scores, labels = (torch.from_numpy(result[name]) for name in ("boxes", "scores", "labels"))
        instances = Instances(tuple(result["size"]), pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels)
        if "masks" in result:
            instances.pred_masks = torch.from_numpy(result["masks"])
        output["instances"] = instances
    if "panoptic" in result:
        output["panoptic_seg"] = torch.from_numpy(result["panoptic"]), result["segments"]
    if "semantic" in result:
        output["sem_seg"] = torch.from_numpy(result["semantic"])
    return output
