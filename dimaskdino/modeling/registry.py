"""One registry for each part of the model that user code may replace by registering a class and naming it in YAML.

The meta-architecture and ``MaskDINOHead`` live in detectron2's own registries (``META_ARCH_REGISTRY`` and
``SEM_SEG_HEADS_REGISTRY``), backbones in its ``BACKBONE_REGISTRY``.
"""

from fvcore.common.registry import Registry

from dimaskdino.errors import ConfigError

PIXEL_DECODER_REGISTRY = Registry("PIXEL_DECODER")
PIXEL_DECODER_REGISTRY.__doc__ = """
Encoders, named by MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME; called as ``cls(cfg, input_shape)``.
"""
TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Decoders, named by MODEL.MaskDINO.TRANSFORMER_DECODER_NAME; called as ``cls(cfg)``.
"""
DE_IMBALANCE_REGISTRY = Registry("DE_IMBALANCE")
DE_IMBALANCE_REGISTRY.__doc__ = """
De-Imbalance modules, named by MODEL.MaskDINO.DI.NAME; called as ``cls(cfg)``. One whose
``evaluate_selections`` is True gets the mask features as a third argument in evaluation, and also predicts
"selection.2" and so on.
"""
BATO_REGISTRY = Registry("BATO")
BATO_REGISTRY.__doc__ = """
Balance-Aware Tokens Optimization modules, named by MODEL.MaskDINO.BATO.NAME; called as ``cls(cfg)``.
"""


def get_registered(registry: Registry, name: str, key: str) -> type:
    """The class registered under ``name``.

    Raises:
        ConfigError: when there is none; names the configuration key and what is registered.
    """
    if name not in registry:
        known = ", ".join(sorted(registered for registered, _ in registry))
        raise ConfigError(f"{key} is {name!r}, but only these are registered: {known}. Import the module that adds it.")
    return registry.get(name)
