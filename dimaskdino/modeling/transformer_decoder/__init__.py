"""Decoders: selection, De-Imbalance, denoising, BATO, layers, and heads."""

from dimaskdino.modeling.transformer_decoder.bato import BalanceAwareTokensOptimization
from dimaskdino.modeling.transformer_decoder.de_imbalance import DeImbalance
from dimaskdino.modeling.transformer_decoder.denoising import ContrastiveDenoising, Denoising
from dimaskdino.modeling.transformer_decoder.dimaskdino_decoder import DIMaskDINODecoder
from dimaskdino.modeling.transformer_decoder.dino_decoder import DINODecoder
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.modeling.transformer_decoder.maskdino_decoder import MaskDINODecoder
from dimaskdino.modeling.transformer_decoder.query_decoder import QueryDecoder

__all__ = [
    "BalanceAwareTokensOptimization",
    "ContrastiveDenoising",
    "DIMaskDINODecoder",
    "DINODecoder",
    "DeImbalance",
    "Denoising",
    "MaskDINODecoder",
    "PredictionHeads",
    "QueryDecoder",
]
