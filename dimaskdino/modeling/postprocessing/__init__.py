"""Predictions to results."""

from dimaskdino.modeling.postprocessing.instances import instances_of_image, mean_feature
from dimaskdino.modeling.postprocessing.masks import TWO_STEP, MaskRendering

__all__ = ["TWO_STEP", "MaskRendering", "instances_of_image", "mean_feature"]
