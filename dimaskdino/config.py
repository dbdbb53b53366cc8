"""Every configuration key of dimaskdino, on top of detectron2's own.

Keys of the two public releases (MaskDINO and DI-MaskDINO) keep their names, so that their YAML files load unchanged.
Keys without effect on instance segmentation are listed in :data:`IGNORED_KEYS`: accepted, dropped and reported once.
So are keys that only a newer detectron2 has (:data:`dimaskdino.compat.NEWER_KEYS`), at the values that change nothing.
"""

import difflib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import detectron2
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from dimaskdino.compat import NEWER_KEYS
from dimaskdino.errors import ConfigError
from dimaskdino.yaml_files import read_yaml

logger = logging.getLogger(__name__)

# Keys of the releases that nothing there read (the decoder's own default was used, or the code path was never built),
# and those that act on semantic and panoptic results alone, which this package does not compute.
IGNORED_KEYS = frozenset(
    {
        "Default_loading",
        "DATASETS.TEST_PANOPTIC",
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA",
        "INPUT.SIZE_DIVISIBILITY",
        "MODEL.RESNETS.RES4_DILATION",
        "MODEL.RESNETS.RES5_MULTI_GRID",
        "MODEL.RESNETS.STEM_TYPE",
        "MODEL.MaskDINO.ENC_LAYERS",
        "MODEL.MaskDINO.EVAL_FLAG",
        "MODEL.MaskDINO.NO_OBJECT_WEIGHT",
        "MODEL.MaskDINO.PANO_BOX_LOSS",
        "MODEL.MaskDINO.PRED_CONV",
        "MODEL.MaskDINO.PRE_NORM",
        "MODEL.MaskDINO.TEST.OBJECT_MASK_THRESHOLD",
        "MODEL.MaskDINO.TEST.OVERLAP_THRESHOLD",
        "MODEL.MaskDINO.TEST.PANO_TEMPERATURE",
        "MODEL.MaskDINO.TEST.PANO_TRANSFORM_EVAL",
        "MODEL.MaskDINO.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE",
        "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS",
        "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS",
        "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT",
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS",
        "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
        "MODEL.SEM_SEG_HEAD.NUM_FEATURE_LEVELS",
        "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS",
        "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES",
        "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
    }
)


class Config(CfgNode):
    """detectron2's CfgNode that reads safe YAML only and says clearly what is wrong with a key.

    Raises:
        ConfigError: for an unknown key (naming the closest known one), a value of the wrong type, unreadable YAML.
    """

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file and the files that its ``_BASE_`` names; YAML that runs code is refused."""
        if allow_unsafe:
            raise ConfigError(f"{cfg_filename}: unsafe YAML is not supported; write the value as plain YAML.")
        loaded = read_yaml(str(cfg_filename))
        loaded.pop("VERSION", None)
        try:
            self.merge_from_other_cfg(type(self)(loaded))
        except (ConfigError, AssertionError) as error:
            # yacs asserts that values are of its types, which a date of YAML is not.
            raise ConfigError(f"{cfg_filename}: {_one_line(error)}") from error

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        """Merge another tree of keys."""
        given = dict(_flatten(cfg_other))
        self._merge_pairs(given)

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` as the command line gives it."""
        flags = [option for option in cfg_list if str(option).startswith("--")]
        if flags:
            raise ConfigError(f"{flags[0]} comes after KEY VALUE pairs; flags stand before them.")
        if len(cfg_list) % 2:
            raise ConfigError(f"Options come as KEY VALUE pairs, but {cfg_list[-1]!r} stands alone.")
        self._merge_pairs(dict(zip(cfg_list[::2], cfg_list[1::2], strict=True)))

    def _merge_pairs(self, pairs: dict[str, Any]) -> None:
        known = dict(_flatten(self))
        ignored = sorted(key for key in pairs if key in IGNORED_KEYS and key not in known)
        newer = sorted(key for key in pairs if key in NEWER_KEYS and key not in known)
        for key in newer:
            _check_newer(key, self._decode_cfg_value(pairs[key]))
        _report_left_out(tuple(ignored), "no effect on instance segmentation in the releases either")
        _report_left_out(tuple(newer), "the installed detectron2 has no such key and does what the value asks for")
        for key, value in pairs.items():
            if key in ignored or key in newer:
                continue
            if key not in known:
                raise ConfigError(_unknown_key_message(key, list(known)))
            try:
                super().merge_from_list([key, value])
            except (ValueError, AssertionError, KeyError) as error:
                raise ConfigError(f"Cannot set {key} to {value!r}: {_one_line(error)}") from error


def _flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf; an empty node is a leaf so that no key is lost."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, CfgNode) and len(value):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unknown_key_message(key: str, known: list[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    closest = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[closest[0]]}?" if closest else " See dimaskdino/config.py for all keys."
    return f"Unknown configuration key {key}.{hint}"


