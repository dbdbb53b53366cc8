"""Steps with numbers that are not finite: what to do about them, and the file to compute such a step again from."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from dimaskdino.checkpoint import replacing
from dimaskdino.layers.shards import gathered, local

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]

FOLDER = "nonfinite"  # in OUTPUT_DIR
POLICIES = ("stop", "skip")
MOST_FILES = 3  # of a process in a run
MOST_IN_A_ROW = 20  # steps that are skipped before the run stops
_PLAIN = (str, int, float, bool, type(None))


class NonFiniteError(FloatingPointError):
    """A cost, loss, gradient, running statistic or weight of a step is not finite."""

    def __init__(self, message: str, terms: list[str], losses: dict[str, Tensor] | None = None) -> None:
        super().__init__(message)
        self.terms = terms
        self.losses = {name: value.detach().float().cpu() for name, value in (losses or {}).items()}


class NonFiniteSteps:
    """Stops the run at a step that is not finite, or skips it and counts (SOLVER.NONFINITE); writes a replay file."""

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self.skips = cfg.SOLVER.NONFINITE == "skip"
        self.skipped = 0
        self._in_a_row = self._files = 0
        self._last = -2

    def handle(self, error: NonFiniteError, step: Any) -> None:
        """Write the step to a file, then undo it, or end the run by raising the error again, with the path."""
        weights = unwrapped(step.model).named_parameters()
        bad = [name for name, weight in weights if not local(weight).isfinite().all()]
        step.undo()
        note = self._write(error, step)
        if bad:
            raise NonFiniteError(
                f"These weights are not finite: {', '.join(bad)}. First seen through {error.terms[0]} ({error}){note} "
                "Go on from the last checkpoint with --resume, and lower SOLVER.BASE_LR.",
                [*bad, *error.terms],
            ) from error
        self._in_a_row = self._in_a_row + 1 if step.iter == self._last + 1 else 1
        self._last = step.iter
        if not self.skips or self._in_a_row > MOST_IN_A_ROW:
            why = f" {MOST_IN_A_ROW} steps before it were skipped as well." if self.skips else ""
            raise NonFiniteError(f"{error}{note}{why}", error.terms, error.losses) from error
        self.skipped += 1
        logger.warning("Skipped (SOLVER.NONFINITE; %d so far): %s%s", self.skipped, error, note)

    def _write(self, error: NonFiniteError, step: Any) -> str:
        """Write the replay file; returns the end of the message."""
        self._files += 1
        if self._files > MOST_FILES:
            return ""
        path = Path(self._cfg.OUTPUT_DIR, FOLDER, f"iteration_{step.iter:07d}.process{comm.get_rank()}.pth")
        weights = gathered(unwrapped(step.model).state_dict(), keep=True)
        content = {
            "config": self._cfg.dump(),
            "model": {name: value.cpu() for name, value in weights.items()},
            "batch": encode(step.batch),
            "seed": step.seed,
            "iteration": step.iter,
            "process": comm.get_rank(),
            "processes": comm.get_world_size(),
            "terms": error.terms,
            "losses": error.losses,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                torch.save(content, partial)
        except (OSError, RuntimeError) as failure:
            logger.warning("The step cannot be written to %s: %s", path, failure)
            return ""
        return f" `python tools/replay.py {path}` computes this step again."


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a data-parallel wrapper."""
    return getattr(model, "module", model)


def encode(batch: Batch) -> list[dict[str, Any]]:
    """A batch as tensors, text and numbers alone, which torch reads without running code; what else it has is left out.

    Masks take a bit a pixel.
    """
    return [{name: value for name, given in each.items() if (value := _encoded(given)) is not None} for each in batch]


def _encoded(value: Any) -> Any:
    if isinstance(value, Instances):
        fields = {name: _encoded(field) for name, field in value.get_fields().items()}
        return {"size": list(value.image_size), "fields": fields}
    if isinstance(value, Boxes):
        return {"boxes": value.tensor.cpu()}
    if isinstance(value, BitMasks):
        bits = np.packbits(value.tensor.cpu().numpy().astype(bool), axis=-1)
        return {"bits": torch.from_numpy(bits), "width": value.tensor.shape[-1]}
    if isinstance(value, Tensor):
        return value.cpu()
    return value if isinstance(value, _PLAIN) else None


def decode(batch: list[dict[str, Any]]) -> Batch:
    """The reverse of :func:`encode`."""
    return [{name: _decoded(value) for name, value in each.items()} for each in batch]


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "boxes" in value:
        return Boxes(value["boxes"])
    if "bits" in value:
        masks = np.unpackbits(value["bits"].numpy(), axis=-1, count=value["width"])
        return BitMasks(torch.from_numpy(masks.astype(bool)))
    return Instances(tuple(value["size"]), **{name: _decoded(field) for name, field in value["fields"].items()})
