"""Convolutions and linear layers that are faster on a CPU: same weights, same results up to rounding.

A frozen batch norm is folded into its convolution, 3x3 convolutions with many channels use Winograd's algorithm, and
oneDNN runs linear layers and 1x1 convolutions, for which torch has slower code. In evaluation, weights are folded once,
also on a GPU; in training, where they change, at every step.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dimaskdino.layers import winograd
from dimaskdino.layers.exporting import is_watched
from dimaskdino.layers.precision import is_under_autocast

# Winograd's algorithm pays off with this many channels; with more, transforming the weights takes too long.
_WINOGRAD_CHANNELS = range(128, 257)
# Multiplications of a linear layer from which oneDNN pays off. It compiles a product for each number of rows, which
# in the decoder changes with the number of denoising queries.
_WORTHWHILE = 100_000_000
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class _Prepared:
    """Folded weights, and what they were computed from."""

    source: list[Any]
    weight: Tensor
    bias: Tensor | None


class FastConv2d(Conv2d):
    """detectron2's convolution, in the fastest way that its shape allows.

    In evaluation without gradients, the folded weights are computed at first use, and again whenever the weights or
    the norm change. They are not part of the state dict, and are dropped when training begins.
    """

    _prepared: _Prepared | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W), normalize, and activate."""
        gradients = torch.is_grad_enabled()
        if not _applies(x, self.weight) or ((gradients or self.training) and not _runs_in_onednn(x)):
            return super().forward(x)
        if gradients or self.training:
            x = _Convolution.apply(x, self.weight, *self._scale_and_shift(), self._shape())
        else:
            prepared = self._prepare()
            x = _convolve(x, prepared.weight, prepared.bias, self._shape())
        if self.norm is not None and not self._folds():
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def train(self, mode: bool = True) -> "FastConv2d":
        """Drop the weights of evaluation where training begins."""
        if mode:
            self._prepared = None
        return super().train(mode)

    def _folds(self) -> bool:
        return type(self.norm) is FrozenBatchNorm2d

    def _shape(self) -> "_Shape":
        return _Shape(self.padding, self.stride, self.dilation, self.groups, self._uses_winograd())

    def _scale_and_shift(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the channels of the result: float32 (O,) each; None for 1 and for 0."""
        if not self._folds():
            return None, self.bias
        norm = self.norm
        scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
        shift = norm.bias.float() - norm.running_mean.float() * scale
        return scale, shift if self.bias is None else shift + self.bias.float() * scale

    def _prepare(self) -> _Prepared:
        norm = self.norm if self._folds() else None
        tensors = [self.weight, self.bias]
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var] if norm is not None else []
        # A tensor made in inference mode does not count its changes.
        source = [
            (x.data_ptr(), x.dtype, x.device, 0 if x.is_inference() else x._version) for x in tensors if x is not None
        ]
        if self._prepared is None or self._prepared.source != source:
            scale, shift = self._scale_and_shift()
            weight = _scaled(self.weight, scale)
            if self._uses_winograd():
                weight = winograd.transform_weight(weight)
            elif weight.device.type == "cpu":
                weight = weight.contiguous(memory_format=torch.channels_last)
            self._prepared = _Prepared(source, weight, None if shift is None else shift.to(weight.dtype))
        return self._prepared

    def _uses_winograd(self) -> bool:
        return (
            self.kernel_size == (3, 3)
            and self.stride == self.padding == self.dilation == (1, 1)
            and self.groups == 1
            and self.in_channels in _WINOGRAD_CHANNELS
            and self.out_channels in _WINOGRAD_CHANNELS
            and self.weight.dtype == torch.float32
            and self.weight.device.type == "cpu"
        )


class FastLinear(nn.Linear):
    """A linear layer that oneDNN runs on a CPU where it has many rows, as in the encoder."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not _applies(x, self.weight) or not _runs_in_onednn(x) or x.dim() < 2:
            return super().forward(x)
        if x.numel() * self.out_features < _WORTHWHILE:
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias) if torch.is_grad_enabled() else _map(x, self.weight, self.bias)


