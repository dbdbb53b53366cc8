"""Data loaders from the configuration, and a training stream that a resumed run goes on with."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.samplers import TrainingSampler

from dimaskdino.data import build_mapper

DatasetDicts = list[dict[str, Any]]


class ResumableSampler(TrainingSampler):
    """detectron2's endless shuffled stream without the images that earlier runs have drawn.

    With the same seed, an interrupted and resumed training sees the images in the order of an uninterrupted one.
    Without a seed the resumed run shuffles anew.

    Args:
        size: number of images.
        num_drawn: images that the whole job, all processes together, has drawn before.
        seed: of the shuffles; None draws one that the processes share.
    """

    def __init__(self, size: int, *, num_drawn: int = 0, seed: int | None = None) -> None:
        super().__init__(size, seed=seed)
        self._num_drawn = num_drawn

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._infinite_indices(), self._num_drawn + self._rank, None, self._world_size)


def build_train_loader(cfg: CfgNode, start_iter: int = 0) -> Iterable[list[dict[str, Any]]]:
    """Endless batches of SOLVER.IMS_PER_BATCH / processes mapped training images.

    Args:
        cfg: the configuration.
        start_iter: iterations that earlier runs of this training have done.
    """
    dataset = _dataset_dicts(cfg, cfg.DATASETS.TRAIN)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dataset = filter_images_with_only_crowd_annotations(dataset)
    sampler = None
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        sampler = ResumableSampler(
            len(dataset),
            num_drawn=start_iter * cfg.SOLVER.IMS_PER_BATCH,
            seed=cfg.SEED if cfg.SEED >= 0 else None,
        )
    return build_detection_train_loader(cfg, mapper=build_mapper(cfg, is_train=True), dataset=dataset, sampler=sampler)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
    """Every image of ``dataset_name`` (the first DATASETS.MAX_IMAGES of them) once, one per batch."""
    return build_detection_test_loader(
        dataset=_dataset_dicts(cfg, [dataset_name]),
        mapper=build_mapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _dataset_dicts(cfg: CfgNode, names: Sequence[str]) -> DatasetDicts:
    """Images of the named datasets, images without objects included, cut to DATASETS.MAX_IMAGES."""
    dataset = get_detection_dataset_dicts(list(names), filter_empty=False)
    return dataset[: cfg.DATASETS.MAX_IMAGES] if cfg.DATASETS.MAX_IMAGES else dataset
