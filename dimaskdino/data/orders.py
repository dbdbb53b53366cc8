"""Which images a run trains on, and in which order."""

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils.serialize import PicklableWrapper
from fvcore.common.registry import Registry
from torch.utils.data import Dataset, Sampler

from dimaskdino.compat import newer_training_sampler, training_samplers
from dimaskdino.data.shared import PackedEntries
from dimaskdino.errors import ConfigError, DatasetError, check_choice, check_range, make_part
from dimaskdino.seeds import SAMPLE, seeded

FOLDER = "folder"
Entries = Sequence[dict[str, Any]]
# The place of a sample in the endless order of the run, and the index of its image.
Draw = tuple[int, int]
_MAX_TRIES = 1000


def check_folds(cfg: CfgNode) -> None:
    """Raise ConfigError if the keys of DATASETS.FOLDS contradict each other."""
    node = cfg.DATASETS.FOLDS
    if node.NUM == 0:
        return
    check_range("DATASETS.FOLDS.SEED", node.SEED, 0)
    if node.NUM < 2 or not 0 <= node.FOLD < node.NUM:
        raise ConfigError(
            f"DATASETS.FOLDS.NUM is {node.NUM} and FOLD {node.FOLD}; give at least 2 folds, and one of 0 to NUM - 1 to "
            "test on (or NUM 0 for none)."
        )
    if not set(cfg.DATASETS.TEST) & set(cfg.DATASETS.TRAIN):
        raise ConfigError(
            "DATASETS.FOLDS divides the datasets of DATASETS.TRAIN; name one of them in DATASETS.TEST as well, to test "
            "on the fold that is not trained on."
        )


def image_keys(cfg: CfgNode) -> list[str]:
    """Keys of images that the folds need."""
    node = cfg.DATASETS.FOLDS
    return [node.GROUP] if node.NUM and node.GROUP not in ("", FOLDER) else []


def take_fold(cfg: CfgNode, name: str, entries: list[dict[str, Any]], *, train: bool) -> list[dict[str, Any]]:
    """The images of a dataset that a run trains on, or is tested on; all of one that is not in DATASETS.TRAIN.

    Images of one group (DATASETS.FOLDS.GROUP) are in one fold. The folds depend on the groups' names and the seed, not
    on the order of the images.

    Raises:
        DatasetError: an image does not have the key of its group, or there are fewer groups than folds.
    """
    node = cfg.DATASETS.FOLDS
    if not node.NUM or name not in cfg.DATASETS.TRAIN:
        return entries
    groups = [_group(entry, node.GROUP) for entry in entries]
    names = sorted(set(groups))
    if len(names) < node.NUM:
        what = f"groups of images (DATASETS.FOLDS.GROUP {node.GROUP})" if node.GROUP else "images"
        raise DatasetError(
            f"DATASETS.FOLDS.NUM is {node.NUM}, but dataset {name} has {len(names)} {what}; give that many or fewer."
        )
    order = np.random.default_rng(node.SEED).permutation(len(names)).tolist()
    fold_of = {names[index]: place % node.NUM for place, index in enumerate(order)}
    return [entry for entry, group in zip(entries, groups, strict=True) if (fold_of[group] == node.FOLD) is not train]


def nothing_to_train_on(names: Iterable[str]) -> DatasetError:
    """The error for datasets of which DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves no image."""
    return DatasetError(
        f"No image with an object (apart from crowd regions) in {', '.join(names)}; check the annotations, or set "
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on background."
    )


def _group(entry: dict[str, Any], key: str) -> str:
    if key == FOLDER:
        return os.path.dirname(entry["file_name"])
    value = entry.get(key or "file_name")
    if value is None:
        raise DatasetError(f"Image {entry['file_name']} has no {key!r}, which DATASETS.FOLDS.GROUP names; add the key.")
    return str(value)


class BatchSampler(Sampler[list[Draw]]):
    """The batches of one process: its share of those of all processes, of which ``first`` were drawn before.

    ``order`` gives indices of images for all processes together, and ``batch_size``, a multiple of ``num_processes``,
    is that of their batches. ``group_size`` images come together from one of the groups, which ``group_of`` gives for
    each image. Where that is the share of a process, as detectron2 groups them, no process has two groups in a batch.
    """

    def __init__(
        self,
        order: Iterable[int],
        *,
        batch_size: int,
        group_of: Sequence[Any] = (),
        group_size: int = 1,
        first: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self._order, self._group_of, self._group_size = order, group_of, group_size
        self._batch_size, self._first = batch_size, first
        share = batch_size // num_processes
        self._share = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[Draw]]:
        draws: Iterator[Draw] = enumerate(self._order)
        if self._group_of:
            draws = self._grouped(draws)
        draws = itertools.islice(draws, self._first * self._batch_size, None)
        while len(batch := list(itertools.islice(draws, self._batch_size))) == self._batch_size:
            yield batch[self._share]

    def _grouped(self, draws: Iterator[Draw]) -> Iterator[Draw]:
        """The same draws, as soon as there are ``group_size`` of a group."""
        waiting: dict[Any, list[Draw]] = {}
        for draw in draws:
            group = waiting.setdefault(self._group_of[draw[1]], [])
            group.append(draw)
            if len(group) == self._group_size:
                yield from group
                group.clear()


