"""DI-MaskDINO: joint object detection and instance segmentation (NeurIPS 2024), on detectron2.

Importing the package registers every part of the model under the name that configurations use, so that
``detectron2.modeling.build_model`` finds it.
"""

import logging
from typing import TYPE_CHECKING, Any

from dimaskdino.cpu import set_up_libraries

set_up_libraries()
# On machines without a GPU, torch warns of a CUDA toolkit in every process.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

from dimaskdino import modeling  # noqa: E402 (loads torch)

if TYPE_CHECKING:
    from dimaskdino.predictor import Predictor

__all__ = ["Predictor", "modeling"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the predictor when it is first asked for, so that importing the package stays quick."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dimaskdino.predictor import Predictor

    return Predictor
