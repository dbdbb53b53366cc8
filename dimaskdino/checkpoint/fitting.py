"""Fitting the weights of a file to a model: names, shapes, channels, and frozen weights that the file leaves out."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dimaskdino.checkpoint.names import DECODER, ENCODER, count_modules, is_class_key, is_dino
from dimaskdino.errors import CheckpointError
from dimaskdino.layers.shards import gathered

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

BACKBONE = "backbone."
# Buffers that follow from the architecture, or that nothing reads; old files may lack them.
_DERIVED = re.compile(r"(?:num_batches_tracked|relative_position_index)$|^pixel_(?:mean|std)$")
_HEAD, _WIDTH = "MODEL.SEM_SEG_HEAD", "MODEL.DINO.DIM_FEEDFORWARD"
_LINEAR, _QUERIES = r"layers\.\d+\.linear1\.weight", re.escape(DECODER) + r"query_(?:feat|embed)"
_COLORS = 3
_MOST_GROUPS = 8
# Entries of a checkpoint: the file of the other weights ("" where the model's construction gives them); their digest.
BASE, DIGEST = "frozen_weights", "frozen_digest"


@dataclass(frozen=True)
class Misfit:
    """How a file's weights, under our names, differ from a model's."""

    state: State  # the file's weights
    model_state: State  # the model's weights
    missing: list[str]  # keys that only the model has
    unexpected: list[str]  # keys that only the file has
    reshaped: list[str]  # keys whose shapes differ

    @classmethod
    def between(cls, state: State, model_state: State) -> "Misfit":
        """Compare both."""
        return cls(
            state,
            model_state,
            missing=[key for key in model_state if key not in state and not _DERIVED.search(key)],
            unexpected=[key for key in state if key not in model_state and not _DERIVED.search(key)],
            reshaped=[key for key in state if key in model_state and state[key].shape != model_state[key].shape],
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def describe(self) -> str:
        """One clause for each kind of difference, then the likely causes."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing in the file: {group(self.missing, self.state)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} not in the model: {group(self.unexpected, self.model_state)}")
        if self.reshaped:
            both = ((key, tuple(self.state[key].shape), tuple(self.model_state[key].shape)) for key in self.reshaped)
            shapes = [f"{key} {in_file} for {in_model}" for key, in_file, in_model in islice(both, 4)]
            more = f" and {len(self.reshaped) - 4} more" if len(self.reshaped) > 4 else ""
            parts.append(f"{len(self.reshaped)} of another shape: {', '.join(shapes)}{more}")
        causes = [text for cause in _CAUSES if (text := cause(self))]
        return f"{'; '.join(parts)}. Likely cause: {'; '.join(causes) or 'the file is of another architecture'}."


def num_classes(state: State) -> int | None:
    """The classes that the weights know; the head of a semantic model has one more row, for no object."""
    return min((len(weight) for key, weight in state.items() if is_class_key(key)), default=None)


