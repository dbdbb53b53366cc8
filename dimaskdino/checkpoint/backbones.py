"""Weights of a backbone or classifier, as torchvision, timm, Caffe2, and Swin's authors name them."""

import logging
import re
from collections.abc import Callable

from torch import Tensor

from dimaskdino.checkpoint.fitting import BACKBONE, State, describe_backbone, fit_channels, group
from dimaskdino.errors import CheckpointError

logger = logging.getLogger(__name__)

# Where detectors and wrappers keep a backbone, and where ours keeps timm's model.
_OUTER = re.compile(r"^(?:backbone\.bottom_up\.|backbone\.|bottom_up\.)")
_INNER = ("", "body.", "body.model.", "body.body.", "vit.")

# Buffers that follow from the architecture, and counters that nothing reads.
_DERIVED = re.compile(r"(?:num_batches_tracked|relative_position_index|attn_mask)$")
# The norms of a pyramid's outputs, a plain transformer's pyramid, and adapters, which classifiers do not have.
_PYRAMID_ONLY = re.compile(r"^norm\d\.|^pyramid\.|\.lora_[AB]\.")
_RUNNING = re.compile(r"running_(?:mean|var)$")


def _torchvision(key: str) -> str:
    """Rename torchvision's and timm's ResNet to detectron2's."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)\b", r"conv\1.norm", key)
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


_CAFFE2_PARTS = {
    "branch1": "shortcut",
    "branch2a": "conv1",
    "branch2b": "conv2",
    "branch2c": "conv3",
    "w": "weight",
    "b": "bias",
    "bn.s": "norm.weight",
    "bn.b": "norm.bias",
    "bn.rm": "norm.running_mean",
    "bn.riv": "norm.running_var",
    "bn.gamma": "norm.weight",
    "bn.beta": "norm.bias",
    "bn.running.mean": "norm.running_mean",
    "bn.running.var": "norm.running_var",
}


def _caffe2(key: str) -> str:
    """Rename Caffe2's ResNet to detectron2's: res2_0_branch2a_bn_s becomes res2.0.conv1.norm.weight."""
    match = re.match(r"^(?:res_)?(conv1|res\d_\d+_branch\d[abc]?)_(.+)$", key)
    if match is None:
        return key
    place = ".".join(_CAFFE2_PARTS.get(part, part) for part in match[1].split("_"))
    what = match[2].replace("_", ".")
    return f"{'stem.' if place == 'conv1' else ''}{place}.{_CAFFE2_PARTS.get(what, what)}"


def _move_downsample(step: int) -> Callable[[str], str]:
    """Swin's authors put a downsampling layer at the end of a stage, timm at the start of the next."""
    return lambda key: re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + step}.downsample", key)


_SCHEMES: dict[str, Callable[[str], str]] = {
    "the model": str,
    "torchvision": _torchvision,
    "Caffe2": _caffe2,
    "timm's Swin": _move_downsample(-1),
    "the original Swin": _move_downsample(1),
}


def match_backbone(state: State, model_state: State, *, author: str | None = None) -> dict[str, Tensor]:
    """The backbone's weights, under our keys, of a file that holds a backbone, a classifier, or a detector.

    An ``author`` "Caffe2" merges running statistics into scale and shift.

    Raises:
        CheckpointError: the backbone of the file is not that of the model.
    """
    wanted = {key.removeprefix(BACKBONE): value for key, value in model_state.items() if key.startswith(BACKBONE)}
    scheme, names = _best_match(state, wanted)
    state = fit_channels(state, wanted, names)
    if problem := _misfit(names, state, wanted, author):
        raise CheckpointError(problem)
    _report(scheme, names, state, wanted)
    if author == "Caffe2":
        logger.warning("Caffe2's weights need INPUT.FORMAT BGR, MODEL.RESNETS.STRIDE_IN_1X1 True, and its PIXEL_STD.")
    return {BACKBONE + ours: state[theirs] for theirs, ours in names.items()}


def _best_match(state: State, wanted: State) -> tuple[str, dict[str, str]]:
    """Whose names a file uses, and its keys to those of the model's backbone (without ``backbone.``)."""
    # timm joins the first two parts of a name by _ when it cuts a model into stages, so dots are compared as _.
    # peft puts the layers that it adapts into others.
    plain = {key.replace(".base_layer.", ".").replace(".", "_"): key for key in wanted}
    inner_names = {key: _OUTER.sub("", key) for key in state}
    matches = []
    for scheme, rename in _SCHEMES.items():
        renamed = {key: rename(name).replace(".", "_") for key, name in inner_names.items()}
        for inner in _INNER:
            prefix = inner.replace(".", "_")
            names = {theirs: plain.get(prefix + ours) for theirs, ours in renamed.items()}
            matches.append((scheme, {theirs: ours for theirs, ours in names.items() if ours is not None}))
    return max(matches, key=lambda match: len(match[1]))


def _misfit(names: dict[str, str], state: State, wanted: State, author: str | None) -> str:
    """Say how the file differs from the model's backbone; "" if the backbone can be loaded."""
    found = {ours: state[theirs] for theirs, ours in names.items()}
    stages = {_stage(key) for key in names}
    missing = [key for key in wanted if key not in found and not _may_be_missing(key, author)]
    extra = [key for key in _left_out(names, state) if _stage(key) in stages]
    reshaped = [key for key in found if found[key].shape != wanted[key].shape]
    if not (missing or extra or reshaped):
        return ""
    parts = [f"The file's weights do not fit the model's backbone ({describe_backbone(wanted)})"]
    if not found:
        parts.append(f"none of its {len(state)} names is known; the first are {', '.join(list(state)[:3])}")
    elif missing:
        parts.append(f"missing in the file: {group(missing, found)}")
    if extra:
        parts.append(f"not in the model: {group(extra, names)}")
    if reshaped:
        shapes = [tuple(of[reshaped[0]].shape) for of in (found, wanted)]
        in_both = f"({shapes[0]} in the file, {shapes[1]} in the model)"
        parts.append(f"{len(reshaped)} of another shape, such as {reshaped[0]} {in_both}")
    return f"{'; '.join(parts)}. Likely cause: the file is of another backbone (MODEL.BACKBONE, MODEL.RESNETS.DEPTH)."


def _left_out(names: dict[str, str], state: State) -> list[str]:
    return [key for key in state if key not in names and not _DERIVED.search(key)]


def _may_be_missing(key: str, author: str | None) -> bool:
    merged = author == "Caffe2" and _RUNNING.search(key)
    return bool(_DERIVED.search(key) or _PYRAMID_ONLY.search(key) or merged)


def _stage(key: str) -> str:
    """The part of a name up to its first number (layer3, stages.2), or its first part."""
    key = _OUTER.sub("", key)
    match = re.match(r"^[^\d]*\d+", key)
    return match[0] if match else key.split(".")[0]


def _report(scheme: str, names: dict[str, str], state: State, wanted: State) -> None:
    found = set(names.values())
    fresh = sorted({_stage(key) for key in wanted if key not in found and _PYRAMID_ONLY.search(key)})
    logger.info(
        "Loaded the backbone's %d tensors (names of %s). The heads%s keep their initial values. Not used: %s.",
        len(found),
        scheme,
        f" and the backbone's {', '.join(fresh)}" if fresh else "",
        ", ".join(sorted({_stage(key) for key in _left_out(names, state)})) or "nothing",
    )
