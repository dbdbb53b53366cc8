"""The paper: encoder, selection, De-Imbalance, BATO, decoder, heads. Importing it registers every part."""

from dimaskdino.modeling import backbone, bato, de_imbalance, decoder, encoder, sem_seg_head

__all__ = ["backbone", "bato", "de_imbalance", "decoder", "encoder", "sem_seg_head"]
