"""Predictions to results."""

from dimaskdino.modeling.postprocessing.instances import instances_of_image

__all__ = ["instances_of_image"]
