"""The head of the model: encoder and decoder, each by its registered name."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from dimaskdino.layers.padding import PaddedBatch
from dimaskdino.modeling.registry import PIXEL_DECODER_REGISTRY, TRANSFORMER_DECODER_REGISTRY, get_registered
from dimaskdino.structures import DecoderOutput, Targets


@SEM_SEG_HEADS_REGISTRY.register()
class MaskDINOHead(nn.Module):
    """Backbone features to predictions.

    Args:
        pixel_decoder: backbone features to feature levels and mask features.
        predictor: those, and targets for denoising, to predictions.
    """

    @configurable
    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read the registered names of both parts.

        Raises:
            ConfigError: for a name that is not registered.
        """
        encoder = get_registered(
            PIXEL_DECODER_REGISTRY, cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"
        )
        decoder = get_registered(
            TRANSFORMER_DECODER_REGISTRY,
            cfg.MODEL.MaskDINO.TRANSFORMER_DECODER_NAME,
            "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME",
        )
        # The decoder first: it checks that the keys of both fit together.
        predictor = decoder(cfg)
        return {"pixel_decoder": encoder(cfg, input_shape), "predictor": predictor}

    def forward(
        self,
        features: Mapping[str, Tensor],
        targets: Sequence[Targets] | None = None,
        batch: PaddedBatch | None = None,
    ) -> DecoderOutput:
        """Predict.

        Args:
            features: of the backbone by name, (B, C_f, h_f, w_f).
            targets: of each image, in training.
            batch: the images on their canvas, for an encoder that ignores padding.
        """
        encoded = self.pixel_decoder(features) if batch is None else self.pixel_decoder(features, batch)
        return self.predictor(encoded, targets)
