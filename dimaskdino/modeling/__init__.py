"""The papers' models, in the folders that Mask DINO's users know. Importing this registers every part."""

from dimaskdino.modeling import backbone, criterion, meta_arch, pixel_decoder, postprocessing, transformer_decoder

__all__ = ["backbone", "criterion", "meta_arch", "pixel_decoder", "postprocessing", "transformer_decoder"]
