"""Names of weights in DINO's release and in detrex, and the classes that their rows stand for."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from dimaskdino.checkpoint.names import DECODER, ENCODER, Table, count_modules, is_class_key, to_ours, to_theirs
from dimaskdino.errors import CheckpointError

Source = Literal["dino", "detrex"]
_SELECTION = DECODER + "selection_heads."
_LABELS = DECODER + "denoising.label_embed.weight"
# DINO's release has an output for each number up to COCO's largest category id, 80 of which occur.
COCO_OUTPUTS = 91
COCO_IDS = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
COCO_NAMES = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]
# The logit of classes that never occur.
_NEVER = -math.log(99)

_COMMON: Table = (
    (DECODER + "selection.proj", "transformer.enc_output"),
    (DECODER + "selection.norm", "transformer.enc_output_norm"),
    (DECODER + "query_feat", "transformer.tgt_embed"),
    (DECODER + "norm", "transformer.decoder.norm"),
    (DECODER + "query_pos", "transformer.decoder.ref_point_head"),
    (DECODER + "denoising.label_embed", "label_enc"),
)
_SEPARATE_HEADS: Table = tuple(
    (f"{DECODER}heads.{{i}}.{ours}", f"transformer.decoder.{theirs}.{{i}}", f"{theirs}.{{i}}")
    for ours, theirs in (("class_embed", "class_embed"), ("box_embed", "bbox_embed"))
)
_SHARED_HEADS: Table = tuple(
    tuple(name.replace("heads.{i}", "heads.0").replace("{i}", "{layer}") for name in row) for row in _SEPARATE_HEADS
)
_TORCHVISION: Table = (
    ("backbone.stem.conv1.norm", "backbone.0.body.bn1"),
    ("backbone.stem.conv1", "backbone.0.body.conv1"),
    *(
        (f"backbone.res{stage}.{{i}}.{ours}", f"backbone.0.body.layer{stage - 1}.{{i}}.{theirs}")
        for stage in (2, 3, 4, 5)
        for ours, theirs in (
            *((f"conv{conv}.norm", f"bn{conv}") for conv in (1, 2, 3)),
            *((f"conv{conv}", f"conv{conv}") for conv in (1, 2, 3)),
            ("shortcut.norm", "downsample.1"),
            ("shortcut", "downsample.0"),
        )
    ),
)
_DINO: Table = (
    *_COMMON,
    (ENCODER + "level_embed", "transformer.level_embed"),
    (ENCODER + "layers.{i}", "transformer.encoder.layers.{i}"),
    (ENCODER + "input_proj.{i}", "input_proj.{i}"),
    (DECODER + "layers.{i}", "transformer.decoder.layers.{i}"),
    (DECODER + "query_embed", "transformer.refpoint_embed"),
    (_SELECTION + "class_embed", "transformer.enc_out_class_embed"),
    (_SELECTION + "box_embed", "transformer.enc_out_bbox_embed"),
    *_TORCHVISION,
    ("backbone", "backbone.0"),  # Swin
)
_ENCODER_PARTS = {"self_attn": "attentions.0", "norm1": "norms.0", "norm2": "norms.1"}
_DECODER_PARTS = {
    "self_attn": "attentions.0.attn",
    "cross_attn": "attentions.1",
    "norm2": "norms.0",
    "norm1": "norms.1",
    "norm3": "norms.2",
}
_FEED_FORWARD = {"linear1": "ffns.0.layers.0.0", "linear2": "ffns.0.layers.1"}
_DETREX: Table = (
    *_COMMON,
    (ENCODER + "level_embed", "transformer.level_embeds"),
    *(
        (f"{model}layers.{{i}}.{ours}", f"{theirs}.layers.{{i}}.{part}")
        for model, theirs, parts in (
            (ENCODER, "transformer.encoder", _ENCODER_PARTS | _FEED_FORWARD),
            (DECODER, "transformer.decoder", _DECODER_PARTS | _FEED_FORWARD),
        )
        for ours, part in parts.items()
    ),
)


def source_of(keys: Iterable[str]) -> Source | None:
    """Whose names the keys are: DINO's release's, detrex's, or neither's."""
    keys = list(keys)
    if not any(key.startswith("transformer.decoder.layers.") for key in keys):
        return None
    return "detrex" if any(key.startswith("neck.") for key in keys) else "dino"


def from_dino(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of DINO's release or of detrex, without the row of labels that the release never uses."""
    ours = to_ours(state, _table_of_file(state))
    if _LABELS in ours:
        ours[_LABELS] = ours[_LABELS][: len(ours[DECODER + "heads.0.class_embed.weight"])]
    return ours


