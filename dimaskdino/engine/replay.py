"""Compute a step again from the file that :mod:`dimaskdino.engine.nonfinite` wrote, and find where it fails."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dimaskdino.checkpoint.fitting import Misfit
from dimaskdino.config import config_of_dump
from dimaskdino.data import register_all
from dimaskdino.engine.nonfinite import NonFiniteError, decode
from dimaskdino.engine.trainer import Trainer
from dimaskdino.errors import CheckpointError, UserError

_NEEDED = ("config", "model", "batch", "seed", "iteration", "process", "processes", "terms", "losses")


@dataclass
class Replay:
    """A step that was computed again."""

    terms: list[str] = field(default_factory=list)  # what is not finite now, in order; empty if everything is
    losses: dict[str, Tensor] = field(default_factory=dict)  # by name, as far as the step came
    first_module: str = ""  # the first module whose output is not finite, by name; "" if all are

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """The losses whose bits are not those of the recorded step."""
        then, now = (
            {name: value.float().view(torch.int32).item() for name, value in losses.items()}
            for losses in (recorded["losses"], self.losses)
        )
        return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


def read_replay(path: Path) -> dict[str, Any]:
    """Read a replay file as data; nothing in it is executed. Raises UserError if it is not a whole one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"The replay file {path} cannot be read ({error.strerror}).") from error
    except Exception as error:
        raise UserError(f"{path} is not a whole replay file; a run writes one to OUTPUT_DIR/nonfinite.") from error
    if not (isinstance(content, dict) and all(key in content for key in _NEEDED)):
        raise UserError(f"{path} is not a replay file; a run writes one to OUTPUT_DIR/nonfinite.")
    return content


def replay(path: Path, options: Sequence[str] = ()) -> tuple[dict[str, Any], Replay]:
    """Compute a step again, up to its gradients; returns what the file holds, and what was computed.

    It runs on one process, with the random numbers that it had; ``options`` change the file's configuration. Raises
    UserError if the file cannot be used, or is of another model than these options make of it.
    """
    recorded = read_replay(path)
    cfg = config_of_dump(recorded["config"])
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"
    cfg.merge_from_list(list(options))
    register_all(cfg=cfg)
    model = Trainer.build_model(cfg)
    if misfit := Misfit.between(recorded["model"], model.state_dict()):
        raise CheckpointError(f"The replay file {path} is of another model: {misfit.describe()}")
    model.load_state_dict(recorded["model"], strict=False)
    step = Trainer.build_step(cfg, model)
    step.data_loader, step.seed, step.iter = [decode(recorded["batch"])], recorded["seed"], recorded["iteration"]
    step.process = recorded["process"]
    done = Replay()
    with EventStorage() as storage, _watching(model, done):
        try:
            step.run_step()
            done.losses = {
                name: torch.tensor(value) for name, (value, _) in storage.latest().items() if name.startswith("loss_")
            }
        except NonFiniteError as error:
            done.terms, done.losses = error.terms, error.losses
    return recorded, done


@contextlib.contextmanager
def _watching(model: nn.Module, done: Replay) -> Iterator[None]:
    """Note the first module whose output is not finite."""
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, given: Any, output: Any) -> None:
        tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        if not done.first_module and not all(each.isfinite().all() for each in tensors):
            done.first_module = names.get(module, "")

    with nn.modules.module.register_module_forward_hook(look):
        yield
