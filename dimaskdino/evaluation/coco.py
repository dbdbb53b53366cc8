"""COCO's average precision of boxes and masks."""

import copy
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.errors import DatasetError, UserError
from dimaskdino.evaluation.coco_options import AREA_RANGES, NO_OPTIONS, CocoOptions
from dimaskdino.evaluation.report import class_table, coco_table
from dimaskdino.evaluation.truth import read_truth, truth_of_entries
from dimaskdino.structures import instances_to_coco

logger = logging.getLogger(__name__)

Result = dict[str, Any]
Scores = dict[str, float]

BOOTSTRAP_SAMPLES = 1000
COCO_LIMIT = 100  # detections of a class in an image that COCO's AP counts
# Index of the IoU threshold (0.50 to 0.95 by 0.05) and of the area range of each metric.
_ALL = slice(None)
_METRICS: dict[str, tuple[Any, int]] = {
    "AP": (_ALL, 0),
    "AP50": (0, 0),
    "AP75": (5, 0),
    "APs": (_ALL, 1),
    "APm": (_ALL, 2),
    "APl": (_ALL, 3),
}
_AREAS = tuple(each[1:] for each in AREA_RANGES)
_SHAPE_KEYS = {"bbox": "bbox", "segm": "segmentation"}


class CocoEvaluator(DatasetEvaluator):
    """Collects predictions and computes AP as COCO defines it, of boxes, and of masks where there are any.

    Masks are scored if the model predicts them and every annotation has one. Crowd regions are ignored. The truth is
    the dataset's COCO file, or what its function lists. ``seen_only`` evaluates on the images that were predicted
    instead of on the whole dataset, and ``max_detections`` are those that the model reports for an image.
    """

    def __init__(
        self,
        *,
        dataset_name: str,
        output_dir: str,
        seen_only: bool = False,
        max_detections: int = COCO_LIMIT,
        options: CocoOptions = NO_OPTIONS,
    ) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        self._options, self._output_dir, self._seen_only = options, output_dir, seen_only
        os.makedirs(output_dir, exist_ok=True)
        if self._metadata.get("json_file") and not self._metadata.get("thing_classes"):
            load_dataset(dataset_name)  # register_coco_instances learns the classes when the file is read
        if not self._metadata.get("thing_classes"):
            raise DatasetError(f"{dataset_name} has no object classes (thing_classes), so it has no box or mask AP.")
        if path := self._metadata.get("json_file"):
            self._truth = read_truth(path)
        else:
            names, categories = self._metadata.thing_classes, self._category_ids()
            self._truth = truth_of_entries(load_dataset(dataset_name), dataset_name, names, categories)
        self._limit = max(COCO_LIMIT, max_detections, *self._truth.objects.values())
        self._report_limit(max_detections)
        self.reset()

    def _category_ids(self) -> list[Any]:
        """The dataset's category ids by class index."""
        to_index = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_index is None:
            return list(range(len(self._metadata.thing_classes)))
        return sorted(to_index, key=to_index.__getitem__)

    def _report_limit(self, max_detections: int) -> None:
        """Say how many objects COCO's AP cannot count, and under which name it is reported without its limit."""
        if self._limit == COCO_LIMIT:
            return
        name, counts = self._metadata.name, self._truth.objects.values()
        logger.info(
            "%s: AP counts %d detections of a class in an image, as COCO defines it; AP@%d counts %d.",
            *(name, COCO_LIMIT, self._limit, self._limit),
        )
        hidden = sum(max(count - COCO_LIMIT, 0) for count in counts)
        if hidden:
            logger.warning(
                "%s has up to %d objects of a class in an image: AP cannot count %d of its %d objects; AP@%d does.",
                *(name, max(counts), hidden, sum(counts), self._limit),
            )
        if max_detections < max(counts, default=0):
            logger.warning(
                "TEST.DETECTIONS_PER_IMAGE is %d, but images of %s hold up to %d objects of a class; raise it.",
                *(max_detections, name, max(counts)),
            )

    def for_stage(self, name: str) -> "CocoEvaluator":
        """An empty evaluator with the same ground truth that writes to a folder ``name`` of this one's."""
        stage = copy.copy(self)
        stage._output_dir = os.path.join(self._output_dir, name)
        os.makedirs(stage._output_dir, exist_ok=True)
        stage.reset()
        return stage

    def reset(self) -> None:
        """Forget all predictions."""
        self._results: list[Result] = []
        self._image_ids: list[Any] = []
        self._predicts_masks = True

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predicted ``instances`` of a batch."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(torch.device("cpu"))
            if not instances.scores.isfinite().all():
                raise UserError(
                    f"The model predicts scores that are not finite for image {image['image_id']!r}; its weights "
                    "(MODEL.WEIGHTS) have diverged."
                )
            self._image_ids.append(image["image_id"])
            self._predicts_masks &= instances.has("pred_masks")
            self._results += instances_to_coco(instances, image["image_id"])

    def evaluate(self) -> dict[str, Scores]:
        """Score the predictions of all processes and log the table; returns the same as :meth:`score`."""
        scores = self.score()
        if scores:
            logger.info("%s:\n%s\n\n%s", self._metadata.name, coco_table(scores), class_table(scores))
        return scores

    def score(self) -> dict[str, Scores]:
        """Score the predictions of all processes.

        Returns:
            On the main process ``{"bbox": scores}``, with ``"segm"`` as well where masks are scored. Scores are AP,
            AP50, AP75, APs, APm, APl, ``AP@<limit>`` where more than 100 detections of a class count, what the options
            add (``AP@<n>``, ``AR@<n>``, ``AP_<range>``, ``AR_<range>``), and ``AP-<class>``, in percent, nan where the
            dataset has no such object. On other processes an empty dict.

        Raises:
            DatasetError: a prediction is of an unknown image or class, or nothing was measured although there are
                objects.
        """
        gathered = comm.gather((self._results, self._image_ids, self._predicts_masks))
        if not comm.is_main_process():
            return {}
        parts, image_ids, predict_masks = zip(*gathered, strict=True)
        results = self._with_category_ids(itertools.chain.from_iterable(parts))
        with open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as file:
            json.dump(results, file)
        if self._truth.annotations is None:
            logger.info("The dataset has no annotations: predictions are written, not scored.")
            return {}
        seen = sorted(map(self._image_number, itertools.chain.from_iterable(image_ids))) if self._seen_only else None
        return self._scores_of_tasks(results, seen, with_masks=all(predict_masks))

    def score_results(self, results: list[Result]) -> dict[str, Scores]:
        """Score detections, as ``coco_instances_results.json`` holds them, on the whole dataset; see :meth:`score`.

        Masks are scored if all have one.

        Raises:
            DatasetError: as :meth:`score`, or the dataset has no annotations.
        """
        known = {*self._category_ids(), *self._truth.category_numbers}
        for result in results:
            self._image_number(result["image_id"])
            if result["category_id"] not in known:
                raise DatasetError(
                    f"A prediction is of category {result['category_id']!r}, which {self._metadata.name} does not have."
                )
        if self._truth.annotations is None:
            raise DatasetError(f"{self._metadata.name} has no annotations to score predictions against.")
        return self._scores_of_tasks(results, None, with_masks=all("segmentation" in result for result in results))

    def _scores_of_tasks(self, results: list[Result], seen: list[int] | None, *, with_masks: bool) -> dict[str, Scores]:
        tasks = ["bbox", "segm"] if with_masks and self._truth.has_masks else ["bbox"]
        return {task: self._scores(results, task, seen) for task in tasks}

    def _with_category_ids(self, results: Iterable[Result]) -> list[Result]:
        """Replace class indices by the dataset's category ids."""
        category_ids = self._category_ids()
        mapped = []
        for result in results:
            if result["category_id"] >= len(category_ids):
                raise DatasetError(
                    f"The model predicts class {result['category_id']}, but {self._metadata.name} has "
                    f"{len(category_ids)} classes; set MODEL.SEM_SEG_HEAD.NUM_CLASSES to {len(category_ids)}."
                )
            mapped.append({**result, "category_id": category_ids[result["category_id"]]})
        return mapped

    def _image_number(self, image_id: Any) -> int:
        if image_id not in self._truth.image_numbers:
            raise DatasetError(
                f"A prediction is of image {image_id!r}, which the annotations of {self._metadata.name} do not list; "
                "the ids of its images must be those of its annotation file, of the same kind (text or number)."
            )
        return self._truth.image_numbers[image_id]

    def ap_difference(self, one: list[Result], other: list[Result], task: str) -> tuple[float, float]:
        """The 95% interval of AP of ``other`` minus AP of ``one``, in percent, over images drawn with replacement.

        The images drawn are always the same; the detections are as ``coco_instances_results.json`` holds them.
        """
        before, after = (self._evaluation(results, task) for results in (one, other))
        for each in (before, after):
            each.evaluate()
        interval = hotcoco.compare(before, after, n_bootstrap=BOOTSTRAP_SAMPLES, confidence=0.95)["ci"]["AP"]
        return 100 * interval["lower"], 100 * interval["upper"]

    def _evaluation(self, results: list[Result], task: str, *, lvis_style: bool = False) -> hotcoco.COCOeval:
        coco = self._truth.coco
        return hotcoco.COCOeval(coco, coco.load_res(self._numbered(results, task)), task, lvis_style=lvis_style)

    def _scores(self, results: list[Result], task: str, seen: list[int] | None) -> Scores:
        categories = self._truth.category_numbers
        numbered = self._numbered(results, task)
        limits = sorted({COCO_LIMIT, self._limit, *self._options.limits})
        areas = [each[1:] for each in (*AREA_RANGES, *self._options.area_ranges)]
        curves = coco_curves(self._truth.coco, numbered, task, limits=limits, image_ids=seen, areas=areas)
        at_limit = limits.index(COCO_LIMIT)
        precision = curves.precision[..., at_limit : at_limit + 1]
        scores = {name: _mean(precision[which, :, :, area, 0]) for name, (which, area) in _METRICS.items()}
        if self._limit > COCO_LIMIT:
            scores[f"AP@{self._limit}"] = _mean(curves.precision[:, :, :, 0, limits.index(self._limit)])
        for limit in self._options.limits:
            place = limits.index(limit)
            scores[f"AP@{limit}"] = _mean(curves.precision[:, :, :, 0, place])
            scores[f"AR@{limit}"] = _mean(curves.recall[:, :, 0, place])
        for place, (name, *_) in enumerate(self._options.area_ranges, start=len(AREA_RANGES)):
            scores[f"AP_{name}"] = _mean(precision[:, :, :, place, 0])
            scores[f"AR_{name}"] = _mean(curves.recall[:, :, place, at_limit])
        for name, category_id in zip(self._metadata.thing_classes, self._category_ids(), strict=True):
            number = categories.get(category_id)
            scores[f"AP-{name}"] = math.nan if number is None else _mean(precision[:, :, number - 1, 0, 0])
        self._check_measured(scores, seen)
        return scores

    def _numbered(self, results: Iterable[Result], task: str) -> list[Result]:
        """The results with the truth's ids; classes that the annotation file does not list are not measured."""
        categories = self._truth.category_numbers
        return [
            {
                "image_id": self._image_number(result["image_id"]),
                "category_id": categories[result["category_id"]],
                "score": result["score"],
                _SHAPE_KEYS[task]: result[_SHAPE_KEYS[task]],
            }
            for result in results
            if result["category_id"] in categories
        ]

    def _check_measured(self, scores: Scores, seen: Sequence[int] | None) -> None:
        """AP must be a number wherever the evaluated images have objects."""
        images = set(self._truth.image_numbers.values() if seen is None else seen)
        objects = sum(count for (image, _), count in self._truth.objects.items() if image in images)
        if objects and math.isnan(scores["AP"]):
            raise DatasetError(
                f"The evaluation of {self._metadata.name} gives no AP, although its images have {objects} objects; "
                "check the ids of images and categories in its annotations (tools/check_dataset.py)."
            )


