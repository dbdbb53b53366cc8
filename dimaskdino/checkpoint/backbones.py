"""Weights of a backbone alone, as others name them, for the backbone of our model."""

import logging
import re
from collections.abc import Callable, Mapping

from torch import Tensor

from dimaskdino.checkpoint.grouping import group
from dimaskdino.errors import CheckpointError

logger = logging.getLogger(__name__)

BACKBONE = "backbone."

# Where detection codes and wrappers keep a backbone, and where ours keeps timm's model.
_OUTER = re.compile(r"^(?:backbone\.bottom_up\.|backbone\.|bottom_up\.)")
_INNER = ("", "body.", "body.model.", "body.body.")

# Buffers that follow from the architecture, and counters that nothing reads.
_DERIVED = re.compile(r"(?:num_batches_tracked|relative_position_index|attn_mask)$")
# Weights that classifiers do not have: the norms of a pyramid's outputs.
_PYRAMID_ONLY = re.compile(r"^norm\d\.")
_RUNNING = re.compile(r"running_(?:mean|var)$")


def _keep(key: str) -> str:
    return key


def _torchvision(key: str) -> str:
    """Torchvision's and timm's ResNet -> detectron2's."""
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
    """Caffe2's ResNet -> detectron2's: res2_0_branch2a_bn_s -> res2.0.conv1.norm.weight."""
    match = re.match(r"^(?:res_)?(conv1|res\d_\d+_branch\d[abc]?)_(.+)$", key)
    if match is None:
        return key
    place = ".".join(_CAFFE2_PARTS.get(part, part) for part in match[1].split("_"))
    what = match[2].replace("_", ".")
    return f"{'stem.' if place == 'conv1' else ''}{place}.{_CAFFE2_PARTS.get(what, what)}"


def _move_downsample(step: int) -> Callable[[str], str]:
    """Swin's way down belongs to the stage before it, or in timm to the stage behind it."""
    return lambda key: re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + step}.downsample", key)


_SCHEMES: dict[str, Callable[[str], str]] = {
    "the model itself": _keep,
    "torchvision's ResNet": _torchvision,
    "Caffe2's ResNet": _caffe2,
    "timm's Swin": _move_downsample(-1),
    "the original Swin": _move_downsample(1),
}


def match_backbone(
    state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], *, author: str | None = None
) -> dict[str, Tensor]:
    """Find the backbone's weights in a file that holds a backbone or a classifier.

    Args:
        state: the file's weights.
        model_state: the whole model's weights.
        author: "Caffe2" where the file is from there: it stores no running statistics, having merged them.

    Returns:
        Our keys, all of them below ``backbone.``, and the file's tensors.

    Raises:
        CheckpointError: if the backbone of the file is not that of the model.
    """
    wanted = {key.removeprefix(BACKBONE): value for key, value in model_state.items() if key.startswith(BACKBONE)}
    scheme, names = max(_candidates(state, wanted), key=lambda candidate: len(candidate[1]))
    found = {ours: state[theirs] for theirs, ours in names.items()}
    missing = [key for key in wanted if key not in found and not _may_be_missing(key, author)]
    left_out = [key for key in state if key not in names]
    stages = {_stage(key) for key in names}
    extra = [key for key in left_out if _stage(key) in stages and not _DERIVED.search(key)]
    shapes = [key for key in found if found[key].shape != wanted[key].shape]
    if missing or extra or shapes:
        raise CheckpointError(_message(found, wanted, names, state, missing, extra, shapes))
    _report(scheme, found, wanted, [key for key in left_out if not _DERIVED.search(key)])
    if author == "Caffe2":
        logger.warning(
            "Caffe2's weights expect INPUT.FORMAT BGR, MODEL.RESNETS.STRIDE_IN_1X1 True, their own PIXEL_STD."
        )
    return {BACKBONE + key: value for key, value in found.items()}


def _candidates(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[tuple[str, dict[str, str]]]:
    """For every scheme: the file's keys that it finds in the model -> the model's keys."""
    # timm joins the first two parts of a name by _ when it cuts a model into stages, so both are compared by _.
    plain = {key.replace(".", "_"): key for key in wanted}
    candidates = []
    for scheme, rename in _SCHEMES.items():
        for inner in _INNER:
            names = {key: plain.get((inner + rename(_OUTER.sub("", key))).replace(".", "_")) for key in state}
            candidates.append((scheme, {theirs: ours for theirs, ours in names.items() if ours is not None}))
    return candidates


def _may_be_missing(key: str, author: str | None) -> bool:
    merged = author == "Caffe2" and _RUNNING.search(key)
    return bool(_DERIVED.search(key) or _PYRAMID_ONLY.search(key) or merged)


def _stage(key: str) -> str:
    """The part of a name up to its first number (layer3, stages.2), or its first part."""
    key = _OUTER.sub("", key)
    match = re.match(r"^[^\d]*\d+", key)
    return match[0] if match else key.split(".")[0]


def _report(scheme: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], left_out: list[str]) -> None:
    fresh = sorted({_stage(key) for key in wanted if key not in found and _PYRAMID_ONLY.search(key)})
    logger.info(
        "Loaded the backbone's %d tensors, named as by %s; the heads%s keep their initial values. Not used: %s.",
        len(found),
        scheme,
        f" and the backbone's {', '.join(fresh)}" if fresh else "",
        ", ".join(sorted({_stage(key) for key in left_out})) or "nothing",
    )


def describe_backbone(state: Mapping[str, Tensor]) -> str:
    """A short name for the backbone that `state` holds under our names, with or without ``backbone.``."""
    keys = {key.removeprefix(BACKBONE): value for key, value in state.items() if key.startswith(BACKBONE)} or dict(
        state
    )
    blocks = {(int(m[1]), int(m[2])) for key in keys if (m := re.match(r"res(\d)\.(\d+)\.", key))}
    if blocks:
        depths = tuple(sum(stage == s for s, _ in blocks) for stage in sorted({s for s, _ in blocks}))
        per_block = 3 if any(".conv3." in key for key in keys) else 2
        return f"ResNet-{per_block * sum(depths) + 2}"
    blocks = {(int(m[1]), int(m[2])) for key in keys if (m := re.match(r"layers\.(\d)\.blocks\.(\d+)\.", key))}
    if blocks:
        depths = tuple(sum(stage == s for s, _ in blocks) for stage in sorted({s for s, _ in blocks}))
        width = keys["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in keys else "?"
        return f"Swin of {width} channels with {', '.join(map(str, depths))} blocks"
    return "timm's model" if any(key.startswith("body.") for key in keys) else "another backbone"


def _message(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Mapping[str, str],
    state: Mapping[str, Tensor],
    missing: list[str],
    extra: list[str],
    shapes: list[str],
) -> str:
    parts = [f"The file's weights do not fit the model's backbone ({describe_backbone(wanted)})"]
    if not found:
        parts.append(f"none of its {len(state)} names is known; the first are {', '.join(list(state)[:3])}")
    elif missing:
        parts.append(f"missing in the file: {group(missing, found)}")
    if extra:
        parts.append(f"not in the model: {group(extra, names)}")
    if shapes:
        first = shapes[0]
        parts.append(
            f"{len(shapes)} of another shape, such as {first} ({tuple(found[first].shape)} in the file, "
            f"{tuple(wanted[first].shape)} in the model)"
        )
    return "; ".join(parts) + ". Likely cause: the file is of another backbone (MODEL.BACKBONE, MODEL.RESNETS.DEPTH)."
