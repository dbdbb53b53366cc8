"""Panoptic quality, mean intersection over union, and the average precision of a panoptic dataset's things."""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from hotcoco import panoptic, semantic
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.data.coco_file import Json, below
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.label_maps import panoptic_annotations, read_segments, read_semantic
from dimaskdino.data.validation.report import saying_how_to_list_all
from dimaskdino.errors import ConfigError, DatasetError
from dimaskdino.evaluation.coco import CocoEvaluator
from dimaskdino.evaluation.report import panoptic_table, semantic_table

logger = logging.getLogger(__name__)

Scores = dict[str, float]
# What hotcoco calls the parts of a panoptic score, and their endings in detectron2's names.
_GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}


class PanopticEvaluator(DatasetEvaluator):
    """Collects predicted segments and computes panoptic, segmentation, and recognition quality (PQ, SQ, RQ).

    Predictions go to ``panoptic/`` below the output folder, which all processes must see, one PNG in COCO's form per
    image.
    """

    def __init__(self, *, dataset_name: str, output_dir: str, check: bool = True) -> None:
        self._name, self._output_dir, self._check = dataset_name, output_dir, check
        metadata = MetadataCatalog.get(dataset_name)
        self._names = list(metadata.stuff_classes)
        self._things = set(metadata.thing_dataset_id_to_contiguous_id.values())
        self.reset()

    def for_stage(self, name: str) -> "PanopticEvaluator":
        """An empty evaluator that writes to a folder ``name`` of this one's."""
        folder = os.path.join(self._output_dir, name)
        return PanopticEvaluator(dataset_name=self._name, output_dir=folder, check=False)

    def reset(self) -> None:
        """Forget all predictions."""
        self._truth: list[Json] = []
        self._predictions: list[Json] = []
        self._folder = os.path.join(self._output_dir, "panoptic")
        os.makedirs(self._folder, exist_ok=True)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predicted ``panoptic_seg`` of a batch."""
        for image, output in zip(inputs, outputs, strict=True):
            pixels, segments = output["panoptic_seg"]
            if self._check:
                with saying_how_to_list_all(self._name):
                    read_segments(image, (pixels.shape[0], pixels.shape[1]))
            name = re.sub(r"[%/\\]", lambda sign: f"%{ord(sign[0]):02X}", f"{image['image_id']}.png")
            ids = pixels.cpu().numpy()
            channels = np.stack((ids, ids // 256, ids // 256**2), axis=-1)
            # The conversion keeps the lowest byte of each.
            Image.fromarray(channels.astype(np.uint8)).save(os.path.join(self._folder, name))
            predicted = [{"id": each["id"], "category_id": each["category_id"] + 1} for each in segments]
            self._predictions.append({"image_id": image["image_id"], "file_name": name, "segments_info": predicted})
            true = [
                {**each, "category_id": each["category_id"] + 1, "iscrowd": each.get("iscrowd", 0)}
                for each in image["segments_info"]
            ]
            path = os.path.abspath(image["pan_seg_file_name"])
            self._truth.append({"image_id": image["image_id"], "file_name": path, "segments_info": true})

    def evaluate(self) -> dict[str, Scores]:
        """Score the predictions of all processes and log the table; returns the same as :meth:`score`."""
        scores = self.score()
        if scores:
            logger.info("%s:\n%s", self._name, panoptic_table(scores["panoptic_seg"]))
        return scores

    def score(self) -> dict[str, Scores]:
        """Score the predictions of all processes.

        Returns:
            On the main process ``{"panoptic_seg": scores}``: PQ, SQ and RQ, the same of things (``PQ_th``) and of stuff
            (``PQ_st``), and of each class (``PQ-<class>``), in percent, nan where there is nothing to measure. On other
            processes an empty dict.

        Raises:
            DatasetError: no image was predicted.
        """
        gathered = comm.gather((self._truth, self._predictions))
        if not comm.is_main_process():
            return {}
        truth = _numbered(annotation for part, _ in gathered for annotation in part)
        predictions = _numbered(annotation for _, part in gathered for annotation in part)
        if not truth:
            raise DatasetError(f"No image of {self._name} was predicted, so it has no PQ.")
        categories = [
            {"id": index + 1, "name": name, "isthing": int(index in self._things)}
            for index, name in enumerate(self._names)
        ]
        images = [{"id": annotation["image_id"]} for annotation in truth]
        evaluation = panoptic.PanopticEval(
            {"images": images, "annotations": truth, "categories": categories},
            {"images": images, "annotations": predictions, "categories": categories},
            gt_folder=os.sep,
            pred_folder=self._folder,
        )
        evaluation.evaluate()
        return {"panoptic_seg": self._scores(evaluation.results())}

    def _scores(self, results: Mapping[str, Any]) -> Scores:
        scores = {
            f"{metric.upper()}{ending}": _percent(results[group][metric]) if results[group]["n"] else math.nan
            for group, ending in _GROUPS.items()
            for metric in ("pq", "sq", "rq")
        }
        for metric in ("pq", "sq", "rq"):
            for index, name in enumerate(self._names):
                scores[f"{metric.upper()}-{name}"] = _percent(results["per_class"][index + 1][metric])
        return scores


def _numbered(annotations: Any) -> list[Json]:
    """The annotations in the order of their image ids, of any kind, with numbers in place of the ids."""
    ordered = sorted(annotations, key=lambda annotation: str(annotation["image_id"]))
    return [{**annotation, "image_id": number} for number, annotation in enumerate(ordered, start=1)]


def _percent(value: float) -> float:
    """Nan for -1, which says that there is nothing to measure."""
    return math.nan if value < 0 else 100 * value


class SemanticEvaluator(DatasetEvaluator):
    """Counts pixels by true and predicted class, but those of the label ``ignore``; computes IoU and accuracy.

    Predictions go to ``sem_seg/`` below ``output_dir``, label maps of the images' names; None writes none.
    """

    def __init__(self, *, dataset_name: str, output_dir: str | None, ignore: int) -> None:
        self._name, self._output_dir, self._ignore = dataset_name, output_dir, ignore
        self._names = list(MetadataCatalog.get(dataset_name).stuff_classes)
        self.reset()

    def for_stage(self, name: str) -> "SemanticEvaluator":
        """An empty evaluator that writes no predictions."""
        return SemanticEvaluator(dataset_name=self._name, output_dir=None, ignore=self._ignore)

    def reset(self) -> None:
        """Forget all predictions."""
        # Names need not differ, so classes are counted by number.
        self._counts = semantic.SemanticEval(len(self._names), ignore_index=self._ignore)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predicted ``sem_seg`` of a batch, scores of the classes (K, H, W)."""
        for image, output in zip(inputs, outputs, strict=True):
            predicted = output["sem_seg"].argmax(dim=0).cpu().numpy().astype(np.int32)
            size = (predicted.shape[0], predicted.shape[1])
            with saying_how_to_list_all(self._name):
                truth = read_semantic(image, num_classes=len(self._names), ignore=self._ignore, size=size)
            self._counts.update(truth, predicted)
            if self._output_dir is not None:
                name = image.get("image_id", os.path.splitext(os.path.basename(image["file_name"]))[0])
                path = Path(self._output_dir, "sem_seg", below(f"{name}.png"))
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = np.uint8 if len(self._names) <= 256 else np.uint16
                Image.fromarray(predicted.astype(kind)).save(path)

    def evaluate(self) -> dict[str, Scores]:
        """Score the predictions of all processes and log the table; returns the same as :meth:`score`."""
        scores = self.score()
        if scores:
            logger.info("%s:\n%s", self._name, semantic_table(scores["sem_seg"]))
        return scores

    def score(self) -> dict[str, Scores]:
        """Score the predictions of all processes.

        Returns:
            On the main process ``{"sem_seg": scores}``: mIoU, fwIoU (weighed by the pixels of a class), mACC, pACC, and
            ``IoU-<class>`` and ``ACC-<class>``, in percent, nan where there is nothing to measure. On other processes
            an empty dict.
        """
        gathered = comm.gather(self._counts)
        if not comm.is_main_process():
            return {}
        total = semantic.SemanticEval(len(self._names), ignore_index=self._ignore)
        for part in gathered:
            total.merge(part)
        results = total.results()
        metrics = {"mIoU": "mIoU", "fwIoU": "fwIoU", "mACC": "mAcc", "pACC": "aAcc"}
        scores = {name: _percent(results[theirs]) for name, theirs in metrics.items()}
        for metric, theirs in (("IoU", "IoU"), ("ACC", "Acc")):
            for name, of_class in zip(self._names, results["per_class"], strict=True):
                scores[f"{metric}-{name}"] = _percent(of_class[theirs])
        return {"sem_seg": scores}


