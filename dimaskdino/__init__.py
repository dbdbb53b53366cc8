"""DI-MaskDINO: joint object detection and instance segmentation (NeurIPS 2024), on detectron2.

Importing the package registers every part of the model under the name that configurations use, so that
``detectron2.modeling.build_model`` finds it.
"""

import logging

from dimaskdino.cpu import set_up_libraries

set_up_libraries()
# On machines without a GPU, torch warns of a CUDA toolkit in every process.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

from dimaskdino import modeling  # noqa: E402 (loads torch)

__all__ = ["modeling"]
__version__ = "0.1.0"
