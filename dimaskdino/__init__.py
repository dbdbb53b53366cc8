"""DI-MaskDINO: joint object detection and instance segmentation (NeurIPS 2024), on detectron2.

Importing the package registers every part of the model under the name that configurations use, so that
``detectron2.modeling.build_model`` finds it.
"""

import os

# Before torch starts its threads: on busy cores, OpenMP threads that spin while they wait for each other take the time
# that the others need. Two of them on two shared cores made a training step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# oneDNN keeps the last 1,024 convolutions and products that it compiled, each for one size, with their buffers:
# gigabytes on a CPU where images have many sizes. A training step with images of one size compiles fewer than 256.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

from typing import TYPE_CHECKING, Any

from dimaskdino import modeling

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
