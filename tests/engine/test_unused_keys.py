"""Keys of detectron2 that would silently do nothing."""

import pytest

from dimaskdino.config import Config, get_cfg
from dimaskdino.engine.unused_keys import report_unused_keys
from dimaskdino.errors import ConfigError


def configured(*options: object) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["SOLVER.BIAS_LR_FACTOR", 2.0], "SOLVER.BIAS_LR_FACTOR is 2.0, which has no effect here."),
        (["SOLVER.WEIGHT_DECAY_BIAS", 0.5], "SOLVER.WEIGHT_DECAY_BIAS is 0.5, "),
        (["VIS_PERIOD", 100], "VIS_PERIOD is 100, "),
        (["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.BACKBONE.FREEZE_AT", 3], "FREEZE_AT is 3, "),
    ],
    ids=str,
)
def test_a_key_that_nothing_follows_is_told_where_it_is_set(options, words, caplog) -> None:
    report_unused_keys(configured(*options))
    assert [words in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["SOLVER.WEIGHT_DECAY_BIAS", None],  # as a newer detectron2 has it
        ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 3],
        ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.BACKBONE.FREEZE_AT", 0],
    ],
    ids=str,
)
def test_nothing_is_told_of_keys_with_an_effect_or_at_their_defaults(options, caplog) -> None:
    report_unused_keys(configured(*options))
    assert caplog.records == []


def test_test_time_augmentation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"TEST\.AUG\.ENABLED"):
        report_unused_keys(configured("TEST.AUG.ENABLED", True))
