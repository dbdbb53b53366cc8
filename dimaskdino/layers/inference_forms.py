"""Forms of convolutions and linear maps that evaluation runs in: same weights, same results to rounding, less time.

A frozen batch norm becomes a part of its convolution, 3x3 convolutions of many channels take a short cut, and on a CPU
oneDNN runs linear maps and 1x1 convolutions, for which torch takes slower forms.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from dimaskdino.layers import winograd
from dimaskdino.layers.exporting import export_form
from dimaskdino.layers.precision import is_under_autocast

# From so many channels on the short cut of 3x3 convolutions pays.
_WINOGRAD_CHANNELS = 128
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class _Prepared:
    """Weights as evaluation uses them, and what they were made of."""

    source: list[Any]
    weight: Tensor
    bias: Tensor | None
    winograd: Tensor | None


class InferenceConv2d(Conv2d):
    """detectron2's convolution, which without gradients in evaluation runs in another form.

    The weights of that form are made when they are first needed, and again after a change of those that they come from.
    They are no part of the state dict, and go when training begins. :func:`use_inference_forms` makes these of what
    a model has.
    """

    _prepared: _Prepared | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W), normalize, and activate."""
        if self.training or not _applies(x, self.weight):
            return super().forward(x)
        x = self._convolve(x, self._prepare())
        if self.norm is not None and not self._folds():
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def train(self, mode: bool = True) -> "InferenceConv2d":
        """Drop the weights of evaluation where training begins."""
        if mode:
            self._prepared = None
        return super().train(mode)

    def _folds(self) -> bool:
        return type(self.norm) is FrozenBatchNorm2d

    def _convolve(self, x: Tensor, prepared: _Prepared) -> Tensor:
        if prepared.winograd is not None:
            return winograd.conv3x3(x, prepared.winograd, prepared.bias)
        if _runs_in_onednn(x):
            # conv2d itself leaves 1x1 convolutions to a slower form where there is one thread.
            shape = (self.padding, self.stride, self.dilation, self.groups)
            return torch.mkldnn_convolution(x, prepared.weight, prepared.bias, *shape)
        return F.conv2d(x, prepared.weight, prepared.bias, self.stride, self.padding, self.dilation, self.groups)

    def _prepare(self) -> _Prepared:
        norm = self.norm if self._folds() else None
        tensors = [self.weight, self.bias]
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var] if norm is not None else []
        # A tensor made in inference mode does not count its changes.
        source = [
            (x.data_ptr(), x.dtype, x.device, 0 if x.is_inference() else x._version) for x in tensors if x is not None
        ]
        if self._prepared is None or self._prepared.source != source:
            weight, bias = self.weight, self.bias
            if norm is not None:
                scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
                shift = norm.bias.float() - norm.running_mean.float() * scale
                bias = (shift if bias is None else shift + bias.float() * scale).to(weight.dtype)
                weight = (weight.float() * scale[:, None, None, None]).to(weight.dtype)
            short = winograd.transform_weight(weight) if self._has_short_cut() else None
            if weight.device.type == "cpu":
                weight = weight.contiguous(memory_format=torch.channels_last)
            self._prepared = _Prepared(source, weight, bias, short)
        return self._prepared

    def _has_short_cut(self) -> bool:
        return (
            self.kernel_size == (3, 3)
            and self.stride == self.padding == self.dilation == (1, 1)
            and self.groups == 1
            and min(self.in_channels, self.out_channels) >= _WINOGRAD_CHANNELS
            and self.weight.dtype == torch.float32
            and self.weight.device.type == "cpu"
        )


class InferenceLinear(nn.Linear):
    """A linear map that oneDNN runs on a CPU where no gradient is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if self.training or not _applies(x, self.weight) or not _runs_in_onednn(x) or x.dim() < 2:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_inference_forms(model: nn.Module, use: bool = True) -> None:
    """Give the convolutions of detectron2 and the linear maps in ``model`` their forms, or the plain ones back.

    Names and weights stay. Classes derived from these layers may compute something else, and are left alone.
    """
    for module in model.modules():
        if not use and type(module) is InferenceConv2d:
            module._prepared = None
            module.__class__ = Conv2d
        elif not use and type(module) is InferenceLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif use and type(module) is Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = InferenceConv2d
        elif use and type(module) is nn.Linear:
            module.__class__ = InferenceLinear


def _applies(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer runs in its form of evaluation: not for gradients, and not where torch looks at the layer."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or export_form()
    return not watched and x.dtype == weight.dtype and x.numel() > 0 and not is_under_autocast(x.device)


def _runs_in_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN and bool(torch.backends.mkldnn.enabled)
