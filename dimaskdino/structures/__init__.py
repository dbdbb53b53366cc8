"""The values that flow between the parts of a model."""

from dimaskdino.structures.stages import Stage, decoder_stages, is_final_loss

__all__ = ["Stage", "decoder_stages", "is_final_loss"]
