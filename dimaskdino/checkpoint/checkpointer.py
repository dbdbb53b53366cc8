"""Loading, saving and resuming: our own checkpoints, both releases' and others' backbones."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import Tensor, nn

from dimaskdino.checkpoint.backbones import BACKBONE, match_backbone
from dimaskdino.checkpoint.fitting import Misfit, compare, describe, num_classes
from dimaskdino.checkpoint.names import CLASS_KEYS, from_release, is_release
from dimaskdino.checkpoint.reading import AUTHOR, read_weights
from dimaskdino.errors import CheckpointError


class Checkpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that knows the releases' names, fits all weights or says why not, and runs no code.

    It loads by itself: our own checkpoints, those of MaskDINO's and DI-MaskDINO's releases, and backbones or
    classifiers from detectron2's model zoo, torchvision, timm and Swin's authors; local files, http(s):// and
    detectron2:// addresses.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        finetune: bool | None = None,
        trust: bool = False,
        **checkpointables: Any,
    ) -> None:
        """Say what to load into, and how strictly.

        Args:
            model: what to load into and save; a (Distributed)DataParallel wrapper is looked through.
            save_dir: where :meth:`save` writes and :meth:`resume_or_load` looks for the last checkpoint.
            save_to_disk: whether this process writes; the main process by default.
            finetune: weights are a starting point: a backbone alone is enough, and weights that depend on the number
                of classes keep their initial values where that number differs. Not when resuming. None: where there are
                `checkpointables`, that is, where a trainer loads and not an evaluation.
            trust: let weight files run code; with a warning.
            checkpointables: further objects with `state_dict` and `load_state_dict`, by name.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logging.getLogger(__name__)
        self.finetune = bool(checkpointables) if finetune is None else finetune
        self.trust = trust
        # The loaded file's weights, in the order in which the model had them that saved the file.
        self.loaded_names: list[str] = []
        self._path = ""
        self._is_resuming = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and with them the state of `checkpointables` (None: of all).

        Args:
            path: a file or an address; nothing is loaded where it is empty.
            checkpointables: names of what was given to the constructor.

        Returns:
            What else the file holds, such as "iteration".

        Raises:
            CheckpointError: if the file is absent, unreadable, would run code, does not fit the model, or does not hold
                the state of all `checkpointables`.
        """
        self._is_resuming = checkpointables is None and bool(self.checkpointables)
        self._path = path
        # Not detectron2's `load`: it resolves addresses once more, each version in its own way.
        content = FvcoreCheckpointer.load(self, self._local_path(path) if path else path, [])
        if path:
            for name in self.checkpointables if checkpointables is None else checkpointables:
                self._load_state(name, content)
        return content

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load all that the last checkpoint of the folder holds if `resume` and there is one, else weights alone.

        Args:
            path: of the weights where there is no last checkpoint, or another start is asked for.
            resume: whether to go on from the last checkpoint.

        Returns:
            As :meth:`load`.

        Raises:
            CheckpointError: as :meth:`load`, or if the file that says which checkpoint is the last one names none.
        """
        if resume and self.has_checkpoint():
            return self.load(self._last_checkpoint())
        return self.load(path, checkpointables=[])

    def _last_checkpoint(self) -> str:
        path = self.get_checkpoint_file()
        if self.path_manager.isfile(path):
            return path
        tag = os.path.join(self.save_dir, "last_checkpoint")
        name = os.path.basename(path)
        what = f"names {name}, which does not exist" if name else "is empty"
        there = ", ".join(sorted(map(os.path.basename, self.get_all_checkpoint_files()))[-3:]) or "there is none"
        raise CheckpointError(
            f"{tag} {what}; write the name of the folder's last checkpoint into it ({there}), or start anew without "
            "--resume."
        )

    def _local_path(self, path: str) -> str:
        try:
            local = self.path_manager.get_local_path(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"The weights {path} cannot be fetched: {' '.join(str(error).split())}") from error
        if not os.path.isfile(local):
            what = "is a folder, not a weight file" if os.path.isdir(local) else "does not exist"
            raise CheckpointError(f"The weight file {path} {what}; MODEL.WEIGHTS names it.")
        return local

    def _load_state(self, name: str, content: dict[str, Any]) -> None:
        """Give the checkpointable of this name its state, which `content` then no longer holds."""
        if name not in content:
            raise CheckpointError(
                f"{self._path} holds no state of a training ({name}), so that none can go on from it; start a new run "
                "with MODEL.WEIGHTS set to that file."
            )
        self.logger.info("Loading the state of %s.", name)
        try:
            self.checkpointables[name].load_state_dict(content.pop(name))
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_weights(filename, trust=self.trust)

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.pop("model")
        try:
            weights = self._weights(state, checkpoint.get(AUTHOR))
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        self.loaded_names = list(weights)
        self.model.load_state_dict(weights, strict=False)

    def _weights(self, state: Mapping[str, Tensor], author: str | None) -> dict[str, Tensor]:
        """The part of `state` to load, under our names; all that the model needs, or an error."""
        model_state = self.model.state_dict()
        may_differ = self.finetune and not self._is_resuming
        if is_release(state):
            self.logger.info("Names as in the public releases: renamed to ours.")
            state = from_release(state)
        elif not any(key in model_state and not key.startswith(BACKBONE) for key in state):
            if not may_differ:
                raise CheckpointError(
                    "The file holds no weights of this model's heads; a trained model is needed here."
                )
            return match_backbone(state, model_state, author=author)
        misfit = compare(state, model_state)
        by_class = [key for key in misfit.reshaped if key in CLASS_KEYS]
        if may_differ and by_class:
            self.logger.warning(
                "Fine-tuning from %s classes to %s: %s keep their initial values; everything else is loaded.",
                num_classes(state),
                num_classes(model_state),
                ", ".join(by_class),
            )
            state = {key: value for key, value in state.items() if key not in by_class}
            rest = [key for key in misfit.reshaped if key not in by_class]
            misfit = Misfit(missing=misfit.missing, unexpected=misfit.unexpected, reshaped=rest)
        if misfit:
            raise CheckpointError(f"The weights do not fit the model: {describe(misfit, state, model_state)}")
        return {key: value for key, value in state.items() if key in model_state}
