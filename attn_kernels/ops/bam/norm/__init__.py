"""BatchNorm + ReLU of a map: ``r = relu((c - mean) / sqrt(var + eps) * weight + bias)``; or ``sum_c w * r + b`` of it.

Ioffe and Szegedy, ICML 2015. |c| is the bytes of c. The sum over the channels is a 1x1 convolution to one channel, of
which neither r nor its gradient is ever written.

Forward 2 launches, in evaluation 1: statistics of the batch read c, |c|; the second reads c and writes r, 2|c|.
Backward 2 launches: the parameters' gradients from dr and c, 2|c|; the second reads dr and c and writes dc, 3|c|.
Behind a 1x1 convolution r and dr are one value per pixel.
Saved: c, and mean and 1 / standard deviation, O(C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kernels.ops.bam.norm.backward import Gradients, launch_backward
from attn_kernels.ops.bam.norm.forward import Outputs, launch_forward
from attn_kernels.ops.common import batch_norm
from attn_kernels.ops.common.layout import contiguous, dense
from attn_kernels.ops.common.operator import (
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from reference._common import accumulation_dtype, is_plain_layer

# Channels of a map that a program holds at once at most, where it adds them up.
ADDED_CHANNELS = 128


def _allocate(
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add_weight: Tensor | None,
    add_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    batch_statistics: bool,
    update: bool,
    momentum: float | None,
    eps: float,
) -> Outputs:
    n, channels, h, w = c.shape
    r = torch.empty_like(c) if add_weight is None else c.new_empty((n, 1, h, w))
    return Outputs(r, c.new_empty((2, channels), dtype=accumulation_dtype(c)))


def _allocate_backward(
    dr: Tensor,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add_weight: Tensor | None,
    add_bias: Tensor | None,
    statistics: Tensor,
    batch_statistics: bool,
) -> Gradients:
    parameters = weight, bias, add_weight, add_bias
    return Gradients(torch.empty_like(c), *(c.new_empty(0) if p is None else torch.empty_like(p) for p in parameters))


forward_op = register(
    "batch_norm_relu(Tensor c, Tensor? weight, Tensor? bias, Tensor? add_weight, Tensor? add_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, "
    "bool batch_statistics, bool update, float? momentum, float eps) -> (Tensor, Tensor)",
    _allocate,
    launch_forward,
)
backward_op = register(
    "batch_norm_relu_backward(Tensor dr, Tensor c, Tensor? weight, Tensor? bias, Tensor? add_weight, "
    "Tensor? add_bias, Tensor statistics, bool batch_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    launch_backward,
)


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c, weight, bias, add_weight, add_bias, running_mean, running_var, batches, *options):
        parameters = weight, bias, add_weight, add_bias
        r, statistics = forward_op(c, *parameters, running_mean, running_var, batches, *options)
        save_tensors(ctx, c, *parameters, statistics)
        ctx.batch_statistics, _, _, ctx.eps = options
        return r

    @staticmethod
    def backward(ctx, dr):
        c, *parameters, statistics = saved_tensors(ctx)
        no_buffers_or_options = (None,) * 7
        if torch.is_grad_enabled():
            formula = _formula(ctx.batch_statistics, ctx.eps, statistics)
            return *reference_gradients(formula, (c, *parameters), (dr,)), *no_buffers_or_options
        dc, *gradients = backward_op(dr, c, *parameters, statistics, ctx.batch_statistics)
        gradients = (None if p is None else g for p, g in zip(parameters, gradients, strict=True))
        return dc, *gradients, *no_buffers_or_options


def _formula(batch_statistics: bool, eps: float, statistics: Tensor):
    """BatchNorm by the statistics that the forward pass used, ReLU, and the convolution where there is one."""

    def formula(c, weight, bias, add_weight, add_bias):
        dtype = c.dtype
        c, weight, bias = (t if t is None else t.to(statistics.dtype) for t in (c, weight, bias))
        if batch_statistics:
            r = F.batch_norm(c, None, None, weight, bias, training=True, eps=eps).relu()
        else:
            mean, invstd = statistics[:, None, :, None, None]
            r = (c - mean) * invstd
            r = r if weight is None else r * weight[:, None, None]
            r = (r if bias is None else r + bias[:, None, None]).relu()
        if add_weight is not None:
            add_bias = add_bias if add_bias is None else add_bias.to(r.dtype)
            r = F.conv2d(r, add_weight.to(r.dtype), add_bias)
        return r.to(dtype)

    return formula


def is_fusable(norm: object, activation: object) -> bool:
    """Whether the kernels can stand for these two layers: a plain BatchNorm2d, a plain ReLU, plain tensors."""
    return batch_norm.is_fusable(norm) and is_plain_layer(activation, nn.ReLU) and batch_norm.has_usual_state(norm)


def can_add(conv: object, channels: int) -> bool:
    """Whether the kernels can stand for this layer behind them: a plain 1x1 convolution of few channels to one."""
    return (
        is_plain_layer(conv, nn.Conv2d)
        and (conv.in_channels, conv.out_channels) == (channels, 1)
        and channels <= ADDED_CHANNELS
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.weight.shape == (1, channels, 1, 1)
        and (conv.bias is None or conv.bias.shape == (1,))
        and batch_norm.is_plain(conv)
    )


def batch_norm_relu(c: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d | None = None) -> Tensor:
    """``conv(relu(norm(c)))``, differentiable, of the map ``c`` (N, C, H, W); in its dtype and, without conv, layout.

    ``norm`` and ``conv`` as :func:`is_fusable` and :func:`can_add` want them. The buffers are updated in the kernels.
    """
    add = (None, None) if conv is None else (conv.weight, conv.bias)
    parameters = contiguous(norm.weight, norm.bias, *add)
    function = _BatchNormReLU.apply if needs_grad(c, *parameters) else _inference
    return function(dense(c), *parameters, *batch_norm.buffers(norm), *batch_norm.options(norm))


def _inference(*args) -> Tensor:
    return forward_op(*args)[0]
