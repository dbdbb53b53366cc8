"""Which results a model gives, and how they are made of a stage."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.postprocessing.instances import instances_of_image
from dimaskdino.modeling.postprocessing.masks import DIRECT, Frame, MaskRendering
from dimaskdino.modeling.postprocessing.segments import class_probabilities, panoptic_of_image, semantic_of_image
from dimaskdino.modeling.transformer_decoder.checks import NO_THINGS, uses_no_object_class
from dimaskdino.structures import StagePrediction


class PostProcessor(nn.Module):
    """Results of one stage, in detectron2's format.

    Args:
        num_classes: classes K.
        max_detections: instances per image.
        instances: give "instances".
        semantic: give "sem_seg".
        things: give "panoptic_seg" with these thing classes; instances are then theirs. None for no panoptic results.
        score_by_mask: multiply the class scores of instances by mask quality.
        min_score: see :func:`instances_of_image`.
        rendering: how the masks of instances are made, and in how much memory those of semantic and panoptic results.
        with_queries: see :func:`instances_of_image`.
        no_object_class: whether the class head has a no-object logit.
        temperature: of the softmax over scores in semantic and panoptic results; None for none.
        object_threshold: see :func:`panoptic_of_image`.
        overlap_threshold: see :func:`panoptic_of_image`.
        crop_first: see :func:`semantic_of_image`.
    """

    is_thing: torch.Tensor

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        max_detections: int,
        instances: bool = True,
        semantic: bool = False,
        things: Sequence[int] | None = None,
        score_by_mask: bool = False,
        min_score: float = 0.0,
        rendering: MaskRendering = DIRECT,
        with_queries: bool = False,
        no_object_class: bool = False,
        temperature: float | None = None,
        object_threshold: float = 0.0,
        overlap_threshold: float = 0.0,
        crop_first: bool = True,
    ) -> None:
        super().__init__()
        self.instances, self.semantic, self.panoptic = instances, semantic, things is not None
        self.register_buffer("is_thing", class_mask(things or (), num_classes), persistent=False)
        self.with_queries, self.memory_mb = with_queries, rendering.memory_mb
        self.instance_options: dict[str, Any] = {
            "max_detections": max_detections,
            "score_by_mask": score_by_mask,
            "min_score": min_score,
            "rendering": rendering,
            "with_queries": with_queries,
        }
        self.temperature, self.no_object_class, self.crop_first = temperature, no_object_class, crop_first
        self.panoptic_options = {"object_threshold": object_threshold, "overlap_threshold": overlap_threshold}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO.TEST.

        Raises:
            ConfigError: panoptic results without known thing classes, or without a positive temperature.
        """
        node, test = cfg.MODEL.MaskDINO, cfg.MODEL.MaskDINO.TEST
        if test.PANO_TRANSFORM_EVAL and test.PANO_TEMPERATURE <= 0:
            raise ConfigError(
                f"MODEL.MaskDINO.TEST.PANO_TEMPERATURE is {test.PANO_TEMPERATURE}; it must be positive (or set "
                "PANO_TRANSFORM_EVAL False)."
            )
        return {
            "instances": test.INSTANCE_ON,
            "semantic": test.SEMANTIC_ON and node.PREDICT_MASKS,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "things": thing_classes(cfg, "MODEL.MaskDINO.TEST.PANOPTIC_ON") if test.PANOPTIC_ON else None,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "score_by_mask": not test.TEST_FOUCUS_ON_BOX,
            "min_score": test.MIN_SCORE,
            "rendering": MaskRendering.from_config(cfg),
            "with_queries": test.QUERY_FEATURES,
            "no_object_class": uses_no_object_class(cfg),
            "temperature": test.PANO_TEMPERATURE if test.PANO_TRANSFORM_EVAL else None,
            "object_threshold": test.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": test.OVERLAP_THRESHOLD,
            "crop_first": test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.INSTANCE_ON or test.PANOPTIC_ON,
        }

    def forward(self, prediction: StagePrediction, image: int, frame: Frame) -> dict[str, Any]:
        """Results of one image.

        Args:
            prediction: of a stage.
            image: index in the batch.
            frame: the sizes of the image; boxes and masks are parts of the padded one.

        Returns:
            As wanted: "instances" (Instances), "panoptic_seg" ((H, W) int32 and the segments), "sem_seg" (K, H, W).
        """
        results: dict[str, Any] = {}
        if self.instances:
            things = self.is_thing if self.panoptic else None
            results["instances"] = instances_of_image(
                prediction, image, frame, **self.instance_options, is_thing=things
            )
        if self.panoptic:
            results["panoptic_seg"] = panoptic_of_image(
                prediction,
                image,
                frame,
                is_thing=self.is_thing,
                temperature=self.temperature,
                memory_mb=self.memory_mb,
                **self.panoptic_options,
            )
        if self.semantic:
            logits = prediction.logits[image]
            results["sem_seg"] = semantic_of_image(
                prediction,
                image,
                frame,
                class_probabilities(logits, temperature=self.temperature, no_object_class=self.no_object_class),
                crop_first=self.crop_first,
                memory_mb=self.memory_mb,
            )
        return results


def class_mask(classes: Sequence[int], num_classes: int) -> torch.Tensor:
    """(K,) bool, True at ``classes``; those from K on, which the model does not have, are left out."""
    return torch.tensor([index in set(classes) for index in range(num_classes)], dtype=torch.bool)


def thing_classes(cfg: CfgNode, key: str) -> list[int]:
    """The thing classes: MODEL.MaskDINO.THING_CLASSES, or what the metadata of the datasets says.

    Raises:
        ConfigError: neither says which classes are things, or a dataset is not registered.
    """
    if cfg.MODEL.MaskDINO.THING_CLASSES:
        return [] if list(cfg.MODEL.MaskDINO.THING_CLASSES) == NO_THINGS else list(cfg.MODEL.MaskDINO.THING_CLASSES)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    # Panoptic sets first: to a set of objects, whatever it lists is a thing.
    for name in sorted(names, key=lambda name: MetadataCatalog.get(name).get("truth") != "panoptic"):
        metadata = MetadataCatalog.get(name)
        things = set(metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
        stuff = set(metadata.get("stuff_dataset_id_to_contiguous_id", {}).values())
        # Sets for Panoptic FPN count their stuff from 0 again.
        if (things or stuff) and not things & stuff:
            return sorted(things)
    unknown = [name for name in names if name not in DatasetCatalog.list()]
    if unknown:
        raise ConfigError(
            f"{key} needs to know which classes are things, but dataset {unknown[0]} is not registered; correct its "
            "name (DATASETS.PANOPTIC names the files of panoptic_train and panoptic_val), or list the classes in "
            "MODEL.MaskDINO.THING_CLASSES."
        )
    raise ConfigError(
        f"{key} needs to know which classes are things, but the metadata of {', '.join(names) or 'no dataset'} does "
        "not say it (thing_dataset_id_to_contiguous_id, stuff_dataset_id_to_contiguous_id); use a panoptic dataset or "
        "list the classes in MODEL.MaskDINO.THING_CLASSES."
    )
