"""COCO's average precision of boxes and masks."""

import copy
import itertools
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.report import METRICS, TASKS, class_table, coco_table
from dimaskdino.evaluation.truth import quiet, read_truth, truth_of_entries

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

logger = logging.getLogger(__name__)

Result = dict[str, Any]
Scores = dict[str, float]


class CocoEvaluator(DatasetEvaluator):
    """Collects predictions and computes box and mask AP as COCO defines them; crowd regions are ignored.

    Args:
        dataset_name: a registered instance dataset; its truth is its COCO file, or what its function lists.
        output_dir: where ``coco_instances_results.json`` goes.
        seen_only: evaluate on the images that were predicted instead of on the whole dataset.
    """

    def __init__(self, *, dataset_name: str, output_dir: str, seen_only: bool = False) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_dir = output_dir
        self._seen_only = seen_only
        os.makedirs(output_dir, exist_ok=True)
        if self._metadata.get("json_file") and not self._metadata.get("thing_classes"):
            load_dataset(dataset_name)  # register_coco_instances learns the classes when the file is read
        if not self._metadata.get("thing_classes"):
            raise DatasetError(f"{dataset_name} has no object classes (thing_classes), so it has no box or mask AP.")
        self._truth = self._read_truth()
        self._implementation = implementation_for(self._truth)
        self.reset()

    def _read_truth(self) -> COCO:
        path = self._metadata.get("json_file")
        if path:
            return read_truth(path)
        names, categories = self._metadata.thing_classes, self._categories()
        category_ids = [index if categories is None else categories[index] for index in range(len(names))]
        return truth_of_entries(load_dataset(self._metadata.name), self._metadata.name, names, category_ids)

    def for_stage(self, name: str) -> "CocoEvaluator":
        """An empty evaluator against the same ground truth that writes to a folder ``name`` of this one's."""
        stage = copy.copy(self)
        stage._output_dir = os.path.join(self._output_dir, name)
        os.makedirs(stage._output_dir, exist_ok=True)
        stage.reset()
        return stage

    def reset(self) -> None:
        """Forget all predictions."""
        self._results: list[Result] = []
        self._image_ids: list[int] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predicted ``instances`` of a batch."""
        cpu = torch.device("cpu")
        for image, output in zip(inputs, outputs, strict=True):
            self._image_ids.append(image["image_id"])
            self._results += instances_to_coco_json(output["instances"].to(cpu), image["image_id"])

    def evaluate(self) -> dict[str, Scores]:
        """Score the predictions of all processes and log the table; returns as :meth:`score`."""
        scores = self.score()
        if scores:
            logger.info("%s:\n%s\n\n%s", self._metadata.name, coco_table(scores), class_table(scores))
        return scores

    def score(self) -> dict[str, Scores]:
        """Score the predictions of all processes.

        Returns:
            On the main process ``{"bbox": scores, "segm": scores}``, each with AP, AP50, AP75, APs, APm, APl and
            ``AP-<class>`` in percent (nan where the dataset has no such object); elsewhere an empty dict.
        """
        gathered = comm.gather((self._results, self._image_ids))
        if not comm.is_main_process():
            return {}
        results = self._with_dataset_categories(itertools.chain.from_iterable(part[0] for part in gathered))
        with open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as file:
            json.dump(results, file)
        if "annotations" not in self._truth.dataset:
            logger.info("The dataset has no annotations: predictions are written, not scored.")
            return {}
        image_ids = sorted(itertools.chain.from_iterable(part[1] for part in gathered)) if self._seen_only else None
        return {task: self._score(results, task, image_ids) for task in TASKS}

    def _with_dataset_categories(self, results: Any) -> list[Result]:
        """Replace class indices by the dataset's category ids."""
        to_category = self._categories()
        if to_category is None:
            return list(results)
        mapped = []
        for result in results:
            if result["category_id"] not in to_category:
                raise DatasetError(
                    f"The model predicts class {result['category_id']}, but {self._metadata.name} has "
                    f"{len(to_category)} classes; set MODEL.SEM_SEG_HEAD.NUM_CLASSES to {len(to_category)}."
                )
            mapped.append({**result, "category_id": to_category[result["category_id"]]})
        return mapped

    def _categories(self) -> dict[int, Any] | None:
        """Category ids by class index; None where these are the same."""
        to_index = self._metadata.get("thing_dataset_id_to_contiguous_id")
        return None if to_index is None else {index: category for category, index in to_index.items()}

    def _score(self, results: list[Result], task: str, image_ids: list[int] | None) -> Scores:
        evaluation = run_coco_eval(self._truth, results, task, image_ids=image_ids, implementation=self._implementation)
        scores = {name: _percent(value) for name, value in zip(METRICS, evaluation.stats, strict=False)}
        # precision: (IoU threshold, recall, class, area range, detections per image)
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        to_category = self._categories()
        # COCO's classes are in the order of their category ids, which need not be that of the class indices.
        category_ids = list(evaluation.params.catIds)
        for index, name in enumerate(self._metadata.thing_classes):
            category = index if to_category is None else to_category.get(index)
            of_class = precision[:, :, [other == category for other in category_ids]]
            known = of_class[of_class > -1]
            scores[f"AP-{name}"] = _percent(known.mean() if known.size else -1)
        return scores


def run_coco_eval(
    truth: COCO,
    results: list[Result],
    task: str,
    *,
    image_ids: list[int] | None = None,
    implementation: type[COCOeval] | None = None,
) -> COCOeval:
    """Evaluate ``results`` (COCO's result format) against ``truth``.

    Args:
        truth: the ground truth.
        results: detections, possibly none.
        task: ``"bbox"`` or ``"segm"``.
        image_ids: images to evaluate on; None for all.
        implementation: COCO's evaluation; None: as :func:`implementation_for` chooses.

    Returns:
        The evaluation, with ``stats`` and ``eval`` filled.
    """
    implementation = implementation or implementation_for(truth)
    if task == "segm":
        # With a box present COCO would take its area, not the mask's, to tell small from large.
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with quiet():
        evaluation = implementation(truth, _load_results(truth, results), task)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def implementation_for(truth: COCO) -> type[COCOeval]:
    """faster-coco-eval's class where it is installed and can read the ids of ``truth``, else pycocotools'.

    Both give the same numbers.
    """
    if COCOeval_faster is None:
        return COCOeval
    odd = next((value for value in _ids(truth) if not _fits_faster_coco_eval(value)), None)
    if odd is None:
        return COCOeval_faster
    logger.info("faster-coco-eval cannot read the id %r, so pycocotools evaluates, which takes longer.", odd)
    return COCOeval


def _ids(truth: COCO) -> Iterator[Any]:
    """Of images and categories, as listed and as annotations name them."""
    for kind in ("images", "categories"):
        yield from (entry["id"] for entry in truth.dataset[kind])
    for annotation in truth.dataset.get("annotations", ()):
        yield annotation["image_id"]
        yield annotation["category_id"]


def _fits_faster_coco_eval(value: Any) -> bool:
    # It keeps some ids as floating point numbers, which are exact up to here.
    return isinstance(value, int) and 0 <= value <= 2**53


def _load_results(truth: COCO, results: list[Result]) -> COCO:
    if results:
        return truth.loadRes(copy.deepcopy(results))
    # COCO's own loader cannot read an empty list.
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _percent(value: float) -> float:
    """COCO's -1 means that there is nothing to measure."""
    return float(value) * 100 if value >= 0 else float(np.nan)
