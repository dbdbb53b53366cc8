"""Cross-validation by key."""

from typing import Any

import pytest

from dimaskdino.config import Config, get_cfg
from dimaskdino.data.orders import check_folds, image_keys, take_fold
from dimaskdino.errors import ConfigError, DatasetError


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
    for options, said in (({"NUM": 1}, "at least 2"), ({"NUM": 3, "FOLD": 3}, "FOLD 3"), ({"NUM": -1}, "at least 2")):
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