def describe_backbone(state: State) -> str:
    """A short name of the backbone in ``state``, under our names with or without ``backbone.``."""
    keys = {key.removeprefix(BACKBONE): value for key, value in state.items() if key.startswith(BACKBONE)} or state
    if depths := _depths(keys, r"res(\d)\.(\d+)\."):
        per_block = 3 if any(".conv3." in key for key in keys) else 2
        return f"ResNet-{per_block * sum(depths) + 2}"
    if depths := _depths(keys, r"layers\.(\d)\.blocks\.(\d+)\."):
        width = keys["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in keys else "?"
        return f"Swin of {width} channels with {', '.join(map(str, depths))} blocks"
    return "timm's model" if any(key.startswith("body.") for key in keys) else "another backbone"


def _depths(keys: Iterable[str], pattern: str) -> list[int]:
    """Blocks of each stage, where ``pattern`` finds the numbers of stage and block in a key."""
    blocks = {(int(match[1]), int(match[2])) for key in keys if (match := re.match(pattern, key))}
    return [count for _, count in sorted(Counter(stage for stage, _ in blocks).items())]


def group(keys: Iterable[str], others: Iterable[str]) -> str:
    """Name many keys in few words, by the largest modules that hold none of ``others``: "a.b.* (12), c.weight"."""
    present = {prefix for key in others for prefix in _prefixes(key)}
    groups: Counter[str] = Counter()
    for key in keys:
        groups[next((prefix for prefix in _prefixes(key) if prefix not in present), key)] += 1
    keys = set(keys)
    names = [name if name in keys else f"{name}.* ({count})" for name, count in groups.items()]
    more = f" and {len(names) - _MOST_GROUPS} more groups" if len(names) > _MOST_GROUPS else ""
    return ", ".join(names[:_MOST_GROUPS]) + more


def _prefixes(key: str) -> list[str]:
    """Every module that contains ``key``, outermost first, then ``key`` itself."""
    parts = key.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _backbone(misfit: Misfit) -> str:
    keys = (*misfit.missing, *misfit.unexpected, *misfit.reshaped)
    if not any(key.startswith(BACKBONE) for key in keys):
        return ""
    return (
        f"another backbone, {describe_backbone(misfit.state)} in the file and {describe_backbone(misfit.model_state)} "
        "in the model (MODEL.BACKBONE.NAME, MODEL.RESNETS.DEPTH, MODEL.SWIN, MODEL.TIMM)"
    )


def _classes(misfit: Misfit) -> str:
    if not any(is_class_key(key) for key in misfit.reshaped):
        return ""
    in_file, in_model = num_classes(misfit.state), num_classes(misfit.model_state)
    if in_file == in_model:
        return "one of the class heads has a row for no object (MODEL.MaskDINO.SEMANTIC_CE_LOSS)"
    return f"the file was trained for {in_file} classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES asks for {in_model}"


def _architecture(misfit: Misfit) -> str:
    if is_dino(misfit.state) != is_dino(misfit.model_state):
        file, model = ("of DINO", "of another model") if is_dino(misfit.state) else ("of another model", "of DINO")
        return f"the file is {file}, the configuration {model} (MODEL.META_ARCHITECTURE)"
    parts = {"De-Imbalance": DECODER + "de_imbalance.", "BATO": DECODER + "bato."}
    in_file, in_model = (
        " and ".join(name for name, prefix in parts.items() if any(key.startswith(prefix) for key in keys))
        for keys in (misfit.unexpected, misfit.missing)
    )
    texts = [f"the file is of DI-MaskDINO ({in_file}), the configuration is of a model without"] if in_file else []
    texts += [f"the configuration is of DI-MaskDINO ({in_model}), the file of a model without"] if in_model else []
    key = "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME, MODEL.MaskDINO.DI.ENABLED, MODEL.MaskDINO.BATO.ENABLED"
    return f"{'; '.join(texts)} ({key})" if texts else ""


def _number_of_layers(prefix: str, key: str, key_of_dino: str, misfit: Misfit) -> str:
    in_file, in_model = (count_modules(state, prefix) for state in (misfit.state, misfit.model_state))
    name = key_of_dino if is_dino(misfit.model_state) else key
    return f"{in_file} layers in the file, {in_model} in the model ({name})" if in_file != in_model else ""


def _size(pattern: str, key: str, key_of_dino: str, misfit: Misfit) -> str:
    found = next((k for k in misfit.reshaped if re.search(pattern, k)), None)
    if found is None:
        return ""
    name = key_of_dino if is_dino(misfit.model_state) else key
    return f"{name} is {misfit.model_state[found].shape[0]} but {misfit.state[found].shape[0]} in the file"


def _two_stage(misfit: Misfit) -> str:
    keys = {*misfit.missing, *misfit.unexpected}
    differs = keys & {DECODER + "query_feat.weight", DECODER + "query_embed.weight"}
    if not differs and not any(key.startswith(DECODER + "selection.") for key in keys):
        return ""
    if is_dino(misfit.model_state):
        return "another selection of queries (MODEL.DINO.QUERY_SELECTION)"
    return "one-stage and two-stage queries (MODEL.MaskDINO.TWO_STAGE, LEARN_TGT)"


def _shared_heads(misfit: Misfit) -> str:
    separate, wanted = (count_modules(state, DECODER + "heads.1.") > 0 for state in (misfit.state, misfit.model_state))
    if separate == wanted or not is_dino(misfit.model_state):
        return ""
    return f"heads {'of each layer' if separate else 'that layers share'} in the file (MODEL.DINO.SHARED_HEADS)"


def _adapters(misfit: Misfit) -> str:
    if not any(".lora_" in key for key in (*misfit.missing, *misfit.unexpected, *misfit.reshaped)):
        return ""
    return "other adapters (set MODEL.VIT.LORA as in the config.yaml of that run)"


_CAUSES: tuple[Callable[[Misfit], str], ...] = (
    _adapters,
    _backbone,
    _classes,
    _architecture,
    partial(_number_of_layers, DECODER + "layers.", "MODEL.MaskDINO.DEC_LAYERS", "MODEL.DINO.DEC_LAYERS"),
    partial(_number_of_layers, ENCODER + "layers.", f"{_HEAD}.TRANSFORMER_ENC_LAYERS", "MODEL.DINO.ENC_LAYERS"),
    partial(_size, re.escape(DECODER) + _LINEAR, "MODEL.MaskDINO.DIM_FEEDFORWARD", _WIDTH),
    partial(_size, re.escape(ENCODER) + _LINEAR, f"{_HEAD}.DIM_FEEDFORWARD", _WIDTH),
    partial(_size, re.escape(ENCODER) + "level_embed", f"{_HEAD}.TOTAL_NUM_FEATURE_LEVELS", "MODEL.DINO.NUM_LEVELS"),
    partial(_size, _QUERIES, "MODEL.MaskDINO.NUM_OBJECT_QUERIES", "MODEL.DINO.NUM_QUERIES"),
    _two_stage,
    _shared_heads,
)


def fit_channels(state: State, model_state: State, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Give filters on three channels the number of channels of the model's images.

    The first three of more channels get the file's filters, the others zeros: where these are the colors, or the others
    are zero, the outputs are those of the file. One channel gets the sum of the filters, so that gray gives what it
    gave as three equal colors; two channels get the first two filters, times 3/2.

    ``names`` gives the model's key for a key of the file; None where they are the same.
    """
    fitted = dict(state)
    for theirs in state:
        ours = theirs if names is None else names.get(theirs, "")
        given, wanted = state[theirs], model_state.get(ours)
        if wanted is None or given.ndim != 4 or given.shape[1] != _COLORS or wanted.ndim != 4:
            continue
        channels = wanted.shape[1]
        if channels == _COLORS or wanted.shape[:1] + wanted.shape[2:] != given.shape[:1] + given.shape[2:]:
            continue
        fitted[theirs] = _filters(given, channels)
        how = "zeros for the others" if channels > _COLORS else "summed" if channels == 1 else "the first two times 3/2"
        logger.warning("%s: its filters on 3 channels are used for %d (%s).", ours, channels, how)
    return fitted


def _filters(given: Tensor, channels: int) -> Tensor:
    if channels == 1:
        return given.sum(1, keepdim=True)
    if channels == 2:
        return given[:, :2] * (_COLORS / 2)
    more = given.new_zeros(given.shape[0], channels - _COLORS, *given.shape[2:])
    return torch.cat((given, more), dim=1)


def _frozen_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def without_frozen(model: nn.Module, state: Mapping[str, Tensor], base: str) -> dict[str, Any]:
    """Entries of a checkpoint that leaves out the frozen parameters, which are from the file ``base``."""
    frozen = set(_frozen_names(model))
    kept = {name: value for name, value in state.items() if name not in frozen}
    return {"model": kept, BASE: base, DIGEST: digest({name: state[name] for name in sorted(frozen)})}


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights, by which another run knows that it has the same."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def fill_frozen(model: nn.Module, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights with the frozen ones that a file left out as the model has them; CheckpointError if it has others."""
    missing = [name for name in _frozen_names(model) if name not in state]
    own = gathered(model.state_dict(), keep=True)
    filled = {**state, **{name: own[name] for name in missing}}
    if digest({name: own[name] for name in missing}) != about[DIGEST]:
        source = about[BASE] or "the pretrained weights (MODEL.VIT.PRETRAINED, MODEL.TIMM.PRETRAINED)"
        raise CheckpointError(
            f"The file leaves out the frozen weights, and the model's are not those of its training: {source}. "
            "Set the same keys as in that run's config.yaml."
        )
    return filled
