"""DINO's encoder: deformable attention that ignores padding."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.pixel_decoder.deformable_encoder import DeformableEncoder
from dimaskdino.modeling.registry import PIXEL_DECODER_REGISTRY


@PIXEL_DECODER_REGISTRY.register()
class DINOEncoder(DeformableEncoder):
    """:class:`DeformableEncoder` with the keys of MODEL.DINO, its levels always finest first.

    Source: DINO (Zhang et al., 2023).
    """

    @configurable
    def __init__(self, **transformer: Any) -> None:
        super().__init__(feature_order="low2high", **transformer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read MODEL.DINO.

        Raises:
            ConfigError: for features that the backbone does not give.
        """
        node = cfg.MODEL.DINO
        missing = [name for name in node.IN_FEATURES if name not in input_shape]
        if missing or not node.IN_FEATURES:
            raise ConfigError(
                f"MODEL.DINO.IN_FEATURES is {node.IN_FEATURES}; it must name some of what the backbone gives: "
                f"{', '.join(sorted(input_shape))}."
            )
        if len(node.IN_FEATURES) > node.NUM_LEVELS:
            raise ConfigError(
                f"MODEL.DINO.NUM_LEVELS is {node.NUM_LEVELS}, fewer than the {len(node.IN_FEATURES)} of IN_FEATURES."
            )
        return {
            "input_shape": {name: input_shape[name] for name in node.IN_FEATURES},
            "in_features": node.IN_FEATURES,
            "num_levels": node.NUM_LEVELS,
            "conv_dim": node.HIDDEN_DIM,
            "num_layers": node.ENC_LAYERS,
            "num_heads": node.NHEADS,
            "hidden_dim": node.DIM_FEEDFORWARD,
            "dropout": node.DROPOUT,
            "temperature": node.PE_TEMPERATURE,
            "offset": node.PE_OFFSET,
        }

    def order_levels(self, maps: list[Tensor], extra: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """All levels from the finest to the coarsest."""
        return maps + extra, maps + extra
