"""Predictions to results."""

from dimaskdino.modeling.postprocessing.instances import (
    DEFAULT_OPTIONS,
    InstanceOptions,
    instances_of_image,
    mean_feature,
)
from dimaskdino.modeling.postprocessing.masks import MaskRendering

__all__ = ["DEFAULT_OPTIONS", "InstanceOptions", "MaskRendering", "instances_of_image", "mean_feature"]
