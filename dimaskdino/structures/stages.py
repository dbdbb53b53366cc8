"""The stages that a decoder predicts: what each is called in results, in loss names, and in tables."""

import re
from dataclasses import dataclass, replace
from typing import Literal

StageKind = Literal["interm", "di", "selection", "initial", "layer"]

# In the order in which a decoder predicts them; True where a model has several.
_NUMBERED: dict[str, bool] = {"interm": False, "di": True, "selection": True, "initial": False, "layer": True}
_ORDINALS = ("zeroth", "first", "second", "third", "fourth", "fifth")
_INTERMEDIATE_LOSS = re.compile(r"_(interm|di_\d+|dn|(dn_)?\d+)$")


@dataclass(frozen=True)
class Stage:
    """One point of the decoder at which queries are turned into predictions."""

    #: ``interm`` (tokens of the first selection), ``di`` (a token-interaction layer), ``selection`` (tokens of a later
    #: selection), ``initial`` (queries before layer 0) or ``layer`` (a decoder layer)
    kind: StageKind
    index: int = 0  #: number of the layer, or of the selection counted from 1; 0 for the kinds that occur once
    #: position among the decoder's supervised predictions, which numbers their losses. None for the last one, whose
    #: losses have no ending, and for stages before the decoder.
    place: int | None = None
    denoising: bool = False  #: whether the predictions are those of the denoising queries

    @property
    def name(self) -> str:
        """Name in results, files, and TEST.EVAL_LAYERS: "interm", "selection.2", "layer.3", "dn.layer.3"."""
        name = f"{self.kind}.{self.index}" if _NUMBERED[self.kind] else self.kind
        return f"dn.{name}" if self.denoising else name

    @property
    def loss_suffix(self) -> str:
        """Ending of the stage's loss names, the one that MaskDINO's users plot: "_interm", "_di_0", "_3", "_dn", ""."""
        if self.kind in ("interm", "di", "selection"):
            return f"_{self.name.replace('.', '_')}"
        return ("_dn" if self.denoising else "") + ("" if self.place is None else f"_{self.place}")

    @property
    def title(self) -> str:
        """The stage in words, for tables and plots: "first selection", "decoder layer 3"."""
        ordinal = _ORDINALS[self.index] if self.index < len(_ORDINALS) else f"{self.index}th"
        titles = {
            "interm": "first selection",
            "di": f"token interaction layer {self.index}",
            "selection": f"{ordinal} selection",
            "initial": "queries before layer 0",
            "layer": f"decoder layer {self.index}",
        }
        return titles[self.kind] + (" (denoising)" if self.denoising else "")

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the order in which a decoder predicts its stages."""
        return list(_NUMBERED).index(self.kind), self.index

    @property
    def is_refined(self) -> bool:
        """Whether the stage predicts from the decoder's queries, not from selected tokens."""
        return self.kind in ("initial", "layer")

    def of_denoising(self) -> "Stage":
        """The same stage for the denoising queries."""
        return replace(self, denoising=True)

    @classmethod
    def from_name(cls, name: str) -> "Stage":
        """Read :attr:`name` back, as files of results hold it; ``place`` is not part of it.

        Raises:
            ValueError: if no stage has this name.
        """
        plain = name.removeprefix("dn.")
        kind, separator, index = plain.partition(".")
        if kind not in _NUMBERED or (separator == ".") != _NUMBERED[kind] or (separator and not index.isdecimal()):
            raise ValueError(f"{name!r} is not a stage; stages are interm, di.N, selection.N, initial, and layer.N.")
        return cls(kind, int(index or 0), denoising=plain != name)  # type: ignore[arg-type]


def decoder_stages(num_layers: int, *, initial: bool) -> list[Stage]:
    """The stages of a decoder's queries in order: "initial" if wanted, then one per layer."""
    stages = [Stage("initial")] if initial else []
    stages += [Stage("layer", index) for index in range(num_layers)]
    return [replace(stage, place=place) for place, stage in enumerate(stages[:-1])] + stages[-1:]


def is_final_loss(name: str) -> bool:
    """Whether a loss belongs to the last stage: "loss_mask" does, "loss_mask_3" and "loss_mask_dn" do not."""
    return _INTERMEDIATE_LOSS.search(name) is None
