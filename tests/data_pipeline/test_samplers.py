"""Which images a run trains on, and in which order: folds, samplers, batches."""

import random
from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader

from dimaskdino.config import Config, get_cfg
from dimaskdino.data.loaders import images_in_a_group
from dimaskdino.data.orders import (
    SAMPLER_REGISTRY,
    BatchSampler,
    Samples,
    check_folds,
    check_sampler,
    endless_order,
    image_keys,
    take_fold,
)
from dimaskdino.errors import ConfigError, DatasetError
from dimaskdino.seeds import STEP, seed_from, seeded


def folds(**options: Any) -> Config:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ("mine", "other")
    cfg.DATASETS.FOLDS.update(options)
    return cfg


def names(cfg: Config, entries: list[dict], *, train: bool, dataset: str = "mine") -> set[str]:
    return {entry["file_name"] for entry in take_fold(cfg, dataset, entries, train=train)}


ENTRIES = [{"file_name": f"{number % 4}/{number}.png", "patient": number // 3} for number in range(12)]
ALL = {entry["file_name"] for entry in ENTRIES}


@pytest.mark.parametrize("group", ["", "folder", "patient"])
def test_every_image_is_tested_once(group: str) -> None:
    tested = []
    for fold in range(4):
        cfg = folds(NUM=4, FOLD=fold, GROUP=group, SEED=1)
        check_folds(cfg)
        found = names(cfg, ENTRIES, train=False)
        assert names(cfg, ENTRIES, train=True) == ALL - found
        assert names(cfg, ENTRIES[::-1], train=False) == found
        tested.append(found)
        if group:
            kept = {"folder": lambda name: name[0], "patient": lambda name: int(name[2:-4]) // 3}[group]
            assert len({kept(name) for name in found}) == 1
    assert set.union(*tested) == ALL
    assert sum(map(len, tested)) == len(ALL)
    assert len({len(each) for each in tested}) == 1


def test_seed_and_other_datasets() -> None:
    assert names(folds(NUM=4, SEED=1), ENTRIES, train=False) != names(folds(NUM=4, SEED=2), ENTRIES, train=False)
    assert names(folds(NUM=4), ENTRIES, train=False, dataset="other") == ALL
    assert names(folds(), ENTRIES, train=True) == ALL
    assert image_keys(folds(NUM=2, GROUP="patient")) == ["patient"]
    assert image_keys(folds(NUM=2, GROUP="folder")) == image_keys(folds(GROUP="patient")) == []


def test_folds_that_cannot_be_are_refused() -> None:
    for options, said in (
        ({"NUM": 1}, "at least 2"),
        ({"NUM": 3, "FOLD": 3}, "FOLD 3"),
        ({"NUM": -1}, "at least 2"),
        ({"NUM": 2, "SEED": -1}, "SEED is -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_folds(folds(**options))
    apart = folds(NUM=2)
    apart.DATASETS.TEST = ("other",)
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST"):
        check_folds(apart)
    with pytest.raises(DatasetError, match=r"0/0\.png has no 'doctor'"):
        take_fold(folds(NUM=2, GROUP="doctor"), "mine", ENTRIES, train=True)
    with pytest.raises(DatasetError, match="has 4 groups"):
        take_fold(folds(NUM=5, GROUP="folder"), "mine", ENTRIES, train=True)


def order(size: int = 7, sampler: str = "TrainingSampler", threshold: float = 1.0) -> Iterable[int]:
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", threshold])
    check_sampler(cfg)
    entries = [{"annotations": [{"category_id": int(index == 0)}]} for index in range(size)]
    return endless_order(cfg, entries, seed=3)


def test_order_shuffles_every_pass() -> None:
    drawn = list(islice(order(), 14))
    first, second = drawn[:7], drawn[7:]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert list(islice(order(), 14)) == drawn


def test_rare_classes_are_repeated() -> None:
    # One image of 7 holds class 0, so it comes sqrt(7) times for each sqrt(7 / 6) times of another.
    drawn = list(islice(order(7, "RepeatFactorTrainingSampler"), 7000))
    assert drawn.count(0) / drawn.count(1) == pytest.approx(6**0.5, rel=0.1)


@pytest.mark.parametrize("groups", [(), (0, 1, 1, 0, 1, 0, 0)], ids=["plain", "grouped"])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_later_start_gives_the_rest(sampler: str, groups: tuple[int, ...]) -> None:
    def batches(first: int, number: int) -> list[Any]:
        options = {"batch_size": 4, "group_of": groups, "group_size": 2, "first": first}
        return list(islice(BatchSampler(order(7, sampler), **options), number))

    whole = batches(0, 30)
    assert batches(11, 19) == whole[11:]


@pytest.mark.parametrize("groups", [(), (0, 1, 1, 0, 1, 0, 0)], ids=["plain", "grouped"])
def test_processes_share_the_batches_of_one(groups: tuple[int, ...]) -> None:
    options = {"batch_size": 4, "group_of": groups, "group_size": 2}
    whole = list(islice(BatchSampler(order(), **options), 20))
    shares = [islice(BatchSampler(order(), rank=rank, num_processes=2, **options), 20) for rank in range(2)]
    assert [one + two for one, two in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_fixed_group_does_not_depend_on_the_processes(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 8
    assert images_in_a_group(cfg) == 8 // processes
    cfg.DATALOADER.ASPECT_RATIO_GROUP_SIZE = 4
    assert images_in_a_group(cfg) == 4
    cfg.DATALOADER.ASPECT_RATIO_GROUP_SIZE = 3
    with pytest.raises(ConfigError, match=r"ASPECT_RATIO_GROUP_SIZE is 3.*IMS_PER_BATCH \(8\)"):
        images_in_a_group(cfg)


def test_groups_wait_until_complete() -> None:
    batches = BatchSampler(cycle([0, 1, 2]), batch_size=2, group_of="aba", group_size=2)
    # Image 1 waits for itself: its places 1 and 4 come after places 0, 2 and 3.
    assert list(islice(batches, 3)) == [[(0, 0), (2, 2)], [(1, 1), (4, 1)], [(3, 0), (5, 2)]]


def test_incomplete_last_batch_is_dropped() -> None:
    assert list(BatchSampler(range(5), batch_size=2)) == [[(0, 0), (1, 1)], [(2, 2), (3, 3)]]


def draw_numbers(entry: int) -> tuple[Any, ...]:
    return entry, random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_place_alone_decides_on_augmentation(num_workers: int) -> None:
    samples = Samples([5, 6, 7], draw_numbers, seed=1)
    sampler = BatchSampler(cycle(range(3)), batch_size=2)
    loaded = list(islice(DataLoader(samples, batch_sampler=sampler, num_workers=num_workers, collate_fn=list), 4))
    assert loaded == [[samples[place, place % 3] for place in (2 * n, 2 * n + 1)] for n in range(4)]
    numbers = {number for batch in loaded for sample in batch for number in sample[1:]}
    assert len(numbers) == 8 * 3


def test_mapping_leaves_the_generators_of_the_process() -> None:
    seed_from(2, STEP, 0)
    expected = draw_numbers(0)
    seed_from(2, STEP, 0)
    Samples([5], draw_numbers, seed=1)[0, 0]
    assert draw_numbers(0) == expected


def test_image_that_the_mapper_skips_is_replaced() -> None:
    samples = Samples([5, 6, 7], lambda entry: entry if entry == 6 else None, seed=1)
    assert [samples[place, 0] for place in range(4)] == [6] * 4


def test_counters_give_different_numbers() -> None:
    drawn = set()
    for seed, *counters in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**40, 0, 0)]:
        with seeded(seed, *counters):
            drawn.add(draw_numbers(0))
    assert len(drawn) == 5


def labeled(*classes: list[int]) -> list[dict[str, Any]]:
    return [{"annotations": [{"category_id": each} for each in of_image]} for of_image in classes]


def drawn_by(entries: list[dict[str, Any]], number: int, **options: Any) -> list[int]:
    cfg = get_cfg()
    cfg.DATALOADER.merge_from_list([item for pair in options.items() for item in pair])
    order = endless_order(cfg, entries, seed=3)
    first = list(islice(order, number))
    assert list(islice(order, number)) == first  # so that a resumed run can skip what it has drawn
    return first


def test_classes_are_drawn_equally_often() -> None:
    entries = labeled([0], [0], [0], [0], [1], [0, 2], [])
    drawn = drawn_by(entries, 3000, SAMPLER_TRAIN="ClassBalancedSampler")
    # Class 1 has image 4 alone; class 2 has image 5 alone, which is one of five of class 0 as well.
    assert drawn.count(4) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert drawn.count(5) / 3000 == pytest.approx(1 / 3 + 1 / 15, abs=0.03)
    assert 6 not in drawn
    assert drawn.count(0) == pytest.approx(drawn.count(1), abs=2)


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler", "ClassBalancedSampler"])
def test_negatives_are_drawn_by_share(sampler: str) -> None:
    entries = labeled([0], [], [1], [], [], [0]) + [{"annotations": [{"category_id": 0, "iscrowd": 1}]}]
    options = {"SAMPLER_TRAIN": sampler, "FILTER_EMPTY_ANNOTATIONS": False}
    drawn = drawn_by(entries, 2000, NEGATIVE_SHARE=0.2, **options)
    assert sum(index in (1, 3, 4, 6) for index in drawn) / 2000 == pytest.approx(0.2, abs=0.03)
    assert set(drawn) == set(range(7))
    assert not set(drawn_by(entries, 100, NEGATIVE_SHARE=0.0, **options)) & {1, 3, 4, 6}


def test_share_that_cannot_be_drawn_is_refused() -> None:
    for options, said in (
        (["NEGATIVE_SHARE", 1.5], "NEGATIVE_SHARE is 1.5"),
        (["NEGATIVE_SHARE", 0.5], "FILTER_EMPTY_ANNOTATIONS"),
        (["SAMPLER_TRAIN", "Nope"], "ClassBalancedSampler"),
    ):
        cfg = get_cfg()
        cfg.DATALOADER.merge_from_list(options)
        with pytest.raises(ConfigError, match=said):
            check_sampler(cfg)
    cfg = get_cfg()
    cfg.DATALOADER.merge_from_list(["NEGATIVE_SHARE", 0.0, "FILTER_EMPTY_ANNOTATIONS", True])
    check_sampler(cfg)  # draws no image without objects
    with pytest.raises(ConfigError, match="no training image is without objects"):
        drawn_by(labeled([0]), 1, NEGATIVE_SHARE=0.5)


def test_own_sampler_is_named_by_key() -> None:
    def backwards(cfg: Any, entries: list[dict[str, Any]], seed: int) -> Iterable[int]:
        return given[0]

    given: list[Any] = [[2, 1, 0]]
    SAMPLER_REGISTRY.register(backwards)
    try:
        assert drawn_by(labeled([0], [1], [0]), 3, SAMPLER_TRAIN="backwards") == [2, 1, 0]
        for given[0], said in (
            ([0], "its end"),
            ([3], "gives 3; .* 3 images"),
            ([0.5], r"gives 0\.5"),
            (None, "NoneType"),
        ):
            with pytest.raises(ConfigError, match=rf"SAMPLER_TRAIN backwards .*{said}"):
                drawn_by(labeled([0], [1], [0]), 3, SAMPLER_TRAIN="backwards")
    finally:
        del SAMPLER_REGISTRY._obj_map["backwards"]
    with pytest.raises(ConfigError, match="REPEAT_THRESHOLD is -1"):
        order(sampler="RepeatFactorTrainingSampler", threshold=-1.0)
