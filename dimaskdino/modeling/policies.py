"""How the layers of a model are computed, set from outside of it: compiled, recomputed in the backward pass."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.utils.checkpoint import checkpoint

from dimaskdino.errors import ConfigError, check_choice
from dimaskdino.layers import FeedForward
from dimaskdino.layers.blocks import blocks_of

logger = logging.getLogger(__name__)

PARTS = {"backbone": "backbone", "encoder": "sem_seg_head.pixel_decoder", "decoder": "sem_seg_head.predictor"}
COMPILED_PARTS = ("encoder", "decoder")


def check_policies(cfg: CfgNode, model: nn.Module) -> None:
    """Check that the model has the layers that the keys of this module name; changes nothing.

    Raises:
        ConfigError: names the key and the parts.
    """
    _chosen_layers(model, "MODEL.COMPILE", cfg.MODEL.COMPILE, COMPILED_PARTS)
    _chosen_layers(model, "SOLVER.ACTIVATION_CHECKPOINTING", cfg.SOLVER.ACTIVATION_CHECKPOINTING)


def checkpoint_activations(cfg: CfgNode, model: nn.Module) -> None:
    """Compute the layers of SOLVER.ACTIVATION_CHECKPOINTING again in the backward pass instead of keeping their inside.

    Gradients are the same to the last bit: random numbers are drawn again as in the forward pass. Layers that update
    running statistics would update them twice, and are left as they are.
    """
    layers = _chosen_layers(model, "SOLVER.ACTIVATION_CHECKPOINTING", cfg.SOLVER.ACTIVATION_CHECKPOINTING)
    chosen = [layer for layer in layers if not _updates_statistics(layer)]
    for layer in chosen:
        _recompute(layer)
    if layers:
        left = (
            f"; {len(layers) - len(chosen)} update running statistics and do not" if len(chosen) < len(layers) else ""
        )
        logger.info("%d layers are computed again in the backward pass%s.", len(chosen), left)


def compile_layers(cfg: CfgNode, model: nn.Module, backend: str = "inductor") -> None:
    """Compile the layers of MODEL.COMPILE: once for all image sizes, in the first iterations.

    The names of the weights stay. Where compiling fails, the log says so once and the layers are computed as without.
    """
    failed: list[Exception] = []
    for layer in _chosen_layers(model, "MODEL.COMPILE", cfg.MODEL.COMPILE, COMPILED_PARTS):
        _compile(layer, backend, failed)


def use_channels_last(cfg: CfgNode, model: nn.Module) -> None:
    """Put the weights of convolutions into channels_last if MODEL.CHANNELS_LAST says so; their results follow."""
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _chosen_layers(
    model: nn.Module, key: str, parts: Sequence[str], choices: Sequence[str] = tuple(PARTS)
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for part in parts:
        check_choice(key, part, list(choices))
        found = _layers_of(model, part)
        if not found:
            raise ConfigError(f"{key} names {part!r}, but {type(model).__name__}'s has no repeated layers; remove it.")
        layers += found
    return layers


def _layers_of(model: nn.Module, part: str) -> list[nn.Module]:
    """Blocks of a backbone, or the transformer layers of encoder or decoder."""
    try:
        root = model.get_submodule(PARTS[part])
    except AttributeError:
        return []
    return blocks_of(root) if part == "backbone" else [each for each in root.modules() if isinstance(each, FeedForward)]


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the backbone, and the layers of encoder and decoder, as far as the model has them."""
    return list(dict.fromkeys(layer for part in PARTS for layer in _layers_of(model, part)))


def _updates_statistics(layer: nn.Module) -> bool:
    return any(
        isinstance(each, nn.modules.batchnorm._NormBase) and each.track_running_stats for each in layer.modules()
    )


def _compile(layer: nn.Module, backend: str, failed: list[Exception]) -> None:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    eager = layer.forward
    compiled = torch.compile(eager, dynamic=True, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                failed.append(error)
                reason = " ".join(str(error).split())[:200]
                logger.warning("MODEL.COMPILE: compiling failed (%s); the layers are not compiled.", reason)
        return eager(*args, **kwargs)

    layer.forward = forward


def _recompute(layer: nn.Module) -> None:
    forward = layer.forward

    def forward_again_in_backward(*args: Any, **kwargs: Any) -> Any:
        if layer.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    layer.forward = forward_again_in_backward
