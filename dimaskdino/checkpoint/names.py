"""The names of the two public releases and ours: one table, read in both directions."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dimaskdino.errors import CheckpointError

ENCODER = "sem_seg_head.pixel_decoder."
DECODER = "sem_seg_head.predictor."

# (ours, theirs, further names of the same tensors there). Each stands for the key itself and for every key below it.
# {i} is any number and {i+1} the next; {layer} and {di} run over the decoder layers and the token-interaction layers.
# A name that starts with "DI:" exists in DI-MaskDINO's release alone.
TABLE: tuple[tuple[str, ...], ...] = (
    (ENCODER + "level_embed", ENCODER + "transformer.level_embed"),
    (ENCODER + "layers.{i}", ENCODER + "transformer.encoder.layers.{i}"),
    (ENCODER + "lateral_convs.{i}", ENCODER + "adapter_{i+1}"),
    (ENCODER + "output_convs.{i}", ENCODER + "layer_{i+1}"),
    (DECODER + "selection.proj", DECODER + "enc_output"),
    (DECODER + "selection.norm", DECODER + "enc_output_norm"),
    (
        DECODER + "heads.class_embed",
        DECODER + "class_embed",
        "DI:" + DECODER + "decoder.class_embed",
        "DI:" + DECODER + "oldm.class_embed",
    ),
    (DECODER + "heads.mask_embed", DECODER + "mask_embed", "DI:" + DECODER + "decoder.mask_embed"),
    (
        DECODER + "heads.box_embed",
        DECODER + "_bbox_embed",
        DECODER + "bbox_embed.{layer}",
        DECODER + "decoder.bbox_embed.{layer}",
    ),
    (DECODER + "heads.norm", DECODER + "decoder_norm", DECODER + "decoder.norm"),
    (DECODER + "denoising.label_embed", DECODER + "label_enc"),
    (DECODER + "de_imbalance.layers.{i}", DECODER + "oldm.layers.{i}"),
    (DECODER + "de_imbalance.query_pos", DECODER + "oldm.ref_point_head"),
    (DECODER + "de_imbalance.norm", DECODER + "oldm_norm", DECODER + "oldm.norm"),
    (
        DECODER + "de_imbalance.box_embed",
        DECODER + "_oldm_bbox_embed",
        DECODER + "oldm_bbox_embed.{di}",
        DECODER + "oldm.bbox_embed.{di}",
    ),
    (
        DECODER + "bato.attention",
        DECODER + "query_guide_feature_update",
        DECODER + "decoder.query_guide_feature_update",
    ),
    (DECODER + "bato.mask_conv", DECODER + "decoder.mask_output_conv"),
    (DECODER + "layers.{i}", DECODER + "decoder.layers.{i}"),
    (DECODER + "query_pos", DECODER + "decoder.ref_point_head"),
)

# The release's criterion stores the weight of the no-object class, which its focal loss does not read.
CRITERION_KEY = "criterion.empty_weight"
NO_OBJECT_WEIGHT = 0.1

CLASS_KEYS = (
    DECODER + "heads.class_embed.weight",
    DECODER + "heads.class_embed.bias",
    DECODER + "denoising.label_embed.weight",
)


def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.escape(name.removeprefix("DI:"))
    return re.compile(re.sub(r"\\\{[a-z]+(\\\+1)?\\\}", r"(\\d+)", pattern) + r"(?=\.|$)")


_TO_OURS = tuple((_pattern(theirs), row[0], "{i+1}" in theirs) for row in TABLE for theirs in row[1:])
_TO_THEIRS = tuple((_pattern(row[0]), row[1:]) for row in TABLE)


def our_name(key: str) -> str:
    """Our name of a release's `key`; a name that is already ours comes back as it is."""
    for pattern, ours, counts_from_one in _TO_OURS:
        if match := pattern.match(key):
            number = int(match[1]) - counts_from_one if match.groups() else 0
            return ours.replace("{i}", str(number)) + key[match.end() :]
    return key


def is_release(keys: Iterable[str]) -> bool:
    """Whether any of `keys` is named as in a release and not as here."""
    return any(key == CRITERION_KEY or our_name(key) != key for key in keys)


def from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A release's state dict under our names; one that is already under our names comes back unchanged.

    Raises:
        CheckpointError: if two names of what is one tensor in the release hold different numbers.
    """
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        if key.startswith("criterion."):
            continue
        name = our_name(key)
        if name in ours and not torch.equal(ours[name], value):
            raise CheckpointError(
                f"{origin[name]} and {key} are one tensor in the releases, but differ in this file: "
                "it was trained with heads that are not shared, which this model cannot represent."
            )
        ours.setdefault(name, value)
        origin.setdefault(name, key)
    return ours


def to_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of the matching release, with every alias that the release stores.

    The matching release is DI-MaskDINO's where the model has De-Imbalance, else MaskDINO's.
    """
    sizes = {
        "{layer}": _count(state, DECODER + "layers."),
        "{di}": _count(state, DECODER + "de_imbalance.layers."),
    }
    has_di = sizes["{di}"] > 0
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        for name in _release_names(key, sizes, has_di):
            theirs[name] = value
    labels = state.get(CLASS_KEYS[2], state.get(CLASS_KEYS[0]))
    if labels is not None:
        theirs[CRITERION_KEY] = torch.ones(len(labels) + 1)
        theirs[CRITERION_KEY][-1] = NO_OBJECT_WEIGHT
    return theirs


def _release_names(key: str, sizes: Mapping[str, int], has_di: bool) -> list[str]:
    """Every name under which a release stores our `key`, the principal one first."""
    for pattern, templates in _TO_THEIRS:
        if match := pattern.match(key):
            number = int(match[1]) if match.groups() else 0
            names = []
            for template in templates:
                if template.startswith("DI:") and not has_di:
                    continue
                name = template.removeprefix("DI:").replace("{i}", str(number)).replace("{i+1}", str(number + 1))
                names += [each + key[match.end() :] for each in _expand(name, sizes)]
            return names
    return [key]


def _expand(name: str, sizes: Mapping[str, int]) -> list[str]:
    for placeholder, size in sizes.items():
        if placeholder in name:
            return [name.replace(placeholder, str(index)) for index in range(size)]
    return [name]


def _count(state: Iterable[str], prefix: str) -> int:
    """How many numbered modules `prefix` has in `state`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
