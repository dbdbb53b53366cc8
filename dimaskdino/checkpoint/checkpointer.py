"""Loading, saving and resuming: our own checkpoints, both releases', and others' backbones."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import Tensor, nn

from dimaskdino.checkpoint.backbones import match_backbone
from dimaskdino.checkpoint.dino import COCO_IDS, COCO_NAMES, COCO_OUTPUTS, pick_coco_rows
from dimaskdino.checkpoint.fitting import (
    BACKBONE,
    BASE,
    DIGEST,
    Misfit,
    fill_frozen,
    fit_channels,
    num_classes,
    without_frozen,
)
from dimaskdino.checkpoint.folder import FINAL, TAG_FILE, newest_good
from dimaskdino.checkpoint.hub import PREFIX, HubAddress, is_address, local_path
from dimaskdino.checkpoint.names import is_class_key
from dimaskdino.checkpoint.reading import AUTHOR, CLASS_NAMES, class_names_of, read_weights, replacing, write_weights
from dimaskdino.checkpoint.releases import from_release, is_release
from dimaskdino.errors import CheckpointError
from dimaskdino.layers.shards import gathered, part_of

# The entry of a checkpoint with the moving average of the weights, and the ending of a file of that average alone.
AVERAGE, AVERAGE_ENDING = "model_ema", "_ema"
BEST = "model_best"
_SHOWN_NAMES = 20


class Checkpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that knows the releases' names, loads all weights or says why not, and runs no code.

    It loads our own checkpoints, those of the MaskDINO, DI-MaskDINO and DINO releases and of detrex's DINO, and
    backbones or classifiers from detectron2's model zoo, torchvision, timm and Swin's authors; from local files,
    http(s)://, detectron2:// and hf://.

    Args:
        model: what to load into and save; a (Distributed)DataParallel wrapper is looked through.
        save_dir: where :meth:`save` writes and :meth:`resume_or_load` looks for the last checkpoint.
        save_to_disk: whether this process writes; by default, the main process does.
        finetune: take weights as a starting point: a backbone alone is enough, and weights that depend on the classes
            keep their initial values where the classes differ. Resuming ignores it. None means True for a trainer, that
            is, with ``checkpointables``, and False for an evaluation.
        trust: let weight files run code; logged as a warning.
        class_names: the classes of the training or test data by index: saved with the weights, and compared with those
            that a file holds.
        checkpointables: further objects with ``state_dict`` and ``load_state_dict``, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        finetune: bool | None = None,
        trust: bool = False,
        class_names: Sequence[str] = (),
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logging.getLogger(__name__)
        self.finetune = bool(checkpointables) if finetune is None else finetune
        self.trust = trust
        self.class_names = list(class_names)
        # Saved with the weights: the run that they are of.
        self.run_id = ""
        # Gives the moving average of the weights, which is saved beside them.
        self.average: Callable[[], Mapping[str, Tensor]] | None = None
        # Whether checkpoints leave out frozen weights, and the file that those are from.
        self.leaves_out_frozen, self.base = False, ""
        # Whether weights or optimizer are sharded, so that all processes must call :meth:`save`.
        self.is_sharded = False
        # Names of the loaded weights, in the order of the model that saved them.
        self.loaded_names: list[str] = []
        self._path = ""
        self._is_resuming = False
        self._last: Path | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write the weights, the class names, the state of all checkpointables and ``kwargs`` to ``name``.pth.

        Raises:
            CheckpointError: a weight is not finite, or the file cannot be written; an earlier one of that name, or
                another, is still whole.
        """
        self.write(name, **kwargs)
        if self.save_dir and self.save_to_disk:
            self.tag_last_checkpoint(f"{name}.pth")

    def write(self, name: str, **kwargs: Any) -> None:
        """As :meth:`save`, but a run does not go on from this file."""
        if not (self.save_dir and (self.save_to_disk or self.is_sharded)):
            return
        path = Path(self.save_dir, f"{name}.pth")
        weights = gathered(self.model.state_dict(), keep=self.save_to_disk)
        average = gathered(self.average(), keep=self.save_to_disk) if self.average else {}
        state = {key: each.state_dict() for key, each in self.checkpointables.items()}
        state = gathered(state, keep=self.save_to_disk)
        if not self.save_to_disk:
            return
        _check_finite(path, weights)
        content = without_frozen(self.model, weights, self.base) if self.leaves_out_frozen else {"model": weights}
        average = {key: value for key, value in average.items() if key in content["model"]}
        about: dict[str, Any] = {CLASS_NAMES: self.class_names} if self.class_names else {}
        about |= {"run_id": self.run_id} if self.run_id else {}
        self.logger.info("Saving checkpoint to %s", path)
        if average and f"{name}.pth" in (FINAL, f"{BEST}.pth"):
            write_weights(path.with_name(f"{name}{AVERAGE_ENDING}.pth"), {**content, "model": average, **about})
        content |= {AVERAGE: average} if average else {}
        write_weights(path, {**content, **state, **about, **kwargs})

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the last checkpoint to ``last_checkpoint``."""
        with replacing(Path(self.save_dir, TAG_FILE)) as partial:
            partial.write_text(last_filename_basename, encoding="utf-8")
        self._last = Path(self.save_dir, last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the state of ``checkpointables`` (None: of all), from a file or an address; "" is nothing.

        Returns what else the file holds, such as "iteration".

        Raises:
            CheckpointError: the file is missing, unreadable, would run code, does not fit the model or its classes, or
                does not hold the state of all ``checkpointables``.
        """
        self._is_resuming = checkpointables is None and bool(self.checkpointables)
        self._path, self.base = path, path
        # Not detectron2's `load`: it resolves addresses once more, each version in its own way.
        content = FvcoreCheckpointer.load(self, _local_file(path) if path else path, [])
        wanted = self.checkpointables if checkpointables is None else checkpointables
        for name in wanted if path else ():
            if name not in content:
                raise CheckpointError(
                    f"{path} holds no training state ({name}), so training cannot continue from it; start a new run "
                    "with MODEL.WEIGHTS set to that file."
                )
            self.logger.info("Loading the state of %s.", name)
            try:
                self.checkpointables[name].load_state_dict(content.pop(name))
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
        return content

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load all of the folder's last checkpoint if ``resume`` and there is one, else only the weights of ``path``.

        Raises:
            CheckpointError: as :meth:`load`, or no checkpoint of the folder is whole.
        """
        if resume and self.has_checkpoint():
            return self.load(self.get_checkpoint_file())
        return self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Whether the folder has a checkpoint to go on from, whole or not."""
        return bool(self.save_dir) and (Path(self.save_dir, TAG_FILE).exists() or bool(self._newest_good()))

    def get_checkpoint_file(self) -> str:
        """Path of the newest whole checkpoint (see :func:`dimaskdino.checkpoint.folder.newest_good`); "" without any.

        Raises:
            CheckpointError: the folder had checkpoints, but none of them is whole.
        """
        if path := self._newest_good():
            return str(path)
        if not self.has_checkpoint():
            return ""
        raise CheckpointError(
            f"{self.save_dir}: {TAG_FILE} says that there is a checkpoint, but no whole one of this run is left; start "
            "over without --resume, or write the name of another checkpoint of this folder into that file."
        )

    def _newest_good(self) -> Path | None:
        if self._last is None and self.save_dir:
            self._last = newest_good(Path(self.save_dir), self.run_id)
        return self._last

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_weights(filename, trust=self.trust)

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        try:
            state = checkpoint.pop("model")
            if BASE in checkpoint:
                state = self._with_frozen(state, checkpoint)
            weights = self._weights(state, checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        self.loaded_names = list(weights)
        self._take(weights)

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        own = self.model.state_dict()
        self.model.load_state_dict({key: part_of(value, own[key]) for key, value in weights.items()}, strict=False)

    def _with_frozen(self, state: Mapping[str, Tensor], about: dict[str, Any]) -> Mapping[str, Tensor]:
        """The weights of a file that leaves frozen ones out, with these from the file that they are from."""
        self.base = about[BASE]
        if self.base:
            of_base = read_weights(_local_file(self.base), trust=self.trust)
            was = self.finetune, self._is_resuming
            self.finetune, self._is_resuming = True, False
            self._take(self._weights(of_base.pop("model"), of_base))
            self.finetune, self._is_resuming = was
        filled = fill_frozen(self.model, state, about)
        about.pop(BASE)
        about.pop(DIGEST)
        return filled

    def _weights(self, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
        """The part of ``state`` to load, under our names; everything that the model needs, or an error."""
        model_state = self.model.state_dict()
        may_differ = self.finetune and not self._is_resuming
        names = class_names_of(about)
        if is_release(state):
            self.logger.info("The file has the names of the public releases; they are renamed to ours.")
            state = from_release(state)
            if num_classes(state) == COCO_OUTPUTS and num_classes(model_state) == len(COCO_IDS):
                self.logger.info("Its outputs are numbered by category id; those of COCO's 80 categories are taken.")
                state = pick_coco_rows(state)
        elif not any(key in model_state and not key.startswith(BACKBONE) for key in state):
            if not may_differ:
                raise CheckpointError("The file holds no weights of this model's heads; give a trained model.")
            return match_backbone(state, model_state, author=about.get(AUTHOR))
        if may_differ:
            if names is None and num_classes(state) == len(COCO_NAMES):
                names = COCO_NAMES  # The releases do not say so.
            state = fit_channels(state, model_state)
            state, model_state = self._without_other_classes(state, model_state, names)
        elif names and self.class_names and names != self.class_names:
            raise CheckpointError(
                f"The weights were trained on other classes: {_difference(names, self.class_names)}. Evaluate "
                "or resume on a dataset with the file's classes, in its order."
            )
        if misfit := Misfit.between(state, model_state):
            raise CheckpointError(f"The weights do not fit the model: {misfit.describe()}")
        return {key: value for key, value in state.items() if key in model_state}

    def _without_other_classes(
        self, state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], names: list[str] | None
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Leave out the weights that depend on the classes, if these differ."""
        other_names = bool(names and self.class_names and names != self.class_names)
        shared = [key for key in state if is_class_key(key) and key in model_state]
        fresh = [key for key in shared if other_names or state[key].shape != model_state[key].shape]
        if not fresh:
            return state, model_state
        self.logger.warning(
            "Fine-tuning from %s classes to %s%s: %s keep their initial values; everything else is loaded.",
            num_classes(state),
            num_classes(model_state),
            f" ({_difference(names or [], self.class_names)})" if other_names else "",
            ", ".join(fresh),
        )
        kept = [{key: value for key, value in each.items() if key not in fresh} for each in (state, model_state)]
        return kept[0], kept[1]


def check_weights(path: str) -> None:
    """Raise CheckpointError if MODEL.WEIGHTS is neither a file nor an address; nothing is fetched."""
    try:
        if path.startswith(PREFIX):
            HubAddress.parse(path)
        elif not is_address(path):
            local_path(path)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL.WEIGHTS: {error}") from error
    if path and not is_address(path):
        _local_file(path)


def _local_file(path: str) -> str:
    local = str(local_path(path, 'set MODEL.WEIGHTS to a local file, or to "" for random weights'))
    if not os.path.isfile(local):
        what = "is a folder, not a weight file" if os.path.isdir(local) else "does not exist"
        raise CheckpointError(f"The weight file {path} {what}; MODEL.WEIGHTS names it.")
    return local


def _check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise CheckpointError(
            f"{path} is not written, because these weights are not finite: {', '.join(bad[:5])}{more}. Go on from the "
            "checkpoint before with --resume; if that does not help, lower SOLVER.BASE_LR."
        )


def _difference(theirs: list[str], ours: list[str]) -> str:
    kind = "the same in another order, " if sorted(theirs) == sorted(ours) else ""
    return f"{kind}{_shown(theirs, ours)} in the file, {_shown(ours, theirs)} in the dataset"


def _shown(names: list[str], others: list[str]) -> str:
    """All names, or of many, those from the first difference on."""
    first = next((i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1]), len(others))
    start = first if len(names) > _SHOWN_NAMES else 0
    end = start + _SHOWN_NAMES
    shown = ", ".join(f"{index} {name!r}" for index, name in enumerate(names[start:end], start=start))
    return f"{len(names)} classes ({'... ' * (start > 0)}{shown}{' ...' * (end < len(names))})"
