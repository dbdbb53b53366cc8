"""One registry for each part of the model; register a class of your own and name it in YAML to replace the part.

The meta-architecture and ``MaskDINOHead`` live in detectron2's own registries (``META_ARCH_REGISTRY`` and
``SEM_SEG_HEADS_REGISTRY``), backbones in its ``BACKBONE_REGISTRY``.
"""

from collections.abc import Sequence
from typing import Any

from fvcore.common.registry import Registry

from dimaskdino.errors import ConfigError, make_part

PIXEL_DECODER_REGISTRY = Registry("PIXEL_DECODER")
PIXEL_DECODER_REGISTRY.__doc__ = """
Encoders, named by MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME or MODEL.DINO.ENCODER_NAME; called as
``cls(cfg, input_shape)``, then with the backbone's features by name, in DINO also with the
:class:`dimaskdino.layers.padding.PaddedBatch`.
"""
TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Decoders, named by MODEL.MaskDINO.TRANSFORMER_DECODER_NAME or MODEL.DINO.DECODER_NAME; called as ``cls(cfg)``.
"""
DENOISING_REGISTRY = Registry("DENOISING")
DENOISING_REGISTRY.__doc__ = """
Denoising, named by MODEL.MaskDINO.DN_NAME or MODEL.DINO.DN_NAME; called as ``cls(cfg)``, then with the
targets of each image to give :class:`dimaskdino.structures.DenoisingQueries`, or None for a batch without any.
"""
DE_IMBALANCE_REGISTRY = Registry("DE_IMBALANCE")
DE_IMBALANCE_REGISTRY.__doc__ = """
De-Imbalance modules, named by MODEL.MaskDINO.DI.NAME; called as ``cls(cfg)``. In evaluation, one that lists
``selection_stages`` is given a third argument, ``predict(stage, tokens)``, to predict those stages.
"""
BATO_REGISTRY = Registry("BATO")
BATO_REGISTRY.__doc__ = """
Balance-Aware Tokens Optimization modules, named by MODEL.MaskDINO.BATO.NAME; called as ``cls(cfg)``.
"""

HEAD_REGISTRY = Registry("QUERY_HEAD")
HEAD_REGISTRY.__doc__ = """
Further heads of every stage, named by MODEL.EXTRA_HEADS; called as ``cls(cfg, dim)`` with the width of the queries.
Each is a module that maps the normed queries (B, Q, dim) to (B, Q, ...). What it gives is in
:attr:`dimaskdino.structures.StagePrediction.extra` and, for each detection, in the field ``pred_<name>`` of results.
"""
LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """
Further terms of the criterion, named by MODEL.EXTRA_LOSSES; called as ``cls(cfg)`` to give a
:class:`dimaskdino.modeling.criterion.terms.LossTerm`.
"""
COST_REGISTRY = Registry("COST")
COST_REGISTRY.__doc__ = """
Further costs of the matcher, named by MODEL.EXTRA_COSTS; called as ``cls(cfg)`` to give a
:class:`dimaskdino.modeling.criterion.matcher.CostTerm`.
"""


def build_registered(registry: Registry, names: Sequence[str], key: str, *arguments: Any) -> dict[str, Any]:
    """What the registered classes make, by name; each name once.

    Raises:
        ConfigError: a name is not registered, is listed twice, or what it stands for cannot be made.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"{key} is {list(names)}; name each part once.")
    return {name: make_part(key, get_registered(registry, name, key), *arguments) for name in names}


def get_registered(registry: Registry, name: str, key: str) -> type:
    """The class registered under ``name``.

    Raises:
        ConfigError: when there is none; names the configuration key and what is registered.
    """
    if name not in registry:
        known = ", ".join(sorted(registered for registered, _ in registry))
        raise ConfigError(f"{key} is {name!r}, but only these are registered: {known}. Import the module that adds it.")
    return registry.get(name)
