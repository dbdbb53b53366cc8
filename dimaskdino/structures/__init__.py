"""The values that flow between the parts of a model."""

from dimaskdino.structures.predictions import (
    DecoderOutput,
    DenoisingQueries,
    MaskLogits,
    Matches,
    StagePrediction,
    group_by_mask_features,
    mask_logits,
    on_cpu,
)
from dimaskdino.structures.rle_masks import RleMasks, instances_to_coco
from dimaskdino.structures.stages import Stage, decoder_stages, is_final_loss
from dimaskdino.structures.targets import JoinedTargets, Targets
from dimaskdino.structures.tokens import EncoderOutput, FeatureTokens, Tokens, flatten_levels, highest_scores, take

__all__ = [
    "DecoderOutput",
    "DenoisingQueries",
    "EncoderOutput",
    "FeatureTokens",
    "JoinedTargets",
    "MaskLogits",
    "Matches",
    "RleMasks",
    "Stage",
    "StagePrediction",
    "Targets",
    "Tokens",
    "decoder_stages",
    "flatten_levels",
    "group_by_mask_features",
    "highest_scores",
    "instances_to_coco",
    "is_final_loss",
    "mask_logits",
    "on_cpu",
    "take",
]
