"""The kinds of files that the releases bring besides those recorded: they load, and build the same parameters.

What is expected of a kind follows from the recorded R50 model by the rules of the releases: the width of a projection,
the number of levels in the deformable attention, classes, queries. Names are the releases'.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from detectron2.modeling import build_model

import dimaskdino.modeling.meta_arch  # noqa: F401  (registers the model)
from dimaskdino.checkpoint import to_release
from dimaskdino.config import get_cfg
from tests.parity.releases import release

ENCODER = "sem_seg_head.pixel_decoder."
DECODER = "sem_seg_head.predictor."
RECORDED = "maskdino_r50_50ep"
Shapes = dict[str, list[int]]

BASE = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: MaskDINO
  DEVICE: cpu
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 0}
  RESNETS:
    STEM_TYPE: "basic"  # without effect
    STRIDE_IN_1X1: False
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
    RES5_MULTI_GRID: [1, 1, 1]  # without effect
  SEM_SEG_HEAD:
    NAME: MaskDINOHead
    NUM_CLASSES: 80
    CONVS_DIM: 256
    NUM_FEATURE_LEVELS: 3  # without effect
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    TRANSFORMER_ENC_LAYERS: 6
  MaskDINO:
    NUM_OBJECT_QUERIES: 300
    DEC_LAYERS: 9  # the prediction before layer 0 comes on top
    TEST: {SEMANTIC_ON: False, INSTANCE_ON: True, PANOPTIC_ON: False}
SOLVER:
  STEPS: (30, 40)
  MAX_ITER: 50
"""

THREE_LEVELS = """
MODEL:
  SEM_SEG_HEAD: {TOTAL_NUM_FEATURE_LEVELS: 3, DIM_FEEDFORWARD: 1024}
  MaskDINO: {INITIALIZE_BOX_TYPE: "bitmask"}
"""
FIVE_LEVELS = """
MODEL:
  SEM_SEG_HEAD: {TOTAL_NUM_FEATURE_LEVELS: 5, DIM_FEEDFORWARD: 1024}
  MaskDINO: {INITIALIZE_BOX_TYPE: 'no', EVAL_FLAG: 1}
"""
FOUR_FEATURES = """
MODEL:
  SEM_SEG_HEAD:
    TOTAL_NUM_FEATURE_LEVELS: 4
    DIM_FEEDFORWARD: 2048
    FEATURE_ORDER: "low2high"
    DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res2","res3", "res4", "res5"]
"""
PANOPTIC = """
MODEL:
  SEM_SEG_HEAD: {NUM_CLASSES: 133, TOTAL_NUM_FEATURE_LEVELS: 4, DIM_FEEDFORWARD: 2048, FEATURE_ORDER: low2high}
  MaskDINO:
    PANO_BOX_LOSS: False
    TEST: {SEMANTIC_ON: True, INSTANCE_ON: True, PANOPTIC_ON: True, OVERLAP_THRESHOLD: 0.8, OBJECT_MASK_THRESHOLD: 0.25}
INPUT: {DATASET_MAPPER_NAME: "coco_panoptic_lsj"}
DATASETS: {TRAIN: [coco_2017_train_panoptic], TEST: [coco_2017_val_panoptic_with_sem_seg]}
"""
SEMANTIC = """
MODEL:
  SEM_SEG_HEAD: {NUM_CLASSES: 19, TOTAL_NUM_FEATURE_LEVELS: 3, DIM_FEEDFORWARD: 1024}
  MaskDINO:
    NUM_OBJECT_QUERIES: 100
    TWO_STAGE: False
    SEMANTIC_CE_LOSS: True
    TEST: {SEMANTIC_ON: True, INSTANCE_ON: False}
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: (512, 1024)
    SINGLE_CATEGORY_MAX_AREA: 1.0
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: -1
  DATASET_MAPPER_NAME: "mask_former_semantic"
SOLVER: {LR_SCHEDULER_NAME: WarmupMultiStepLR, BIAS_LR_FACTOR: 1.0, WARMUP_METHOD: linear}
TEST: {AUG: {ENABLED: False, MIN_SIZES: [512, 768], MAX_SIZE: 4096, FLIP: True}}
"""
SWIN_L = """
MODEL:
  BACKBONE: {NAME: "D2SwinTransformer"}
  SWIN:
    EMBED_DIM: 192
    DEPTHS: [ 2, 2, 18, 2 ]
    NUM_HEADS: [ 6, 12, 24, 48 ]
    WINDOW_SIZE: 12
    APE: False
    PATCH_NORM: True
    PRETRAIN_IMG_SIZE: 384
  SEM_SEG_HEAD:
    TOTAL_NUM_FEATURE_LEVELS: 5
    DIM_FEEDFORWARD: 2048
    FEATURE_ORDER: "low2high"
    DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res2","res3", "res4", "res5"]
"""


@dataclass(frozen=True)
class Kind:
    """What a kind of file changes.

    Attributes:
        text: of the file.
        widths: of the features that become tokens, in the order in which the releases number their projections.
        levels: with those made by further convolutions.
        encoder_ffn: hidden width of the encoder's feed-forward blocks.
        classes: K.
        logits: of the class head.
        learned_queries: their number in a one-stage model, else 0.
        lateral_width: channels of res2.
    """

    text: str
    widths: tuple[int, ...]
    levels: int
    encoder_ffn: int = 2048
    classes: int = 80
    logits: int = 80
    learned_queries: int = 0
    lateral_width: int = 256


