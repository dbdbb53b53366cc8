"""What must hold where a training goes on from a checkpoint, and what is said where the configuration has changed."""

import logging
import os
from typing import Any

from detectron2.utils import comm
from torch.optim import Optimizer

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

NEW_RUN = "start a new run with MODEL.WEIGHTS set to the checkpoint"
# Settings of a group of parameters that come with an optimiser's state: in words, and the keys that ask for them.
RESTORED = {
    "initial_lr": ("learning rates", "SOLVER.BASE_LR and BACKBONE_MULTIPLIER"),
    "weight_decay": ("weight decays", "SOLVER.WEIGHT_DECAY, WEIGHT_DECAY_NORM and WEIGHT_DECAY_EMBED"),
    "momentum": ("momenta", "SOLVER.MOMENTUM"),
}

Settings = dict[str, list[float]]


def check_common_checkpoint(checkpointer: Checkpointer, *, resume: bool) -> None:
    """Refuse a job whose processes would start from different checkpoints; all of them must call this.

    Each looks for the last checkpoint by itself, and the main process alone writes it: where machines do not share the
    folder, those without a checkpoint would train another model, and wait for the others in the end.

    Raises:
        UserError: in every process.
    """
    found = comm.all_gather(_what_is_found(checkpointer) if resume else "was not given --resume")
    if len(set(found)) > 1:
        who = ", ".join(f"process {found.index(what)} {what}" for what in dict.fromkeys(found))
        raise UserError(
            f"--resume: the processes of this job would start from different checkpoints of OUTPUT_DIR "
            f"{checkpointer.save_dir}: {who}. OUTPUT_DIR must be a folder that all machines share."
        )


def _what_is_found(checkpointer: Checkpointer) -> str:
    if not checkpointer.has_checkpoint():
        return "finds none"
    path = checkpointer.get_checkpoint_file()
    missing = "" if checkpointer.path_manager.isfile(path) else ", which does not exist"
    return f"finds {os.path.basename(path)}{missing}"


def check_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse the state of an optimiser of another kind, or over other groups of parameters.

    Args:
        optimizer: that is to go on.
        state: what the `state_dict` of an optimiser gave.

    Raises:
        CheckpointError: that says what differs.
    """
    groups, given = optimizer.param_groups, state["param_groups"]
    # A newer torch adds settings; only two kinds of optimiser have settings each that the other has not.
    here, there = ({name for group in each for name in group} for each in (groups, given))
    if here - there and there - here:
        ours, theirs = (", ".join(sorted(names)) for names in (here - there, there - here))
        raise CheckpointError(
            f"its optimiser is of another kind than SOLVER.OPTIMIZER: it has {theirs}, and not {ours}; {NEW_RUN}."
        )
    sizes, sizes_given = ([len(group["params"]) for group in each] for each in (groups, given))
    if sizes != sizes_given:
        raise CheckpointError(
            f"its optimiser has groups of {sizes_given} parameters, the configured one of {sizes}: the parameters that "
            f"train, or those that share a learning rate and weight decay ({RESTORED['initial_lr'][1]}; "
            f"{RESTORED['weight_decay'][1]}), are others; {NEW_RUN}."
        )


def settings_of(optimizer: Optimizer) -> Settings:
    """What :data:`RESTORED` names, by group of parameters."""
    groups = optimizer.param_groups
    return {name: [group[name] for group in groups] for name in RESTORED if all(name in group for group in groups)}


def warn_of_restored_settings(configured: Settings, restored: Settings) -> None:
    """Say which settings of the optimiser stay as they were when the run began, whatever the configuration asks for."""
    for name, asked in configured.items():
        if (kept := restored.get(name, asked)) != asked:
            what, keys = RESTORED[name]
            logger.warning(
                "--resume: the %s of the run stay %s; %s ask for %s. To train with those, %s.",
                what,
                kept,
                keys,
                asked,
                NEW_RUN,
            )