class Curves(NamedTuple):
    """What COCO's evaluation accumulates; -1 where there are no objects."""

    # interpolated, (IoU threshold 10, recall 101, category in the order of the ids, area range, limit)
    precision: np.ndarray
    recall: np.ndarray  # the highest, (IoU threshold 10, category, area range, limit)


def coco_curves(
    truth: hotcoco.COCO,
    results: list[Result],
    task: str,
    *,
    limits: Sequence[int],
    image_ids: list[int] | None = None,
    areas: Sequence[Sequence[float]] = _AREAS,
) -> Curves:
    """Precision and recall as COCO defines them.

    Truth and results, possibly none, have ids from 1. A result has a box or a mask alone: with both, the box's area
    would decide whether a mask is small or large. ``limits`` say, in increasing order, how many detections of a class
    in an image count, and ``areas`` the least and largest area in px^2 of each range.
    """
    evaluation = hotcoco.COCOeval(truth, truth.load_res(results), task)
    evaluation.params.max_dets = list(limits)
    evaluation.params.area_rng = [list(each) for each in areas]
    evaluation.params.area_rng_lbl = [str(number) for number in range(len(areas))]
    if image_ids is not None:
        evaluation.params.img_ids = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    accumulated = evaluation.eval
    assert accumulated is not None
    return Curves(np.asarray(accumulated["precision"]), np.asarray(accumulated["recall"]))


def _mean(precision: np.ndarray) -> float:
    """In percent; nan where there is nothing to measure."""
    known = precision[precision > -1]
    return float(known.mean()) * 100 if known.size else math.nan
