"""Names of weights in the public releases and here: one table for each release, read in both directions."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

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
# below it. {i} is any number and {i+1} the next; {layer} and {di} run over decoder and token-interaction layers. The
# first row that fits is taken.
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
    (
        DECODER + "heads.class_embed",
        DECODER + "class_embed",
        DECODER + "decoder.class_embed",
        DECODER + "oldm.class_embed",
    ),
    (DECODER + "heads.mask_embed", DECODER + "mask_embed", DECODER + "decoder.mask_embed"),
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
    *MASKDINO,
)
# The table of a release, by a prefix that only keys of its model have; the first that fits is taken.
RELEASES: dict[str, Table] = {DECODER + "de_imbalance.": DIMASKDINO, DECODER: MASKDINO}


def name_pattern(name: str) -> re.Pattern[str]:
    """What matches a name of a table and every key below it; numbers are its groups."""
    return re.compile(re.sub(r"\\\{[a-z]+(\\\+1)?\\\}", r"(\\d+)", re.escape(name)) + r"(?=\.|$)")


def is_class_key(key: str) -> bool:
    """Whether a weight, by our name, has a row for each class."""
    return _BY_CLASS.match(key) is not None


def is_dino(keys: Iterable[str]) -> bool:
    """Whether keys with our names are those of a DINO model."""
    return any(key.startswith(DECODER + "heads.0.") for key in keys)


_OF_ALL: Table = tuple(row for table in RELEASES.values() for row in table)


def our_name(key: str, table: Table = _OF_ALL) -> str:
    """Our name of a release's ``key``; any other name is returned as it is."""
    for pattern, ours, counts_from_one in _rows_by_theirs(table):
        if match := pattern.match(key):
            number = int(match[1]) - counts_from_one if match.groups() else 0
            return ours.replace("{i}", str(number)) + key[match.end() :]
    return key


@functools.cache
def _rows_by_theirs(table: Table) -> list[tuple[re.Pattern[str], str, bool]]:
    return [(name_pattern(theirs), row[0], "{i+1}" in theirs) for row in table for theirs in row[1:]]


def to_ours(state: Mapping[str, Tensor], table: Table = _OF_ALL) -> dict[str, Tensor]:
    """Rename a release's state dict to our names; CheckpointError if names of one tensor hold different values."""
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        name = our_name(key, table)
        if name in ours and ours[name] is not value and not torch.equal(ours[name], value):
            raise CheckpointError(
                f"{origin[name]} and {key} are one tensor in the releases, but differ in this file, as where heads are "
                "not shared; this model cannot represent that."
            )
        ours.setdefault(name, value)
        origin.setdefault(name, key)
    return ours


def to_theirs(state: Mapping[str, Tensor], table: Table, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Rename our state dict to a release's names, with every alias, given how many each placeholder of them counts."""
    rows = [(name_pattern(row[0]), row[1:]) for row in table]
    return {name: value for key, value in state.items() for name in _their_names(key, rows, sizes)}


def _their_names(
    key: str, rows: list[tuple[re.Pattern[str], tuple[str, ...]]], sizes: Mapping[str, int]
) -> Iterator[str]:
    """Every name under which the release stores our ``key``, the main one first."""
    for pattern, templates in rows:
        if match := pattern.match(key):
            number = int(match[1]) if match.groups() else 0
            for template in templates:
                name = template.replace("{i}", str(number)).replace("{i+1}", str(number + 1)) + key[match.end() :]
                counted = next((each for each in sizes if each in name), None)
                yield from [name.replace(counted, str(each)) for each in range(sizes[counted])] if counted else [name]
            return
    yield key


def count_modules(state: Iterable[str], prefix: str) -> int:
    """Number of distinct modules right below ``prefix``."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