class Samples(Dataset):
    """Mapped images by :data:`Draw`, whose place alone decides on the random numbers; None draws another image."""

    def __init__(self, entries: Sequence[Any], mapper: Callable[[dict[str, Any]], Any], seed: int) -> None:
        self._entries = entries if isinstance(entries, PackedEntries) else PackedEntries(entries)
        self._mapper = PicklableWrapper(mapper)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, draw: Draw) -> Any:
        place, index = draw
        with seeded(self._seed, SAMPLE, place):
            for _ in range(_MAX_TRIES):
                if (mapped := self._mapper(self._entries[index])) is not None:
                    return self._pasted(mapped)
                index = random.randrange(len(self))
        raise DatasetError(f"The mapper returned None for {_MAX_TRIES} images; check INPUT.DATASET_MAPPER_NAME.")

    def _pasted(self, mapped: Any) -> Any:
        """With objects of another image where the mapper has a copy-paste."""
        paste = getattr(self._mapper, "copy_paste", None)
        if paste is None or np.random.random() >= paste.prob:
            return mapped
        other = self._mapper(self._entries[random.randrange(len(self))])
        return mapped if other is None else paste(mapped, other)


SAMPLER_REGISTRY = Registry("SAMPLER")
SAMPLER_REGISTRY.__doc__ = """
Orders of training images by DATALOADER.SAMPLER_TRAIN. Each is called as ``builder(cfg, entries, seed)`` and gives an
iterable of indices of ``entries`` for all processes together, which never ends and starts over, with the same indices,
each time it is iterated over: a run that is resumed skips what it has drawn.
"""


def check_sampler(cfg: CfgNode) -> None:
    """Raise ConfigError for an unknown sampler, or a share outside 0 to 1."""
    known = [*training_samplers(cfg), *(name for name, _ in SAMPLER_REGISTRY)]
    check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, known)
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        check_range("DATALOADER.REPEAT_THRESHOLD", cfg.DATALOADER.REPEAT_THRESHOLD, 0.0, 1.0, "a share of the images")
    share = cfg.DATALOADER.NEGATIVE_SHARE
    if share > 1:
        raise ConfigError(f"DATALOADER.NEGATIVE_SHARE is {share}; give a share from 0 to 1, or -1 for what there is.")
    if share > 0 and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        raise ConfigError(
            f"DATALOADER.NEGATIVE_SHARE {share} draws images without objects, which "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out; set that to False."
        )


def endless_order(cfg: CfgNode, entries: Entries, seed: int) -> Iterable[int]:
    """Indices of ``entries`` as DATALOADER.{SAMPLER_TRAIN, NEGATIVE_SHARE} draw them, for all processes together.

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
        passes = [_endless_passes(members, self._seed, number) for number, members in enumerate(self._images)]
        generator = np.random.default_rng((self._seed, len(self._images)))
        while True:
            yield next(passes[generator.integers(len(passes))])


def _endless_passes(members: list[int], seed: int, number: int) -> Iterator[int]:
    generator = np.random.default_rng((seed, 1, number))
    while True:
        yield from generator.permutation(members).tolist()


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
        order = make_part("DATALOADER.SAMPLER_TRAIN", SAMPLER_REGISTRY.get(name), cfg, entries, seed)
        return _Checked(name, order, len(entries))
    if name == "TrainingSampler":
        return whole(TrainingSampler(len(entries), seed=seed))
    if name == "RepeatFactorTrainingSampler":
        # It looks at nothing but the classes of each image, and would keep everything else in memory.
        classes = [dict.fromkeys(each["category_id"] for each in objects_of(entry)) for entry in entries]
        objects = [{"annotations": [{"category_id": category} for category in found]} for found in classes]
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            objects, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return whole(RepeatFactorTrainingSampler(factors, seed=seed))
    return whole(newer_training_sampler(cfg, len(entries), seed))


class _Checked:
    """What a registered sampler gives, if it is an endless order of a number of images."""

    def __init__(self, name: str, order: Any, number: int) -> None:
        self._name, self._order, self._number = f"DATALOADER.SAMPLER_TRAIN {name}", order, number
        if not isinstance(order, Iterable):
            raise ConfigError(f"{self._name} makes a {type(order).__name__}, not an iterable of indices.")

    def __iter__(self) -> Iterator[int]:
        for index in self._order:
            if not isinstance(index, int | np.integer) or not 0 <= index < self._number:
                raise ConfigError(f"{self._name} gives {index!r}; give the index of one of {self._number} images.")
            yield int(index)
        raise ConfigError(f"{self._name} has come to its end; let it go on forever.")


def whole(sampler: Any) -> Iterable[int]:
    """One of detectron2's samplers, for all processes: BatchSampler divides batches instead."""
    sampler._rank, sampler._world_size = 0, 1
    return sampler
