"""Residual blocks with a backward pass written by hand, around the kernels of longtail.networks.kernels.

`blocks` is what running the modules one after the other would be (longtail.networks.Block; tests/test_kernels.py holds
the two together), with batch norm, residual and ReLU as one operation and no addition of its own where a gradient
arrives both through a block and past it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longtail.networks import kernels


def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(batch_norm(x)) in training mode, (B, C, H, W)."""
    return _NormReLU.apply(x, norm, norm.weight, norm.bias)


def blocks(x: Tensor, modules: Sequence[Any]) -> Tensor:
    """Residual blocks in training mode: (B, channels in, H, W) to (B, channels out, H', W').

    `modules` have conv1, bn1, conv2, bn2 (3x3 convolutions without bias), stride and new_channels, as
    longtail.networks.Block.
    """
    parameters = [
        parameter
        for module in modules
        for conv, norm in ((module.conv1, module.bn1), (module.conv2, module.bn2))
        for parameter in (conv.weight, norm.weight, norm.bias)
    ]
    return _Blocks.apply(x, modules, *parameters)


def shortcut(x: Tensor, stride: int, new_channels: int) -> Tensor:
    """Option A of He et al. 2016: every `stride`-th pixel, zeros for the new channels, half before and half behind."""
    if stride == 1 and not new_channels:
        return x
    before = new_channels // 2
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, new_channels - before))


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        x = kernels.channels_last(x)
        out, saved = kernels.forward(x, None, norm)
        ctx.save_for_backward(x, saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, saved = ctx.saved_tensors
        grad_x, _, grad_weight, grad_bias = kernels.backward(gradient, None, x, None, saved)
        return grad_x, None, grad_weight, grad_bias


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, modules: Sequence[Any], *parameters: Tensor) -> Tensor:
        x = kernels.channels_last(x)
        saved: list[Tensor] = []
        for module in modules:
            weight1, weight2 = module.conv1.weight.to(x.dtype), module.conv2.weight.to(x.dtype)
            inner = kernels.channels_last(F.conv2d(x, weight1, None, module.stride, 1))
            hidden, saved1 = kernels.forward(inner, None, module.bn1)
            outer = kernels.channels_last(F.conv2d(hidden, weight2, None, 1, 1))
            residual = shortcut(x, module.stride, module.new_channels)
            out, saved2 = kernels.forward(outer, residual, module.bn2)
            saved += [x, weight1, inner, saved1, hidden, weight2, outer, saved2, out]
            x = out
        ctx.save_for_backward(*saved)
        ctx.strides = [(module.stride, module.new_channels) for module in modules]
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved: list[Any] = list(ctx.saved_tensors)
        grads: list[Tensor] = []
        past: Tensor | None = None  # the gradient that comes past the next block, through its shortcut
        for stride, new_channels in reversed(ctx.strides):
            x, weight1, inner, saved1, hidden, weight2, outer, saved2, out = saved[-9:]
            del saved[-9:]
            grad_outer, past, *grads_bn2 = kernels.backward(gradient, past, outer, out, saved2)
            grad_hidden, grad_weight2 = kernels.convolution_backward(grad_outer, hidden, weight2, 1)
            grad_inner, _, *grads_bn1 = kernels.backward(grad_hidden, None, inner, None, saved1)
            gradient, grad_weight1 = kernels.convolution_backward(grad_inner, x, weight1, stride)
            if past is not None and (stride > 1 or new_channels):
                kernels.add_shortcut(gradient, past, stride)
                past = None
            grads = [grad_weight1, *grads_bn1, grad_weight2, *grads_bn2, *grads]
        return gradient if past is None else gradient + past, None, *grads
