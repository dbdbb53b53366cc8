"""Datasets, mappers, loaders and checks; knows detectron2, not the model."""

from dimaskdino.data.datasets import register_all
from dimaskdino.data.loaders import build_test_loader, build_train_loader
from dimaskdino.data.mapper import build_mapper

__all__ = ["build_mapper", "build_test_loader", "build_train_loader", "register_all"]

register_all()
