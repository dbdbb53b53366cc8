"""Keys that would silently do nothing."""

import inspect
import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.data import build as data_build
from detectron2.engine import defaults
from detectron2.modeling.backbone import fpn, resnet
from detectron2.solver import build as solver_build

from dimaskdino.config import KEYS, Config, flatten, get_cfg
from dimaskdino.config.unused_keys import UNREAD, report_unused_keys

ROOT = Path(__file__).parents[2]
CONFIG_FILES = sorted((ROOT / "configs").rglob("*.yaml"))


MODEL_NAMES = ("MODEL.BACKBONE.NAME", "MODEL.META_ARCHITECTURE")


def configured(*options: object) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize(
    "options",
    [
        ["SOLVER.BIAS_LR_FACTOR", 2.0],
        ["SOLVER.WEIGHT_DECAY_BIAS", 0.5, "VIS_PERIOD", 100],
        ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9],
        ["MODEL.RPN.NMS_THRESH", 0.5, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.3, "TEST.AUG.FLIP", False],
        ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.BACKBONE.FREEZE_AT", 3, "MODEL.RESNETS.DEPTH", 101],
        ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.TIMM.NAME", "resnet18"],
        ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.SWIN.EMBED_DIM", 8, "MODEL.FPN.NORM", "BN"],
        ["SOLVER.MOMENTUM", 0.5],
        ["MODEL.META_ARCHITECTURE", "DINO", "MODEL.MaskDINO.DN_NUM", 50, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32],
        ["MODEL.META_ARCHITECTURE", "DIMaskDINO", "MODEL.DINO.NUM_QUERIES", 50],
    ],
    ids=str,
)
def test_one_warning_lists_all_unused_keys(options: list[object], caplog: pytest.LogCaptureFixture) -> None:
    report_unused_keys(configured(*options))
    (warning,) = [record.getMessage() for record in caplog.records]
    pairs = [*zip(options[::2], options[1::2], strict=True)]
    expected = {f"{key} {value!r}" for key, value in pairs if key not in MODEL_NAMES}
    assert set(warning.partition(": ")[2].rstrip(".").split(", ")) == expected


def test_another_models_number_of_classes_points_to_ours(caplog: pytest.LogCaptureFixture) -> None:
    report_unused_keys(configured("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.RETINANET.NUM_CLASSES", 2))
    assert "MODEL.ROI_HEADS.NUM_CLASSES 2" in caplog.text
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.5],
        ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 3, "MODEL.RESNETS.DEPTH", 18],
        ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.NORM", "BN"],
        ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.SWIN.EMBED_DIM", 8],
        ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet18"],
        ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,)],
        ["MODEL.BACKBONE.NAME", "MyOwn", "MODEL.RESNETS.DEPTH", 18, "MODEL.SWIN.EMBED_DIM", 8],
    ],
    ids=str,
)
def test_keys_with_an_effect_cause_no_warning(options: list[object], caplog: pytest.LogCaptureFixture) -> None:
    report_unused_keys(configured(*options))
    assert caplog.records == []


def test_configurations_here_set_no_unused_keys(caplog: pytest.LogCaptureFixture) -> None:
    for file in CONFIG_FILES:
        cfg = get_cfg()
        cfg.merge_from_file(str(file))
        report_unused_keys(cfg)
        assert caplog.records == [], file


def source_here() -> str:
    files = (ROOT / "dimaskdino").rglob("*.py")
    return "\n".join(file.read_text() for file in files if file.parent.name != "config" and file.stem != "compat")


def is_read(key: str, source: str) -> bool:
    return re.search(rf"\.{key.rsplit('.', 1)[-1]}\b", source) is not None


def test_every_key_of_detectron2_is_read_or_listed() -> None:
    parts = [data_build, defaults.DefaultTrainer, fpn, resnet, solver_build]
    source = "\n".join([*map(inspect.getsource, parts), source_here()])
    keys = [key for key, _ in flatten(get_detectron2_cfg()) if key != "VERSION" and not key.startswith(UNREAD)]
    assert [key for key in keys if not is_read(key, source)] == []


def test_listed_keys_are_read_nowhere() -> None:
    # A name that ends one of our own keys as well may be read there.
    ours = tuple(key.rsplit(".", 1)[-1] for key in KEYS)
    assert [key for key in UNREAD if not key.endswith(ours) and is_read(key, source_here())] == []