class ThingsEvaluator(CocoEvaluator):
    """AP of the instances of thing classes, numbered among the things; those of stuff do not count."""

    def __init__(self, *, things: Sequence[int], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._things = torch.tensor(list(things))
        self._place = torch.zeros(max(things) + 1, dtype=torch.int64)
        self._place[self._things] = torch.arange(len(things))

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predicted ``instances`` of a batch."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(torch.device("cpu"))
            instances = instances[torch.isin(instances.pred_classes, self._things)]
            instances.pred_classes = self._place[instances.pred_classes]
            super().process([image], [{"instances": instances}])


def register_things(name: str) -> tuple[str, list[int]]:
    """Register the things of a panoptic dataset as an instance dataset, once; returns its name and their class indices.

    Instance annotations in COCO's format that the metadata names (json_file) are the truth if the file exists;
    otherwise the masks of the segments are.
    """
    metadata, instances = MetadataCatalog.get(name), f"{name}_things"
    to_index = metadata.thing_dataset_id_to_contiguous_id
    ids = sorted(to_index, key=to_index.__getitem__)
    if instances not in DatasetCatalog.list():
        DatasetCatalog.register(instances, lambda: _things_of(name))
        json_file = metadata.get("json_file")
        MetadataCatalog.get(instances).set(
            json_file=json_file if json_file and os.path.isfile(json_file) else None,
            thing_classes=[metadata.thing_classes[to_index[key]] for key in ids],
            thing_dataset_id_to_contiguous_id={key: place for place, key in enumerate(ids)},
        )
    return instances, [to_index[key] for key in ids]


def _things_of(name: str) -> list[Json]:
    """The images of a panoptic dataset with the masks of their things as instances."""
    _, things = register_things(name)
    entries = []
    for entry in load_dataset(name):
        with saying_how_to_list_all(name):
            ids = read_segments(entry)
        annotations = []
        kept = [each for each in entry["segments_info"] if each["category_id"] in things]
        for annotation in panoptic_annotations(ids, kept):
            box = {"bbox": mask_util.toBbox(annotation["segmentation"]).tolist(), "bbox_mode": BoxMode.XYWH_ABS}
            annotations.append({**annotation, **box, "category_id": things.index(annotation["category_id"])})
        height, width = ids.shape
        entries.append({**entry, "height": height, "width": width, "annotations": annotations})
    return entries


class EvaluatorGroup(DatasetEvaluator):
    """Several evaluators of the same images, whose results are joined."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = list(parts)

    def for_stage(self, name: str) -> "EvaluatorGroup":
        """Empty evaluators of one stage."""
        return EvaluatorGroup([part.for_stage(name) for part in self._parts])

    def reset(self) -> None:
        """Forget all predictions."""
        for part in self._parts:
            part.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add a batch."""
        for part in self._parts:
            part.process(inputs, outputs)

    def evaluate(self) -> dict[str, Scores]:
        """The joined scores, logged; raises ConfigError for a name given twice, or for other than numbers."""
        results: dict[str, Scores] = {}
        for part in self._parts:
            scores = _checked_scores(type(part), part.evaluate() or {})
            if twice := sorted(results.keys() & scores.keys()):
                raise ConfigError(
                    f"{type(part).__module__}.{type(part).__qualname__} (TEST.EVALUATORS) gives a result of the name "
                    f"{twice[0]}, which another evaluator has; give it another name."
                )
            results |= scores
        return results

    def score(self) -> dict[str, Scores]:
        """Score the predictions of all processes."""
        return {task: scores for part in self._parts for task, scores in part.score().items()}


def numbers_of(method: str, kind: type, given: Any) -> dict[str, float]:
    """Numbers by name, each a Python one; raises ConfigError if the method of an evaluator gives something else."""
    try:
        plain = {name: x.item() if hasattr(x, "item") else x for name, x in given.items()}
        if all(isinstance(name, str) and isinstance(x, int | float) for name, x in plain.items()):
            return plain
    except (AttributeError, TypeError, ValueError, RuntimeError):
        pass
    raise ConfigError(
        f"TEST.EVALUATORS: {method} of {kind.__module__}.{kind.__qualname__} gives {given!r:.60}; let it give numbers "
        "by name."
    )


def _checked_scores(kind: type, scores: Any) -> dict[str, Any]:
    """Numbers by task and name, as results.json holds them; a number may stand in place of a task."""
    if not isinstance(scores, Mapping):
        return {"": numbers_of("evaluate", kind, scores)}  # raises
    of_tasks = {task: values for task, values in scores.items() if isinstance(values, Mapping)}
    outer = numbers_of("evaluate", kind, {**scores, **dict.fromkeys(of_tasks, 0.0)})
    return {**outer, **{task: numbers_of("evaluate", kind, values) for task, values in of_tasks.items()}}
