"""The former place of BATO, for modules that import it from here."""

from dimaskdino.modeling.transformer_decoder.bato import BalanceAwareTokensOptimization

__all__ = ["BalanceAwareTokensOptimization"]