def _check_newer(key: str, value: Any) -> None:
    """Refuse a value that the installed detectron2, which does not know the key, would not follow."""
    if value != NEWER_KEYS[key]:
        raise ConfigError(
            f"Cannot set {key} to {value!r}: detectron2 {detectron2.__version__} has no such key and always works as "
            f"with {NEWER_KEYS[key]!r}. Leave the key out or install a newer detectron2."
        )


@functools.cache
def _report_left_out(keys: tuple[str, ...], reason: str) -> None:
    if keys:
        logger.info("Accepted and ignored (%s): %s", reason, ", ".join(keys))


def get_cfg() -> Config:
    """detectron2's defaults plus every key of dimaskdino.

    Returns:
        A fresh, unfrozen :class:`Config`.
    """
    cfg = Config(get_detectron2_cfg())
    add_dimaskdino_config(cfg)
    return cfg


def add_dimaskdino_config(cfg: CfgNode) -> None:
    """Add the keys of dimaskdino to ``cfg`` in place."""
    _add_data_keys(cfg)
    _add_solver_keys(cfg)
    _add_encoder_keys(cfg)
    _add_decoder_keys(cfg)
    _add_module_keys(cfg)
    _add_inference_keys(cfg)
    _add_backbone_keys(cfg)


def _add_data_keys(cfg: CfgNode) -> None:
    # Training mapper by its registered name: coco_instance_lsj or coco_instance_detr.
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    # Photometric distortion of SSD before the geometric augmentations.
    cfg.INPUT.COLOR_AUG_SSD = False
    # Large-scale jitter: side of the square canvas in pixels, and the range of the random scale.
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0

    # Turn photos upright as their EXIF orientation says; False reads the pixels as stored, for labels drawn on those.
    cfg.INPUT.APPLY_EXIF = True
    # Refuse a dataset of which training would drop more than this share of the objects, or all objects of a class,
    # because nothing of them is in their image; 1 accepts any loss. Crowd regions do not count.
    cfg.DATASETS.MAX_DROPPED_SHARE = 0.1

    # Train and evaluate on the first images of each list of datasets only, to try things; 0 means all.
    cfg.DATASETS.MAX_IMAGES = 0
    cfg.DATASETS.SHAPES = CfgNode()
    # Folder of the synthetic dataset; "" means $DETECTRON2_DATASETS/shapes (or datasets/shapes).
    cfg.DATASETS.SHAPES.ROOT = ""
    # Images per split, side of the square images in pixels, and the seed that they are drawn from.
    cfg.DATASETS.SHAPES.NUM_TRAIN = 2000
    cfg.DATASETS.SHAPES.NUM_VAL = 200
    cfg.DATASETS.SHAPES.IMAGE_SIZE = 128
    cfg.DATASETS.SHAPES.SEED = 0


def _add_solver_keys(cfg: CfgNode) -> None:
    # Precision of float32 matrix products: highest, high (TF32 on GPUs that have it), medium, or "" for torch's own
    # choice. Newer detectron2 has this key too.
    cfg.FLOAT32_PRECISION = ""
    # ADAMW or SGD.
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Factor on the learning rate of every parameter whose module name holds "backbone".
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Weight decay of nn.Embedding weights.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    # Polynomial schedule of the releases' semantic configurations (SOLVER.LR_SCHEDULER_NAME WarmupPolyLR).
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0


def _add_encoder_keys(cfg: CfgNode) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    # Registered name of the pixel decoder (the paper's encoder).
    head.PIXEL_DECODER_NAME = "MaskDINOEncoder"
    # Backbone features that the deformable encoder attends over.
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    # Levels after adding stride-2 convolutions of the coarsest feature.
    head.TOTAL_NUM_FEATURE_LEVELS = 4
    # Order of the levels inside the encoder: low2high (finest level first) or high2low (coarsest level first).
    head.FEATURE_ORDER = "high2low"
    # Hidden width of the encoder's feed-forward blocks, its number of layers, channels of the mask features.
    head.DIM_FEEDFORWARD = 1024
    head.TRANSFORMER_ENC_LAYERS = 0
    head.MASK_DIM = 256


