"""DI-MaskDINO: joint object detection and instance segmentation (NeurIPS 2024), on detectron2.

Importing the package registers every part of the model under the name that configurations use, so that
``detectron2.modeling.build_model`` finds it.
"""

from dimaskdino import meta_arch

__all__ = ["meta_arch"]
__version__ = "0.1.0"
