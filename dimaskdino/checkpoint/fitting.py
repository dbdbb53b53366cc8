"""Whether a file's weights fit a model, and if not, why."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dimaskdino.checkpoint.backbones import BACKBONE, describe_backbone
from dimaskdino.checkpoint.grouping import group
from dimaskdino.checkpoint.names import CLASS_KEYS, DECODER, ENCODER

State = Mapping[str, Tensor]

# Buffers that follow from the architecture or that nothing reads; old files may lack them.
_DERIVED = re.compile(r"(?:num_batches_tracked|relative_position_index)$|^pixel_(?:mean|std)$")


@dataclass(frozen=True)
class Misfit:
    """How the keys of a file differ from those of a model."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)


def compare(state: State, model_state: State) -> Misfit:
    """Compare a file's weights, under our names, with a model's."""
    return Misfit(
        missing=[key for key in model_state if key not in state and not _DERIVED.search(key)],
        unexpected=[key for key in state if key not in model_state and not _DERIVED.search(key)],
        reshaped=[key for key in state if key in model_state and state[key].shape != model_state[key].shape],
    )


def describe(misfit: Misfit, state: State, model_state: State) -> str:
    """One sentence per kind of difference, then what probably causes them."""
    parts = []
    if misfit.missing:
        parts.append(f"{len(misfit.missing)} missing in the file: {group(misfit.missing, state)}")
    if misfit.unexpected:
        parts.append(f"{len(misfit.unexpected)} not in the model: {group(misfit.unexpected, model_state)}")
    if misfit.reshaped:
        shapes = [f"{key} {tuple(state[key].shape)} for {tuple(model_state[key].shape)}" for key in misfit.reshaped[:4]]
        more = f" and {len(misfit.reshaped) - 4} more" if len(misfit.reshaped) > 4 else ""
        parts.append(f"{len(misfit.reshaped)} of another shape: {', '.join(shapes)}{more}")
    causes = [text for cause in _CAUSES if (text := cause(misfit, state, model_state))]
    likely = "; ".join(causes) or "the file is of another architecture"
    return f"{'; '.join(parts)}. Likely cause: {likely}."


def num_classes(state: State) -> int | None:
    """Rows of the class head."""
    weight = state.get(CLASS_KEYS[0])
    return None if weight is None else len(weight)


def _backbone(misfit: Misfit, state: State, model_state: State) -> str:
    keys = (*misfit.missing, *misfit.unexpected, *misfit.reshaped)
    if not any(key.startswith(BACKBONE) for key in keys):
        return ""
    return (
        f"another backbone, {describe_backbone(state)} in the file and {describe_backbone(model_state)} in the model "
        "(MODEL.BACKBONE.NAME, MODEL.RESNETS.DEPTH, MODEL.SWIN, MODEL.TIMM)"
    )


def _classes(misfit: Misfit, state: State, model_state: State) -> str:
    if not any(key in misfit.reshaped for key in CLASS_KEYS):
        return ""
    return (
        f"the file was trained for {num_classes(state)} classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES asks for "
        f"{num_classes(model_state)}"
    )


def _architecture(misfit: Misfit, state: State, model_state: State) -> str:
    parts = {"De-Imbalance": DECODER + "de_imbalance.", "BATO": DECODER + "bato."}
    in_file = [name for name, prefix in parts.items() if any(key.startswith(prefix) for key in misfit.unexpected)]
    in_model = [name for name, prefix in parts.items() if any(key.startswith(prefix) for key in misfit.missing)]
    texts = []
    if in_file:
        texts.append(f"the file is of DI-MaskDINO ({' and '.join(in_file)}), the configuration is of a model without")
    if in_model:
        texts.append(f"the configuration is of DI-MaskDINO ({' and '.join(in_model)}), the file of a model without")
    key = "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME, MODEL.MaskDINO.DI.ENABLED, MODEL.MaskDINO.BATO.ENABLED"
    return f"{'; '.join(texts)} ({key})" if texts else ""


def _depth(prefix: str, key: str) -> Callable[[Misfit, State, State], str]:
    def cause(misfit: Misfit, state: State, model_state: State) -> str:
        layers = [
            {k.removeprefix(prefix).split(".")[0] for k in s if k.startswith(prefix)} for s in (state, model_state)
        ]
        in_file, in_model = map(len, layers)
        return f"{in_file} layers in the file, {in_model} in the model ({key})" if in_file != in_model else ""

    return cause


def _shape(pattern: str, key: str) -> Callable[[Misfit, State, State], str]:
    def cause(misfit: Misfit, state: State, model_state: State) -> str:
        found = next((k for k in misfit.reshaped if re.search(pattern, k)), None)
        if found is None:
            return ""
        return f"{key} is {model_state[found].shape[0]} but {state[found].shape[0]} in the file"

    return cause


def _stages(misfit: Misfit, state: State, model_state: State) -> str:
    one_stage = {DECODER + "query_feat.weight", DECODER + "query_embed.weight"}
    keys = set(misfit.missing) | set(misfit.unexpected)
    differs = keys & one_stage or any(key.startswith(DECODER + "selection.") for key in keys)
    return "one-stage and two-stage queries (MODEL.MaskDINO.TWO_STAGE, LEARN_TGT)" if differs else ""


_CAUSES: tuple[Callable[[Misfit, State, State], str], ...] = (
    _backbone,
    _classes,
    _architecture,
    _depth(DECODER + "layers.", "MODEL.MaskDINO.DEC_LAYERS"),
    _depth(ENCODER + "layers.", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    _shape(re.escape(DECODER) + r"layers\.\d+\.linear1\.weight", "MODEL.MaskDINO.DIM_FEEDFORWARD"),
    _shape(re.escape(ENCODER) + r"layers\.\d+\.linear1\.weight", "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD"),
    _shape(re.escape(ENCODER) + "level_embed", "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS"),
    _shape(re.escape(DECODER) + r"query_(?:feat|embed)", "MODEL.MaskDINO.NUM_OBJECT_QUERIES"),
    _stages,
)
