"""Keys that detectron2 has and nothing here follows: told where they are set."""

import functools
import logging
from typing import Any

from detectron2.config import CfgNode

from dimaskdino.config import get_cfg
from dimaskdino.errors import ConfigError

logger = logging.getLogger(__name__)

WITHOUT_EFFECT = (
    "MODEL.KEYPOINT_ON",
    "MODEL.LOAD_PROPOSALS",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.WEIGHT_DECAY_BIAS",
    "VIS_PERIOD",
)
FREEZE_AT = "MODEL.BACKBONE.FREEZE_AT"
NEVER_FROZEN = ("D2SwinTransformer", "build_timm_backbone")


def report_unused_keys(cfg: CfgNode) -> None:
    """Warn of keys that are not at their defaults and have no effect.

    Raises:
        ConfigError: test-time augmentation is asked for; results without it would pass for results with it.
    """
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED is True, but there is no test-time augmentation here; set it to False.")
    defaults = get_cfg()
    keys = [key for key in WITHOUT_EFFECT if _value(cfg, key) not in (None, _value(defaults, key))]
    # 0 freezes nothing, and the default cannot be told from a wish.
    if cfg.MODEL.BACKBONE.NAME in NEVER_FROZEN and _value(cfg, FREEZE_AT) not in (0, _value(defaults, FREEZE_AT)):
        keys.append(FREEZE_AT)
    for key in keys:
        logger.warning("%s is %s, which has no effect here.", key, _value(cfg, key))


def _value(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)
