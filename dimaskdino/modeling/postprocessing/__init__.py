"""Predictions to results."""

from dimaskdino.modeling.postprocessing.instances import instances_of_image, mean_feature
from dimaskdino.modeling.postprocessing.masks import Frame, MaskRendering
from dimaskdino.modeling.postprocessing.results import PostProcessor, class_mask, thing_classes
from dimaskdino.modeling.postprocessing.segments import class_probabilities, panoptic_of_image, semantic_of_image

__all__ = [
    "Frame",
    "MaskRendering",
    "PostProcessor",
    "class_mask",
    "class_probabilities",
    "instances_of_image",
    "mean_feature",
    "panoptic_of_image",
    "semantic_of_image",
    "thing_classes",
]