def _add_decoder_keys(cfg: CfgNode) -> None:
    cfg.MODEL.MaskDINO = CfgNode()
    node = cfg.MODEL.MaskDINO
    # Registered name of the decoder: DIMaskDINODecoder, or MaskDINODecoder (the same with DI and BATO off).
    node.TRANSFORMER_DECODER_NAME = "MaskDINODecoder"
    # Loss weights.
    node.CLASS_WEIGHT = 4.0
    node.DICE_WEIGHT = 5.0
    node.MASK_WEIGHT = 5.0
    node.BOX_WEIGHT = 5.0
    node.GIOU_WEIGHT = 2.0
    # Matching cost weights.
    node.COST_CLASS_WEIGHT = 4.0
    node.COST_DICE_WEIGHT = 5.0
    node.COST_MASK_WEIGHT = 5.0
    node.COST_BOX_WEIGHT = 5.0
    node.COST_GIOU_WEIGHT = 2.0
    # Whether boxes are supervised, and whether every layer is.
    node.BOX_LOSS = True
    node.DEEP_SUPERVISION = True
    # Class head with a no-object logit, as the releases' semantic models have it; they load, but do not train here.
    node.SEMANTIC_CE_LOSS = False
    # Attention heads, width, feed-forward width, dropout (encoder only, as in the releases).
    node.NHEADS = 8
    node.HIDDEN_DIM = 256
    node.DIM_FEEDFORWARD = 2048
    node.DROPOUT = 0.1
    # Project the encoder's levels by a 1x1 convolution although their width fits.
    node.ENFORCE_INPUT_PROJ = False
    # Decoder layers, layer 0 (Eq. 4) included.
    node.DEC_LAYERS = 6
    # Queries that the decoder refines; the last selection keeps this many tokens.
    node.NUM_OBJECT_QUERIES = 100
    # Queries from selected tokens (two-stage) or learned ones; learned content on top of selected boxes.
    node.TWO_STAGE = True
    node.LEARN_TGT = False
    # Predict from the queries before layer 0 as well.
    node.INITIAL_PRED = True
    # First boxes of the queries: no (box head), mask2box or bitmask (from the predicted mask).
    node.INITIALIZE_BOX_TYPE = "no"
    # Denoising: no, standard (class and box) or seg (mask as well); noise scale; number of denoising queries.
    node.DN = "seg"
    node.DN_NOISE_SCALE = 0.4
    node.DN_NUM = 100
    # Points of the mask losses and the matcher; oversampling and share of the most uncertain ones (PointRend).
    node.TRAIN_NUM_POINTS = 112 * 112
    node.OVERSAMPLE_RATIO = 3.0
    node.IMPORTANCE_SAMPLE_RATIO = 0.75


def _add_module_keys(cfg: CfgNode) -> None:
    node = cfg.MODEL.MaskDINO
    # De-Imbalance (Eqs. 1-4): tokens of the first selection, token-interaction layers.
    node.FIRST_SELECTED_QUERIES = 600
    node.TI_LAYERS = 2
    node.DI = CfgNode()
    node.DI.NAME = "DeImbalance"
    node.DI.ENABLED = True
    # Tokens that each selection keeps; [] means [FIRST_SELECTED_QUERIES, NUM_OBJECT_QUERIES].
    node.DI.NUM_SELECTED = []
    # Draw the position part of the decoder's queries at random (Table 3, with or without DI).
    node.DI.RANDOM_POSITION = False
    # Supervise token interaction on the box refined once; the release applies the shared box head twice.
    node.DI.SINGLE_DELTA_BOXES = False
    # Balance-Aware Tokens Optimization (Eqs. 5-8): number of guiding tokens.
    node.NUM_GUIDING_TOKENS = 50
    node.BATO = CfgNode()
    node.BATO.NAME = "BalanceAwareTokensOptimization"
    node.BATO.ENABLED = True
    # Tokens that guide: q_bal, t_s2, t_s1, or t_i (De-Imbalance off), as in Table 5.
    node.BATO.GUIDANCE = "q_bal"
    # Guiding token generation; without it the selected queries themselves guide (Table 6).
    node.BATO.GTG = True


def _add_inference_keys(cfg: CfgNode) -> None:
    # Stages whose results evaluation reports besides the final one: [] none, ["all"], or names such as "layer.0".
    cfg.TEST.EVAL_LAYERS = []
    # Pad images to a multiple of this many pixels.
    cfg.MODEL.MaskDINO.SIZE_DIVISIBILITY = 32
    node = CfgNode()
    cfg.MODEL.MaskDINO.TEST = node
    # Score instances by class alone (True) or by class times mask quality (False). The spelling is the releases'.
    node.TEST_FOUCUS_ON_BOX = False
    # Instance results are the ones this package computes; the other two only tell which class head a release's
    # semantic or panoptic model has.
    node.INSTANCE_ON = True
    node.SEMANTIC_ON = True
    node.PANOPTIC_ON = False


def _add_backbone_keys(cfg: CfgNode) -> None:
    # Any timm backbone with features_only (MODEL.BACKBONE.NAME build_timm_backbone).
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "resnet50"
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0

    # The releases' Swin (MODEL.BACKBONE.NAME D2SwinTransformer).
    cfg.MODEL.SWIN = CfgNode()
    cfg.MODEL.SWIN.PRETRAIN_IMG_SIZE = 224
    cfg.MODEL.SWIN.PATCH_SIZE = 4
    cfg.MODEL.SWIN.EMBED_DIM = 96
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    cfg.MODEL.SWIN.QKV_BIAS = True
    cfg.MODEL.SWIN.QK_SCALE = None
    cfg.MODEL.SWIN.DROP_RATE = 0.0
    cfg.MODEL.SWIN.ATTN_DROP_RATE = 0.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.3
    cfg.MODEL.SWIN.APE = False
    cfg.MODEL.SWIN.PATCH_NORM = True
    cfg.MODEL.SWIN.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SWIN.USE_CHECKPOINT = False
