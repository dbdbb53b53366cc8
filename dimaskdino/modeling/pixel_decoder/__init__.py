"""Encoders: backbone features to feature tokens, and to mask features where the model has masks."""

from dimaskdino.modeling.pixel_decoder.deformable_encoder import DeformableEncoder, DINOEncoder
from dimaskdino.modeling.pixel_decoder.maskdino_encoder import MaskDINOEncoder

__all__ = ["DINOEncoder", "DeformableEncoder", "MaskDINOEncoder"]
