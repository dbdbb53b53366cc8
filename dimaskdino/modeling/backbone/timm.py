"""Any timm model with a feature pyramid, as a detectron2 backbone (``MODEL.BACKBONE.NAME: build_timm_backbone``)."""

import difflib
import logging
import math
from typing import Any

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from dimaskdino.errors import ConfigError

logger = logging.getLogger(__name__)

# Arguments that let a family take images of any size, or that regularise it; a family without them goes without.
_ANY_SIZE = ("strict_img_size", "dynamic_img_size")
_DROP_PATH = "drop_path_rate"


class TimmBackbone(Backbone):
    """Wraps ``timm.create_model(name, features_only=True)``; feature ``res{n}`` is the deepest one of stride 2^n.

    Image of any height and width: it is zero-padded at the bottom and right to a multiple of the coarsest stride, and
    every feature is cropped back to ceil(size / stride).
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: list[str],
        pretrained: bool = False,
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        """Build the model, and try it on an image that is not of its own size.

        Args:
            name: a timm model name, with or without a weight tag ("resnet50.a1_in1k").
            out_features: names ``res{n}``, n being log2 of the stride.
            pretrained: fetch timm's weights (over the network, or from its cache).
            drop_path_rate: stochastic depth, 0 to 1.
            in_channels: channels of the image.

        Raises:
            ConfigError: for an unknown name, a model without such strides, or weights that cannot be fetched.
        """
        super().__init__()
        options: dict[str, Any] = {"pretrained": pretrained, _DROP_PATH: drop_path_rate, "in_chans": in_channels}
        body = _create(name, **options)
        self._index = _feature_indices(name, body, out_features)
        if max(self._index.values()) < len(_info(body).channels()) - 1:
            # Built again without the stages that no output needs: they would hold parameters without gradients.
            indices = sorted(_info(body).out_indices[i] for i in self._index.values())
            body = _create(name, out_indices=indices, **options)
            self._index = _feature_indices(name, body, out_features)
        self.body = body
        self._channels_last = _is_channels_last(name, body, self._index, in_channels)
        channels, strides = _info(body).channels(), _info(body).reduction()
        self._out_features = list(out_features)
        self._out_feature_channels = {key: channels[i] for key, i in self._index.items()}
        self._out_feature_strides = {key: int(strides[i]) for key, i in self._index.items()}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read ``MODEL.TIMM``."""
        return {
            "name": cfg.MODEL.TIMM.NAME,
            "out_features": list(cfg.MODEL.TIMM.OUT_FEATURES),
            "pretrained": cfg.MODEL.TIMM.PRETRAINED,
            "drop_path_rate": cfg.MODEL.TIMM.DROP_PATH_RATE,
            "in_channels": input_shape.channels,
        }

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride of the outputs, in pixels."""
        return max(self._out_feature_strides.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every output."""
        return {
            key: ShapeSpec(channels=self._out_feature_channels[key], stride=self._out_feature_strides[key])
            for key in self._out_features
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map a batch of images to its features.

        Args:
            images: (B, 3, H, W) float, normalized.

        Returns:
            feature name -> (B, C, ceil(H / stride), ceil(W / stride)).
        """
        height, width = images.shape[-2:]
        divisor = self.size_divisibility
        features = self.body(F.pad(images, (0, -width % divisor, 0, -height % divisor)))
        outputs = {}
        for key in self._out_features:
            feature, stride = features[self._index[key]], self._out_feature_strides[key]
            if self._channels_last:
                feature = feature.permute(0, 3, 1, 2)
            # Of positive numbers: ONNX divides whole numbers toward 0, not down.
            rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
            outputs[key] = feature[:, :, :rows, :columns].contiguous()
        return outputs


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The backbone that ``MODEL.TIMM`` names."""
    return TimmBackbone(cfg, input_shape)


def _create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    """timm.create_model, without the optional arguments that the family of `name` does not take."""
    check_known(name)
    options = {"strict_img_size": False, "dynamic_img_size": True, **options}
    while True:
        try:
            return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
        except TypeError as error:
            refused = [key for key in (*_ANY_SIZE, _DROP_PATH) if key in options and f"'{key}'" in str(error)]
            if not refused:
                raise
            if refused == [_DROP_PATH] and options[_DROP_PATH] > 0:
                raise ConfigError(f"MODEL.TIMM.DROP_PATH_RATE: {name} has no stochastic depth; set it to 0.") from error
            for key in refused:
                del options[key]
        except Exception as error:  # timm and its hub client raise many kinds; each is about the name or the download
            raise ConfigError(creation_message(name, pretrained, error)) from error


def _info(body: nn.Module) -> Any:
    """Timm's record of the channels and strides of what `body` returns."""
    return body.feature_info


def check_known(name: str, key: str = "MODEL.TIMM.NAME") -> None:
    """Raise ConfigError if timm has no model of a name."""
    if ":" in name or timm.is_model(name):  # "hf-hub:..." and "local-dir:..." are looked up by timm itself
        return
    closest = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"the closest names are {', '.join(closest)}" if closest else "see timm.list_models()"
    raise ConfigError(f"{key}: timm {timm.__version__} has no model {name!r}; {hint}.")


def creation_message(name: str, pretrained: bool, error: Exception, *, node: str = "MODEL.TIMM") -> str:
    """What to say of an error of timm's."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if pretrained:
        return (
            f"{node}.PRETRAINED: the weights of {name} could not be fetched ({reason}). Without a network, set "
            f"{node}.PRETRAINED to False and MODEL.WEIGHTS to a file of the weights."
        )
    return f"{node}.NAME: {name} cannot be built as a feature pyramid ({reason})."


def _feature_indices(name: str, body: nn.Module, out_features: list[str]) -> dict[str, int]:
    """Position, in the list that `body` returns, of each of `out_features`; the deepest where strides repeat."""
    strides = _info(body).reduction()
    found = {f"res{int(math.log2(s))}": i for i, s in enumerate(strides) if s > 0 and math.log2(s).is_integer()}
    absent = [key for key in out_features if key not in found]
    if absent or not out_features:
        raise ConfigError(
            f"MODEL.TIMM.OUT_FEATURES: {name} has no {', '.join(absent) or 'feature asked for'}; its features have "
            f"strides {', '.join(map(str, strides))}, which are {', '.join(found) or 'no powers of two'}."
        )
    return {key: found[key] for key in out_features}


@torch.no_grad()
def _is_channels_last(name: str, body: nn.Module, indices: dict[str, int], in_channels: int) -> bool:
    """Run a small image that is neither square nor of the model's own size; whether maps come as (B, H, W, C).

    Raises:
        ConfigError: if the model takes one size of image only, or its maps are not of the sizes that it declares.
    """
    channels, strides = _info(body).channels(), _info(body).reduction()
    height, width = 3 * max(strides), 5 * max(strides)
    weight = next(body.parameters())
    try:
        features = body.eval()(torch.zeros(1, in_channels, height, width, device=weight.device, dtype=weight.dtype))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"MODEL.TIMM.NAME: {name} takes no images of other sizes than its own ({' '.join(str(error).split())})."
        ) from error
    finally:
        body.train()
    shapes = [tuple(features[i].shape[1:]) for i in indices.values()]
    maps = [(channels[i], height // strides[i], width // strides[i]) for i in indices.values()]
    if shapes == [(h, w, c) for c, h, w in maps]:
        return True
    if shapes != maps:
        raise ConfigError(f"MODEL.TIMM.NAME: {name} gives features of shape {shapes} where maps of {maps} are needed.")
    return False
