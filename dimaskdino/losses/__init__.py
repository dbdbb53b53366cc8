"""Matching and losses."""

from dimaskdino.losses.criterion import Criterion
from dimaskdino.losses.matcher import HungarianMatcher
from dimaskdino.losses.points import PointSampler, RandomPointSampler

__all__ = ["Criterion", "HungarianMatcher", "PointSampler", "RandomPointSampler"]