def use_fast_layers(model: nn.Module) -> None:
    """Turn detectron2's convolutions and the linear layers of ``model`` into those of this module.

    Names and weights stay. Subclasses of these layers may compute something else, and are left alone.
    """
    for module in model.modules():
        if type(module) is Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = FastConv2d
        elif type(module) is nn.Linear:
            module.__class__ = FastLinear


def in_fast_layout(images: Tensor) -> Tensor:
    """Images (B, C, H, W) with channels last in memory where convolutions are faster so: on a CPU with oneDNN.

    Feature maps then become tokens without a copy.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" and _ONEDNN else images


@dataclass(frozen=True)
class _Shape:
    """The settings of a convolution; ``winograd`` says whether it uses Winograd's algorithm."""

    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    winograd: bool

    @property
    def is_linear(self) -> bool:
        """Whether a 1x1 convolution is a linear layer on each pixel."""
        return self.stride == self.dilation == (1, 1) and self.padding == (0, 0) and self.groups == 1


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape) -> Tensor:
    if shape.winograd:
        return winograd.conv3x3(x, weight, bias)
    if _runs_in_onednn(x):
        # conv2d itself leaves 1x1 convolutions to a slower form where there is one thread.
        return torch.mkldnn_convolution(x, weight, bias, shape.padding, shape.stride, shape.dilation, shape.groups)
    return F.conv2d(x, weight, bias, shape.stride, shape.padding, shape.dilation, shape.groups)


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Weights (O, ...) times a scale (O,) of their outputs."""
    return weight if scale is None else (weight.float() * scale[:, None, None, None]).to(weight.dtype)


class _Convolution(torch.autograd.Function):
    """A convolution with scaled weights, which the backward pass computes again instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, shape: _Shape
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.shape, ctx.with_shift = shape, shift is not None
        weight = _scaled(weight, scale)
        return _convolve(x, winograd.transform_weight(weight) if shape.winograd else weight, shift, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        of_input, of_weight, _, of_shift, _ = ctx.needs_input_grad
        scaled, shape = _scaled(weight, scale), ctx.shape
        wanted = {"of_input": of_input, "of_weight": of_weight}
        if shape.winograd:
            grad_x, grad_weight = winograd.conv3x3_gradients(grad, x, winograd.transform_weight(scaled), **wanted)
        elif shape.is_linear and weight.shape[2:] == (1, 1):
            rows, of_rows = (each.permute(0, 2, 3, 1) for each in (grad, x))
            grad_x, grad_weight = _linear_gradients(rows, of_rows, scaled.flatten(1), **wanted)
            grad_x = grad_x if grad_x is None else grad_x.permute(0, 3, 1, 2)
            grad_weight = grad_weight if grad_weight is None else grad_weight.view_as(weight)
        else:
            # oneDNN is slow at gradients of weights where channels come last in memory.
            taken, window = (grad.contiguous(), x.contiguous(), scaled), (shape.stride, shape.padding, shape.dilation)
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                *taken, None, *window, False, (0, 0), shape.groups, (of_input, of_weight, False)
            )
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, scale)
        return grad_x, grad_weight, None, grad.sum((0, 2, 3)) if of_shift else None, None


class _Linear(torch.autograd.Function):
    """A linear layer whose products oneDNN computes, except for the gradient of the weights: torch is faster there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _map(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        grads = _linear_gradients(grad, x, weight, of_input=of_input, of_weight=of_weight)
        return *grads, grad.flatten(0, -2).sum(0) if of_bias else None


def _linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, *, of_input: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` (..., C) and of ``weight`` (O, C) from that of the result, (..., O)."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = _map(rows, weight.t(), None).view(x.shape) if of_input else None
    return grad_x, rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None


def _map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _applies(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast code may run: not while torch compiles, traces, or transforms the layer, nor under autocast."""
    watched = is_watched() or torch._C._are_functorch_transforms_active()
    return not watched and x.dtype == weight.dtype and x.numel() > 0 and not is_under_autocast(x.device)


def _runs_in_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN and bool(torch.backends.mkldnn.enabled)
