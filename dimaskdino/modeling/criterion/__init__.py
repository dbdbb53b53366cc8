"""Matching and losses."""

from dimaskdino.modeling.criterion.criterion import Criterion, StepObjects
from dimaskdino.modeling.criterion.matcher import HungarianMatcher
from dimaskdino.modeling.criterion.points import PointSampler, RandomPointSampler

__all__ = ["Criterion", "HungarianMatcher", "PointSampler", "RandomPointSampler", "StepObjects"]