KINDS = {
    "three levels, coarsest first": Kind(THREE_LEVELS, (2048, 1024, 512), 3, encoder_ffn=1024),
    "five levels, coarsest first": Kind(FIVE_LEVELS, (2048, 1024, 512), 5, encoder_ffn=1024),
    "four features": Kind(FOUR_FEATURES, (256, 512, 1024, 2048), 4),
    "panoptic": Kind(PANOPTIC, (512, 1024, 2048), 4, classes=133, logits=133),
    "semantic": Kind(SEMANTIC, (2048, 1024, 512), 3, 1024, classes=19, logits=20, learned_queries=100),
    "Swin-L": Kind(SWIN_L, (192, 384, 768, 1536), 5, lateral_width=192),
}


def projections(widths: tuple[int, ...], levels: int) -> Shapes:
    """1x1 convolutions of the features, then 3x3 ones of the widest and of each other."""
    kernels = [[256, width, 1, 1] for width in widths]
    kernels += [[256, max(widths) if i == 0 else 256, 3, 3] for i in range(levels - len(widths))]
    shapes: Shapes = {}
    for index, kernel in enumerate(kernels):
        prefix = f"{ENCODER}input_proj.{index}."
        shapes |= {f"{prefix}0.weight": kernel, f"{prefix}0.bias": [256]}
        shapes |= {f"{prefix}1.weight": [256], f"{prefix}1.bias": [256]}
    return shapes


def expected_shape(key: str, shape: list[int], kind: Kind) -> list[int]:
    """What the recorded ``shape`` becomes."""
    sizes = {
        ENCODER + "transformer.level_embed": [kind.levels, 256],
        ENCODER + "adapter_1.weight": [256, kind.lateral_width, 1, 1],
        DECODER + "class_embed.weight": [kind.logits, 256],
        DECODER + "class_embed.bias": [kind.logits],
        DECODER + "label_enc.weight": [kind.classes, 256],
        "criterion.empty_weight": [kind.classes + 1],
    }
    if key in sizes:
        return sizes[key]
    if "sampling_offsets" in key or "attention_weights" in key:
        # Recorded with four levels.
        return [shape[0] // 4 * kind.levels, *shape[1:]]
    if key.startswith(ENCODER) and ("linear1" in key or "linear2" in key):
        return [kind.encoder_ffn if size == 2048 else size for size in shape]
    return shape


def expected_head(kind: Kind) -> Shapes:
    """Everything but the backbone."""
    left_out = ("backbone.", ENCODER + "input_proj.")
    if kind.learned_queries:
        left_out += (DECODER + "enc_output",)
    shapes = {
        key: expected_shape(key, shape, kind)
        for key, shape in release(RECORDED).keys.items()
        if not key.startswith(left_out)
    }
    if kind.learned_queries:
        shapes[DECODER + "query_feat.weight"] = [kind.learned_queries, 256]
        shapes[DECODER + "query_embed.weight"] = [kind.learned_queries, 4]
    return shapes | projections(kind.widths, kind.levels)


def built(text: str, folder: Path) -> Shapes:
    """The releases' names and shapes of the model that a file with BASE as its base gives."""
    (folder / "base.yaml").write_text(BASE)
    (folder / "mine.yaml").write_text(f"_BASE_: base.yaml\n{text}")
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "mine.yaml"))
    return {key: list(value.shape) for key, value in to_release(build_model(cfg).state_dict()).items()}


def head(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith("backbone.")}


def backbone(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key.startswith("backbone.")}


def test_the_rules_give_what_was_recorded():
    assert expected_head(Kind("", (512, 1024, 2048), 4)) == head(release(RECORDED).keys)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_each_kind_builds_exactly_the_releases_parameters(name, tmp_path):
    shapes = built(KINDS[name].text, tmp_path)
    assert head(shapes) == expected_head(KINDS[name])
    if name != "Swin-L":
        assert backbone(shapes) == backbone(release(RECORDED).keys)


def test_synchronized_batch_norm_adds_its_counters_alone(tmp_path):
    text = yaml.safe_dump({"MODEL": {"RESNETS": {"NORM": "SyncBN"}, "SEM_SEG_HEAD": {"TRANSFORMER_ENC_LAYERS": 0}}})
    recorded = backbone(release(RECORDED).keys)
    counters = {
        key.replace("running_mean", "num_batches_tracked"): [] for key in recorded if key.endswith("running_mean")
    }
    assert backbone(built(text, tmp_path)) == recorded | counters


def test_swin_l_has_the_releases_size_and_names(tmp_path):
    shapes = backbone(built(SWIN_L, tmp_path))
    last = "backbone.layers.2.blocks.17."
    assert shapes[last + "attn.relative_position_bias_table"] == [23 * 23, 24]
    assert shapes[last + "attn.relative_position_index"] == [144, 144]
    assert shapes[last + "mlp.fc1.weight"] == [4 * 768, 768]
    assert shapes["backbone.layers.2.downsample.reduction.weight"] == [2 * 768, 4 * 768]
    assert shapes["backbone.norm3.weight"] == [1536]
    # 24 blocks of 14 tensors, 3 mergings of 3, 4 norms of 2, the embedding's 4.
    assert len(shapes) == 24 * 14 + 3 * 3 + 4 * 2 + 4
