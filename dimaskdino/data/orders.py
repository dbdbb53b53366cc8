"""The orders in which a training draws images, by the name in DATALOADER.SAMPLER_TRAIN."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from fvcore.common.registry import Registry

from dimaskdino.compat import newer_training_sampler, training_samplers
from dimaskdino.errors import ConfigError, check_choice

Entries = Sequence[dict[str, Any]]

SAMPLER_REGISTRY = Registry("SAMPLER")
SAMPLER_REGISTRY.__doc__ = """
Orders of training images by DATALOADER.SAMPLER_TRAIN. Each is called as ``builder(cfg, entries, seed)`` and gives an
iterable of indices of ``entries`` for all processes together, which never ends and begins anew, with the same indices,
each time it is iterated over: a run that is resumed skips what it has drawn.
"""


def check_sampler(cfg: CfgNode) -> None:
    """Raise ConfigError for an unknown sampler, or a share outside 0 to 1."""
    known = [*training_samplers(cfg), *(name for name, _ in SAMPLER_REGISTRY)]
    check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, known)
    share = cfg.DATALOADER.NEGATIVE_SHARE
    if share > 1:
        raise ConfigError(f"DATALOADER.NEGATIVE_SHARE is {share}; give a share from 0 to 1, or -1 for what there is.")
    if share > 0 and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        raise ConfigError(
            f"DATALOADER.NEGATIVE_SHARE {share} draws images without objects, which "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out; set that to False."
        )


def make_order(cfg: CfgNode, entries: Entries, seed: int) -> Iterable[int]:
    """The order that DATALOADER.{SAMPLER_TRAIN, NEGATIVE_SHARE} ask for.

    Raises:
        ConfigError: the dataset has no images that they need.
    """
    share = cfg.DATALOADER.NEGATIVE_SHARE
    if share < 0:
        return _by_name(cfg, entries, seed)
    groups: tuple[list[int], list[int]] = ([], [])
    for index, entry in enumerate(entries):
        groups[all(each.get("iscrowd", 0) for each in objects_of(entry))].append(index)
    for kind, group, needed in (("with", groups[0], share < 1), ("without", groups[1], share > 0)):
        if needed and not group:
            raise ConfigError(f"DATALOADER.NEGATIVE_SHARE is {share}, but no training image is {kind} objects.")
    of_groups = [
        _by_name(cfg, [entries[index] for index in groups[0]], seed) if groups[0] else (),
        whole(TrainingSampler(len(groups[1]), seed=seed)) if groups[1] else (),
    ]
    return _Mixed(of_groups, groups, share, seed)


def objects_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What an image lists with classes: its annotations, or its panoptic segments."""
    if "annotations" not in entry and "segments_info" not in entry:
        raise ConfigError(
            "DATALOADER.SAMPLER_TRAIN and NEGATIVE_SHARE look at the classes of each image, which semantic datasets do "
            "not list; set them to TrainingSampler and -1."
        )
    return entry["annotations"] if "annotations" in entry else entry["segments_info"]


@SAMPLER_REGISTRY.register()
class ClassBalancedSampler:
    """Draws a class, each as likely as any other, then the next image of it in an order that is shuffled every pass.

    Images without objects are never drawn; see DATALOADER.NEGATIVE_SHARE.
    """

    def __init__(self, cfg: CfgNode, entries: Entries, seed: int) -> None:
        images: dict[int, list[int]] = {}
        for index, entry in enumerate(entries):
            kept = [each["category_id"] for each in objects_of(entry) if not each.get("iscrowd", 0)]
            for category in dict.fromkeys(kept):
                images.setdefault(category, []).append(index)
        if not images:
            raise ConfigError("DATALOADER.SAMPLER_TRAIN ClassBalancedSampler: no training image has an object.")
        self._images, self._seed = [images[category] for category in sorted(images)], seed

    def __iter__(self) -> Iterator[int]:
        passes = [
            itertools.chain.from_iterable(_passes(members, self._seed, number))
            for number, members in enumerate(self._images)
        ]
        generator = np.random.default_rng((self._seed, len(self._images)))
        while True:
            yield next(passes[generator.integers(len(passes))])


def _passes(members: list[int], seed: int, number: int) -> Iterator[list[int]]:
    generator = np.random.default_rng((seed, 1, number))
    while True:
        yield generator.permutation(members).tolist()


class _Mixed:
    """Images with and without objects, each in its own order, the second with a probability of ``share``."""

    def __init__(self, orders: Sequence[Iterable[int]], groups: Sequence[list[int]], share: float, seed: int) -> None:
        self._orders, self._groups, self._share, self._seed = orders, groups, share, seed

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self._seed, 2))
        orders = [iter(order) for order in self._orders]
        while True:
            group = int(generator.random() < self._share)
            yield self._groups[group][next(orders[group])]


def _by_name(cfg: CfgNode, entries: Entries, seed: int) -> Iterable[int]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name in SAMPLER_REGISTRY:
        return SAMPLER_REGISTRY.get(name)(cfg, entries, seed)
    if name == "TrainingSampler":
        return whole(TrainingSampler(len(entries), seed=seed))
    if name == "RepeatFactorTrainingSampler":
        # It looks at nothing but the classes of each image, and would keep everything else in memory.
        objects = [{"annotations": _one_of_each_class(objects_of(entry))} for entry in entries]
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            objects, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return whole(RepeatFactorTrainingSampler(factors, seed=seed))
    return whole(newer_training_sampler(cfg, len(entries), seed))


def _one_of_each_class(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"category_id": category} for category in dict.fromkeys(each["category_id"] for each in objects)]


def whole(sampler: Any) -> Iterable[int]:
    """One of detectron2's samplers, for all processes: BatchSampler divides batches instead."""
    sampler._rank, sampler._world_size = 0, 1
    return sampler
