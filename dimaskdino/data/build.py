"""Mappers by name."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry

from dimaskdino.data.augmentations import large_scale_jitter, shortest_edge, test_resize
from dimaskdino.data.mapper import InstanceMapper
from dimaskdino.errors import ConfigError

Mapper = Callable[[dict[str, Any]], dict[str, Any]]

MAPPER_REGISTRY = Registry("DATASET_MAPPER")
MAPPER_REGISTRY.__doc__ = """
Builders of mappers by INPUT.DATASET_MAPPER_NAME. Each is called as ``builder(cfg, *, is_train, with_instances)`` and
returns a callable that maps an entry of a dataset to the model's input.
"""


@MAPPER_REGISTRY.register()
def coco_instance_lsj(cfg: CfgNode, *, is_train: bool, with_instances: bool) -> InstanceMapper:
    """Large-scale jitter on a square canvas in training."""
    return _instance_mapper(cfg, large_scale_jitter(cfg) if is_train else test_resize(cfg), with_instances)


@MAPPER_REGISTRY.register()
def coco_instance_detr(cfg: CfgNode, *, is_train: bool, with_instances: bool) -> InstanceMapper:
    """DETR's resizing of the shortest edge, with its random crop if asked for, in training."""
    return _instance_mapper(cfg, shortest_edge(cfg) if is_train else test_resize(cfg), with_instances)


def _instance_mapper(cfg: CfgNode, augmentations: list[T.Augmentation], with_instances: bool) -> InstanceMapper:
    return InstanceMapper(
        augmentations=augmentations,
        image_format=cfg.INPUT.FORMAT,
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        with_instances=with_instances,
    )


def build_mapper(cfg: CfgNode, is_train: bool, *, with_instances: bool | None = None) -> Mapper:
    """Build the mapper that INPUT.DATASET_MAPPER_NAME names.

    Args:
        cfg: the configuration.
        is_train: training augmentations, or the plain resize of testing.
        with_instances: whether annotations become targets; None means in training only.

    Raises:
        ConfigError: if no mapper has that name.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in MAPPER_REGISTRY:
        known = ", ".join(sorted(known_name for known_name, _ in MAPPER_REGISTRY))
        raise ConfigError(f"INPUT.DATASET_MAPPER_NAME is {name!r}; known mappers: {known}.")
    wanted = is_train if with_instances is None else with_instances
    return MAPPER_REGISTRY.get(name)(cfg, is_train=is_train, with_instances=wanted)
