"""Names of weights in the public releases and here: one table for each release, read in both directions."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dimaskdino.errors import CheckpointError

ENCODER = "sem_seg_head.pixel_decoder."
DECODER = "sem_seg_head.predictor."

CLASS_KEYS = (
    DECODER + "heads.class_embed.weight",
    DECODER + "heads.class_embed.bias",
    DECODER + "denoising.label_embed.weight",
)
# These, and DINO's, which has several heads.
_BY_CLASS = re.compile(re.escape(DECODER) + r"(?:(?:selection_)?heads\.(?:\d+\.)?class_embed|denoising\.label_embed)\.")

# Rows are (ours, theirs, further names of the same tensor there). A name stands for the key itself and for every key
# below it. {i} is any number and {i+1} the next; {layer} and {di} run over decoder and token-interaction layers.
Table = tuple[tuple[str, ...], ...]

MASKDINO: Table = (
    (ENCODER + "level_embed", ENCODER + "transformer.level_embed"),
    (ENCODER + "layers.{i}", ENCODER + "transformer.encoder.layers.{i}"),
    (ENCODER + "lateral_convs.{i}", ENCODER + "adapter_{i+1}"),
    (ENCODER + "output_convs.{i}", ENCODER + "layer_{i+1}"),
    (DECODER + "selection.proj", DECODER + "enc_output"),
    (DECODER + "selection.norm", DECODER + "enc_output_norm"),
    (DECODER + "heads.class_embed", DECODER + "class_embed"),
    (DECODER + "heads.mask_embed", DECODER + "mask_embed"),
    (
        DECODER + "heads.box_embed",
        DECODER + "_bbox_embed",
        DECODER + "bbox_embed.{layer}",
        DECODER + "decoder.bbox_embed.{layer}",
    ),
    (DECODER + "heads.norm", DECODER + "decoder_norm", DECODER + "decoder.norm"),
    (DECODER + "denoising.label_embed", DECODER + "label_enc"),
    (DECODER + "layers.{i}", DECODER + "decoder.layers.{i}"),
    (DECODER + "query_pos", DECODER + "decoder.ref_point_head"),
)
DIMASKDINO: Table = (
    *MASKDINO,
    (DECODER + "heads.class_embed", DECODER + "decoder.class_embed", DECODER + "oldm.class_embed"),
    (DECODER + "heads.mask_embed", DECODER + "decoder.mask_embed"),
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
)
# The table of a release, by a prefix that only keys of its model have; the first that fits is taken.
RELEASES: dict[str, Table] = {DECODER + "de_imbalance.": DIMASKDINO, DECODER: MASKDINO}

# The releases' criterion stores the weight of the no-object class, which their focal loss does not read.
CRITERION_KEY = "criterion.empty_weight"
NO_OBJECT_WEIGHT = 0.1


def name_pattern(name: str) -> re.Pattern[str]:
    """What matches a name of a table and every key below it; numbers are its groups."""
    return re.compile(re.sub(r"\\\{[a-z]+(\\\+1)?\\\}", r"(\\d+)", re.escape(name)) + r"(?=\.|$)")


def is_class_key(key: str) -> bool:
    """Whether a weight, by our name, has a row for each class."""
    return _BY_CLASS.match(key) is not None


def is_dino(keys: Iterable[str]) -> bool:
    """Whether keys with our names are those of a DINO model."""
    return any(key.startswith(DECODER + "heads.0.") for key in keys)


# {theirs: ours} over all releases.
_PAIRS = {theirs: row[0] for table in RELEASES.values() for row in table for theirs in row[1:]}
_TO_OURS = [(name_pattern(theirs), ours, "{i+1}" in theirs) for theirs, ours in _PAIRS.items()]


def our_name(key: str) -> str:
    """Our name of a release's ``key``; a name of ours is returned as it is."""
    for pattern, ours, counts_from_one in _TO_OURS:
        if match := pattern.match(key):
            number = int(match[1]) - counts_from_one if match.groups() else 0
            return ours.replace("{i}", str(number)) + key[match.end() :]
    return key


def is_release(keys: Iterable[str]) -> bool:
    """Whether any of ``keys`` has a name that only a release uses."""
    return any(key == CRITERION_KEY or our_name(key) != key for key in keys)


def from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a release's state dict to our names; names of ours stay.

    Raises:
        CheckpointError: two names of what is one tensor in the releases hold different values.
    """
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        if key.startswith("criterion."):
            continue
        name = our_name(key)
        if name in ours and not torch.equal(ours[name], value):
            raise CheckpointError(
                f"{origin[name]} and {key} are one tensor in the releases, but differ in this file: its heads are not "
                "shared, and this model cannot represent that."
            )
        ours.setdefault(name, value)
        origin.setdefault(name, key)
    return ours


def to_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict to the names of its model's release, with every alias that the release stores."""
    tables = (table for prefix, table in RELEASES.items() if any(key.startswith(prefix) for key in state))
    rows = [(name_pattern(row[0]), row[1:]) for row in next(tables, MASKDINO)]
    sizes = {
        "{layer}": count_modules(state, DECODER + "layers."),
        "{di}": count_modules(state, DECODER + "de_imbalance.layers."),
    }
    theirs = {name: value for key, value in state.items() for name in _release_names(key, rows, sizes)}
    labels = state.get(CLASS_KEYS[2], state.get(CLASS_KEYS[0]))
    if labels is not None:
        theirs[CRITERION_KEY] = torch.ones(len(labels) + 1)
        theirs[CRITERION_KEY][-1] = NO_OBJECT_WEIGHT
    return theirs


def _release_names(
    key: str, rows: list[tuple[re.Pattern[str], tuple[str, ...]]], sizes: Mapping[str, int]
) -> list[str]:
    """Every name under which the release stores our ``key``, the main one first."""
    names = []
    for pattern, templates in rows:
        if match := pattern.match(key):
            number = int(match[1]) if match.groups() else 0
            for template in templates:
                name = template.replace("{i}", str(number)).replace("{i+1}", str(number + 1))
                names += [each + key[match.end() :] for each in expand_name(name, sizes)]
    return names or [key]


def expand_name(name: str, sizes: Mapping[str, int]) -> list[str]:
    """A name with each number of its placeholder, given how many there are; the name itself without one."""
    for placeholder, size in sizes.items():
        if placeholder in name:
            return [name.replace(placeholder, str(index)) for index in range(size)]
    return [name]


def count_modules(state: Iterable[str], prefix: str) -> int:
    """Number of distinct modules right below ``prefix``."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
