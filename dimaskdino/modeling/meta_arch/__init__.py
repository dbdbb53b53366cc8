"""Meta-architectures: images to losses or results."""

from dimaskdino.modeling.meta_arch.dino import DINO
from dimaskdino.modeling.meta_arch.maskdino import DIMaskDINO, MaskDINO, MaskDINOHead, build_model, needs_masks

__all__ = ["DINO", "DIMaskDINO", "MaskDINO", "MaskDINOHead", "build_model", "needs_masks"]
