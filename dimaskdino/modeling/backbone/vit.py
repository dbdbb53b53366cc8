"""Plain vision transformers of timm through a simple feature pyramid (``MODEL.BACKBONE.NAME build_vit_backbone``)."""

import logging
import math
from typing import Any

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from dimaskdino.errors import ConfigError
from dimaskdino.modeling.backbone.timm import check_known, creation_message

logger = logging.getLogger(__name__)

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_STRIDE = 16  # of the transformer's map
_PROBE_SIDES = (64, 96)


class ViTBackbone(Backbone):
    """A plain transformer whose last map becomes features of strides 4 to 32.

    Images of any size are zero-padded to a multiple of 32. For patches of other sides than 16 px, they are resized so
    that a patch covers 16 px.

    Source: ViTDet (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", 2022).

    Args:
        name: of timm's model, with or without a weight tag, such as ``vit_small_patch16_dinov3``.
        out_features: some of res2 to res5.
        out_channels: of each feature.
        pretrained: fetch timm's weights.
        drop_path_rate: stochastic depth of the last block.
        in_channels: channels of the image.
        freeze: keep the transformer as it is; only the pyramid is trained.
        lora: rank, alpha, and names of the layers that adapters are added to; then they and the pyramid are trained.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: list[str],
        out_channels: int = 256,
        pretrained: bool = False,
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
        freeze: bool = False,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        unknown = [key for key in out_features if key not in STRIDES]
        if unknown or not out_features:
            raise ConfigError(f"MODEL.VIT.OUT_FEATURES is {out_features}; name some of {', '.join(STRIDES)}.")
        self.vit = _create(name, pretrained=pretrained, drop_path_rate=drop_path_rate, in_chans=in_channels)
        dim, self.patch = _probe(name, self.vit, in_channels)
        self.frozen = freeze
        if lora is not None:
            self.vit = _with_adapters(self.vit, **lora)
        elif freeze:
            self.vit.requires_grad_(False)
        self.pyramid = nn.ModuleDict({key: _level(STRIDES[key], dim, out_channels) for key in out_features})
        self._out_features, self._out_channels = list(out_features), out_channels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read ``MODEL.VIT``."""
        node = cfg.MODEL.VIT
        lora = {"rank": node.LORA.RANK, "alpha": node.LORA.ALPHA, "layers": list(node.LORA.LAYERS)}
        return {
            "name": node.NAME,
            "out_features": list(node.OUT_FEATURES),
            "out_channels": node.OUT_CHANNELS,
            "pretrained": node.PRETRAINED,
            "drop_path_rate": node.DROP_PATH_RATE,
            "in_channels": input_shape.channels,
            "freeze": node.FREEZE,
            "lora": lora if node.LORA.RANK else None,
        }

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride, in pixels."""
        return max(STRIDES.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every output."""
        return {key: ShapeSpec(channels=self._out_channels, stride=STRIDES[key]) for key in self._out_features}

    def train(self, mode: bool = True) -> "ViTBackbone":
        """Switch to training; a frozen transformer stays without dropout."""
        super().train(mode)
        if self.frozen:
            self.vit.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map a batch of images to its features.

        Args:
            images: (B, C, H, W) float, normalized.

        Returns:
            feature name -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        height, width = images.shape[-2:]
        divisor = self.size_divisibility
        padded = F.pad(images, (0, -width % divisor, 0, -height % divisor))
        if self.patch != _STRIDE:
            sides = [side // _STRIDE * self.patch for side in padded.shape[-2:]]
            padded = F.interpolate(padded, size=sides, mode="bilinear", align_corners=False)
        feature = _last_map(self.vit, padded)
        return {
            key: self.pyramid[key](feature)[..., : math.ceil(height / stride), : math.ceil(width / stride)].contiguous()
            for key, stride in STRIDES.items()
            if key in self._out_features
        }


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ViTBackbone:
    """The backbone that ``MODEL.VIT`` names."""
    return ViTBackbone(cfg, input_shape)


def _create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    check_known(name, "MODEL.VIT.NAME")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **options)
    except TypeError as error:
        raise ConfigError(f"MODEL.VIT.NAME: {name} takes no images of any size; choose a plain transformer.") from error
    except Exception as error:  # timm and its hub client raise many kinds; each is about the name or the download
        raise ConfigError(creation_message(name, pretrained, error, node="MODEL.VIT")) from error


def _last_map(vit: Any, images: Tensor) -> Tensor:
    """(B, C, H / patch, W / patch): the normed tokens of the last block, without class and register tokens."""
    return vit.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]


@torch.no_grad()
def _probe(name: str, vit: nn.Module, in_channels: int) -> tuple[int, int]:
    """Channels of the last map, and the side of a patch, from a small image that is not square."""
    patch = getattr(getattr(vit, "patch_embed", None), "patch_size", None)
    if not hasattr(vit, "forward_intermediates") or patch is None or patch[0] != patch[1]:
        raise ConfigError(f"MODEL.VIT.NAME: {name} is no plain transformer of square patches; see MODEL.TIMM.")
    height, width = (side // _STRIDE * patch[0] for side in _PROBE_SIDES)
    weight = next(vit.parameters())
    image = torch.zeros(1, in_channels, height, width, device=weight.device, dtype=weight.dtype)
    found = _last_map(vit.eval(), image)
    vit.train()
    expected = (height // patch[0], width // patch[0])
    if found.shape[-2:] != expected:
        raise ConfigError(f"MODEL.VIT.NAME: {name} gives a map of {tuple(found.shape[-2:])}, not {expected}.")
    return found.shape[1], int(patch[0])


def _level(stride: int, dim: int, out_channels: int) -> nn.Sequential:
    """From the map of stride 16 to a feature of another stride."""
    layers: list[nn.Module] = []
    width = dim
    if stride == STRIDES["res2"]:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU()]
        layers += [nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)]
        width = dim // 4
    elif stride == STRIDES["res3"]:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
        width = dim // 2
    elif stride == STRIDES["res5"]:
        layers += [nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
    layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)]
    return nn.Sequential(*layers)


def _with_adapters(vit: nn.Module, *, rank: int, alpha: float, layers: list[str]) -> nn.Module:
    """Add LoRA's adapters to the layers of these names; everything else of the transformer is frozen.

    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("MODEL.VIT.LORA needs the package peft: pip install 'dimaskdino[lora]'.") from error
    try:
        adapted = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), vit)
    except (AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"MODEL.VIT.LORA: rank {rank} and layers {layers} cannot be used ({reason:.200}).") from error
    count = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    logger.info("LoRA of rank %d: %.2f M parameters of the transformer are trained.", rank, count / 1e6)
    return adapted
