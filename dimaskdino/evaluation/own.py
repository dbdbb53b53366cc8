"""Evaluators of a user's own: a number for each image, averaged over the images of all processes."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.transforms import NoOpTransform, TransformList
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm

from dimaskdino.data.annotations import annotations_to_instances
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.errors import ConfigError

logger = logging.getLogger(__name__)


class ImageEvaluator(DatasetEvaluator):
    """Averages what :meth:`measure` of a subclass gives; in results.json under the name of the class.

    Register the subclass in EVALUATOR_REGISTRY and name it in TEST.EVALUATORS, beside what the dataset is scored by.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered dataset.
        output_folder: where predictions and tables go.
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
            on_cpu = {key: value.to("cpu") if hasattr(value, "to") else value for key, value in output.items()}
            measured = self.measure(image, on_cpu, self.truth(image))
            try:
                self._measured.append({name: float(value) for name, value in measured.items()})
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                kind = type(self)
                raise ConfigError(
                    f"TEST.EVALUATORS: measure of {kind.__module__}.{kind.__qualname__} gives {measured!r:.60}; let it "
                    "give numbers by name."
                ) from error

    def truth(self, image: dict[str, Any]) -> Instances:
        """The objects of an image at its own size."""
        entry, size = self._entries[image["image_id"]], (image["height"], image["width"])
        return annotations_to_instances(
            entry.get("annotations", []),
            transforms=TransformList([NoOpTransform()]),
            source_size=size,
            target_size=size,
            num_classes=self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            file_name=entry["file_name"],
            fields=self.cfg.INPUT.ANNOTATION_FIELDS,
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The mean of each number over the images that have it; empty on other processes than the main one."""
        gathered = comm.gather(self._measured)
        if not comm.is_main_process():
            return {}
        values = defaultdict(list)
        for measured in (each for part in gathered for each in part):
            for name, value in measured.items():
                values[name].append(value)
        means = {name: math.fsum(numbers) / len(numbers) for name, numbers in sorted(values.items())}
        kind = type(self).__name__
        logger.info("%s of %s: %s", kind, self.dataset_name, ", ".join(f"{k} {v:.4g}" for k, v in means.items()))
        return {kind: means}
