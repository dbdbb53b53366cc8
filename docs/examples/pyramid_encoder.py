"""Another encoder: torchvision's feature pyramid, convolutions alone, in place of the deformable transformer.

It is a base line for what attention over levels is worth. It reads IN_FEATURES, CONVS_DIM, MASK_DIM,
TOTAL_NUM_FEATURE_LEVELS, and FEATURE_ORDER of MODEL.SEM_SEG_HEAD.
"""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from dimaskdino.modeling.registry import PIXEL_DECODER_REGISTRY
from dimaskdino.structures import EncoderOutput


@PIXEL_DECODER_REGISTRY.register()
class PyramidEncoder(nn.Module):
    """A feature pyramid: its finest level makes the mask features, the others and coarser ones are tokens.

    Args:
        channels: of the backbone's features by name, finest first; the first is at the stride of the mask features.
        num_levels: of tokens, at least one less than there are features.
        finest_first: order of the levels.
        dim: channels C of the tokens.
        mask_dim: channels of the mask features.
    """

    @configurable
    def __init__(
        self, *, channels: Mapping[str, int], num_levels: int, finest_first: bool, dim: int, mask_dim: int
    ) -> None:
        super().__init__()
        self.names, self.finest_first = list(channels), finest_first
        self.pyramid = FeaturePyramidNetwork(list(channels.values()), dim)
        # Tokens of all levels must be of one scale: attention mixes them.
        self.norms = nn.ModuleList(nn.GroupNorm(32, dim) for _ in range(num_levels))
        coarser = num_levels - (len(self.names) - 1)
        self.downsample = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=2, padding=1) for _ in range(coarser))
        self.mask_features = nn.Conv2d(dim, mask_dim, 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read MODEL.SEM_SEG_HEAD."""
        head = cfg.MODEL.SEM_SEG_HEAD
        names = sorted(head.IN_FEATURES, key=lambda name: input_shape[name].stride)
        return {
            "channels": {name: input_shape[name].channels for name in names},
            "num_levels": head.TOTAL_NUM_FEATURE_LEVELS,
            "finest_first": head.FEATURE_ORDER == "low2high",
            "dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
        }

    def forward(self, features: Mapping[str, Tensor]) -> EncoderOutput:
        """Encode features (B, C_f, h_f, w_f) by name."""
        finest, *levels = self.pyramid({name: features[name] for name in self.names}).values()
        for conv in self.downsample:
            levels.append(conv(levels[-1]))
        levels = [norm(level) for norm, level in zip(self.norms, levels, strict=True)]
        return EncoderOutput(levels if self.finest_first else levels[::-1], self.mask_features(finest))