def to_dino(state: Mapping[str, Tensor], source: Source = "dino") -> dict[str, Tensor]:
    """Rename the state dict of one of our DINO models to the names of the release or of detrex, with their aliases.

    The release's 91 outputs are made of COCO's 80 classes, and its label embedding gets its unused row. Raises
    CheckpointError for shared heads, which detrex does not have.
    """
    layers, heads = count_modules(state, DECODER + "layers."), count_modules(state, DECODER + "heads.")
    if source == "detrex":
        if heads != layers:
            raise CheckpointError(
                "detrex has heads for each layer, but this model shares one set (MODEL.DINO.SHARED_HEADS)."
            )
        weights = {key: value for key, value in state.items() if re.match(r".*input_proj\.\d+\.0\.weight", key)}
        table = _detrex_table(layers, sum(value.shape[-1] == 1 for value in weights.values()), len(weights))
    else:
        table = (*(_SHARED_HEADS if heads == 1 else _SEPARATE_HEADS), *_DINO)
        state = _with_coco_rows(state)
    return to_theirs(state, table, {"{layer}": layers})


def pick_coco_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep COCO's 80 classes, in their order, of outputs that are numbered by category id; names are ours."""
    return {key: value[COCO_IDS] if is_class_key(key) else value for key, value in state.items()}


def _with_coco_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of :func:`pick_coco_rows` for 80 classes, and one more row of labels for any number of them."""
    expanded = dict(state)
    for key, value in state.items():
        if not is_class_key(key):
            continue
        if len(value) == len(COCO_IDS):
            expanded[key] = value.new_full((COCO_OUTPUTS, *value.shape[1:]), _NEVER if value.dim() == 1 else 0.0)
            expanded[key][COCO_IDS] = value
        if key == _LABELS:
            expanded[key] = torch.cat((expanded[key], torch.zeros_like(expanded[key][:1])))
    return expanded


def _table_of_file(state: Mapping[str, Tensor]) -> Table:
    if source_of(state) == "detrex":
        layers, convs = count_modules(state, "transformer.decoder.layers."), count_modules(state, "neck.convs.")
        return _detrex_table(layers, convs, convs + count_modules(state, "neck.extra_convs."))
    heads = re.compile(r"transformer\.decoder\.(?:class|bbox)_embed\.\d+\.")
    firsts = ((value, state[re.sub(r"\d+", "0", key, count=1)]) for key, value in state.items() if heads.match(key))
    shared = all(value is first or torch.equal(value, first) for value, first in firsts)
    return (*(_SHARED_HEADS if shared else _SEPARATE_HEADS), *_DINO)


def _detrex_table(layers: int, convs: int, levels: int) -> Table:
    """Rows of detrex: it numbers the heads of the selection after those of the layers, and the extra levels from 0."""
    rows: list[tuple[str, ...]] = [
        (f"{_SELECTION}{ours}", f"transformer.decoder.{theirs}.{layers}", f"{theirs}.{layers}")
        for ours, theirs in (("class_embed", "class_embed"), ("box_embed", "bbox_embed"))
    ]
    for level in range(levels):
        neck = f"neck.convs.{level}" if level < convs else f"neck.extra_convs.{level - convs}"
        rows += [(f"{ENCODER}input_proj.{level}.{i}", f"{neck}.{part}") for i, part in enumerate(("conv", "norm"))]
    return (*rows, *_SEPARATE_HEADS, *_DETREX)
