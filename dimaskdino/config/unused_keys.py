"""Keys that nothing here reads: a warning when one is set."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode

from dimaskdino.config.reader import flatten, get_cfg, own_keys

logger = logging.getLogger(__name__)

# detectron2's keys and nodes that no part of the package reads, and no part of detectron2 that the package uses.
UNREAD = (
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "GLOBAL",
    "INPUT.MASK_FORMAT",
    "MODEL.ANCHOR_GENERATOR",
    "MODEL.KEYPOINT_ON",
    "MODEL.LOAD_PROPOSALS",
    "MODEL.MASK_ON",
    "MODEL.PANOPTIC_FPN",
    "MODEL.PROPOSAL_GENERATOR",
    "MODEL.RETINANET",
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.ROI_BOX_HEAD",
    "MODEL.ROI_HEADS",
    "MODEL.ROI_KEYPOINT_HEAD",
    "MODEL.ROI_MASK_HEAD",
    "MODEL.RPN",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.WEIGHT_DECAY_BIAS",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "VIS_PERIOD",
)
# What each backbone reads of the keys that belong to some backbones only; a user's own backbone may read any of them.
_RESNET = ("MODEL.RESNETS", "MODEL.BACKBONE.FREEZE_AT")
_READ_BY_BACKBONE = {
    "build_resnet_backbone": _RESNET,
    "build_resnet_fpn_backbone": (*_RESNET, "MODEL.FPN"),
    "build_retinanet_resnet_fpn_backbone": (*_RESNET, "MODEL.FPN"),
    "D2SwinTransformer": ("MODEL.SWIN",),
    "build_timm_backbone": ("MODEL.TIMM",),
    "build_vit_backbone": ("MODEL.VIT",),
}
_OF_BACKBONES = {key for keys in _READ_BY_BACKBONE.values() for key in keys}
# Configurations of other backbones inherit these from a ResNet's, and a FREEZE_AT of 0 freezes nothing anyway.
_INHERITED = {"MODEL.RESNETS.OUT_FEATURES", "MODEL.RESNETS.STRIDE_IN_1X1"}


def report_unused_keys(cfg: CfgNode) -> None:
    """Warn of all keys that are set, that is, differ from their defaults, and have no effect."""
    defaults = dict(flatten(get_cfg()))
    unused = [f"{key} {value!r}" for key, value in _unused(cfg) if value != defaults.get(key)]
    if unused:
        logger.warning("These keys have no effect on this model: %s.", ", ".join(unused))
    if any(".NUM_CLASSES " in entry for entry in unused):
        logger.warning("The number of classes is MODEL.SEM_SEG_HEAD.NUM_CLASSES.")


def _unused(cfg: CfgNode) -> Iterator[tuple[str, object]]:
    unread = {*UNREAD}
    if cfg.MODEL.BACKBONE.NAME in _READ_BY_BACKBONE:
        unread |= _OF_BACKBONES - {*_READ_BY_BACKBONE[cfg.MODEL.BACKBONE.NAME]}
    if cfg.MODEL.META_ARCHITECTURE == "DINO":
        own = [name for name in cfg.MODEL.SEM_SEG_HEAD if name != "NUM_CLASSES"]
        unread |= {"MODEL.MaskDINO", *(f"MODEL.SEM_SEG_HEAD.{name}" for name in own)}
    elif cfg.MODEL.META_ARCHITECTURE in ("MaskDINO", "DIMaskDINO"):
        unread |= {"MODEL.DINO"}
    if cfg.SOLVER.OPTIMIZER == "ADAMW":
        unread |= {"SOLVER.MOMENTUM", "SOLVER.NESTEROV"}
    if not cfg.TEST.AUG.ENABLED:
        unread |= {"TEST.AUG"}
    registered = own_keys()  # Only their module knows whether it reads them.
    for key, value in flatten(cfg):
        if key in registered:
            continue
        below_unread = any(f"{key}.".startswith(f"{node}.") for node in unread)
        if below_unread and key not in _INHERITED and (key, value) != ("MODEL.BACKBONE.FREEZE_AT", 0):
            yield key, value
