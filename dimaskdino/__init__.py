"""DI-MaskDINO: joint object detection and instance segmentation (NeurIPS 2024), on detectron2.

Importing the package makes ``detectron2.modeling.build_model`` find every part of the model under the name that
configurations use.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from dimaskdino.after_import import after_import
from dimaskdino.cpu import set_up_libraries

set_up_libraries()
# On machines without a GPU, torch warns of a CUDA toolkit in every process.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# The parts are registered when detectron2's registries exist; until then nothing here loads torch.
after_import("detectron2.modeling", lambda: importlib.import_module("dimaskdino.modeling"))

if TYPE_CHECKING:
    from dimaskdino import modeling
    from dimaskdino.predictor import Predictor

__all__ = ["Predictor", "modeling"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what takes seconds when it is first asked for."""
    if name == "modeling":
        return importlib.import_module("dimaskdino.modeling")
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dimaskdino.predictor import Predictor

    return Predictor
