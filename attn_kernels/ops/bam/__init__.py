"""BAM: ``y = act(x * (1 + sigmoid(gate_c(mean_p x) * gate_s(x))) + residual)``.

Park et al., BMVC 2018, as published (a product of the two logits). |x| is the bytes of x.

The full-size tensors are fused in two operators:
- squeeze: the channel means and the reducing 1x1 convolution from one read of x, |x|. Backward: reads dy and x, writes
  dx, the gradient by way of the apply included, and sums for the weight's, 3|x|.
- apply: reads x, writes y, 2|x| (+ |x| residual). Backward: reads dy and x, writes sums for the gradients of both
  logits, 2|x| (+ |x| for dy behind the ReLU, which is the residual's gradient).
Of the branches between them, on 1/16 of the channels, BatchNorm + ReLU are kernels too (norm/), the rest
PyTorch's: three maps, of which forward moves 13/16 |x| and backward 20/16 |x|. Forward 3.8|x|, backward 6.25|x|;
launches 8 and 8, and PyTorch's, sums over programs among them. Saved: x, the logits and five maps of 1/16 |x|; one bit
per element with ReLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from attn_kernels.ops.bam.backward import launch_dlogits, launch_dx
from attn_kernels.ops.bam.forward import empty_squeezed, launch_apply, launch_squeeze
from attn_kernels.ops.bam.norm import batch_norm_relu, can_add, is_fusable
from attn_kernels.ops.common.batch_norm import is_plain
from attn_kernels.ops.common.epilogue import empty_dresidual, empty_mask, unmask
from attn_kernels.ops.common.layout import contiguous, factors, like
from attn_kernels.ops.common.operator import (
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from reference._common import accumulation_dtype, is_plain_layer
from reference.bam import channel_logits, check_logits, convolve_by, spatial_layer


def _allocate_squeeze(x, weight, bias):
    return empty_squeezed(x, weight)


def _allocate_apply(x, channel, spatial, residual, relu, save):
    return torch.empty_like(x), empty_mask(x, relu and save)


def _launch_apply(outputs, x, channel, spatial, residual, relu, save):
    launch_apply(outputs, x, channel, spatial, residual, relu)


def _allocate_dlogits(dy, x, channel, spatial, mask, relu):
    return (
        channel.new_empty(channel.shape, dtype=accumulation_dtype(x)),
        torch.empty_like(spatial),
        empty_dresidual(x, relu),
    )


def _launch_dlogits(gradients, dy, x, channel, spatial, mask, relu):
    launch_dlogits(gradients, dy, x, channel, spatial, mask)


def _allocate_dx(dy, x, channel, spatial, dmean, dreduced, weight):
    return torch.empty_like(x), dmean.new_empty(weight.numel() + weight.shape[0])


squeeze_op = register(
    "bam_squeeze(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)", _allocate_squeeze, launch_squeeze
)
apply_op = register(
    "bam_apply(Tensor x, Tensor channel, Tensor spatial, Tensor? residual, bool relu, bool save) -> (Tensor, Tensor)",
    _allocate_apply,
    _launch_apply,
)
dlogits_op = register(
    "bam_dlogits(Tensor dy, Tensor x, Tensor channel, Tensor spatial, Tensor mask, bool relu) "
    "-> (Tensor, Tensor, Tensor)",
    _allocate_dlogits,
    _launch_dlogits,
)
dx_op = register(
    "bam_dx(Tensor dy, Tensor x, Tensor channel, Tensor spatial, Tensor dmean, Tensor dreduced, Tensor weight) "
    "-> (Tensor, Tensor)",
    _allocate_dx,
    launch_dx,
)


class _Squeeze(torch.autograd.Function):
    """x to its means and its reduced map; and to three slots, which nobody reads, of the shapes of x and both logits.

    dx is computed here, since it needs the branches' gradients. The backward of the apply comes first, and hands over
    dy behind the ReLU and both logits as the "gradients" of the slots.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        save_tensors(ctx, x, weight, bias)
        mean, reduced = squeeze_op(x, weight, bias)
        n, c, h, w = x.shape
        # view_as may change strides
        return mean, reduced, torch.ops.aten.alias(x), mean.new_empty((n, c)), x.new_empty((n, 1, h, w))

    @staticmethod
    def backward(ctx, dmean, dreduced, dy, channel, spatial):
        x, weight, bias = saved_tensors(ctx)
        if torch.is_grad_enabled():
            formula = _squeeze_formula(dmean.dtype)
            return tuple(reference_gradients(formula, (x, weight, bias), (dmean, dreduced)))
        dmean, channel, spatial = contiguous(dmean, channel, spatial)
        dx, dparameters = dx_op(like(dy, x), x, channel, spatial, dmean, like(dreduced, x), weight)
        dweight, dbias = dparameters.split([weight.numel(), weight.shape[0]])
        return dx, dweight.view_as(weight).to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def _squeeze_formula(dtype: torch.dtype):
    def formula(x, weight, bias):
        weight, bias = (t if t is None else t.to(x.dtype) for t in (weight, bias))
        return x.mean((2, 3), dtype=dtype), F.conv2d(x, weight, bias)

    return formula


class _Apply(torch.autograd.Function):
    """x, the logits and the residual to y; the gradient of x goes by the slots, unless it will be differentiated."""

    @staticmethod
    def forward(ctx, x, channel, spatial, residual, relu, *slots):
        y, mask = apply_op(x, channel, spatial, residual, relu, True)
        save_tensors(ctx, x, channel, spatial, mask)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, channel, spatial, mask = saved_tensors(ctx)
        need_dresidual, to_slots = ctx.needs_input_grad[3], [None] * (len(ctx.needs_input_grad) - 5)
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x)
            gradients = reference_gradients(_apply_formula, (x, channel, spatial), (dy,))
            return *gradients, dy if need_dresidual else None, None, *to_slots
        dchannel, dspatial, dresidual = dlogits_op(dy, x, channel, spatial, mask, ctx.relu)
        dy = dresidual if ctx.relu else dy
        if to_slots:
            to_slots = dy, channel.to(accumulation_dtype(x)), spatial.to(x.dtype)
        return None, dchannel.to(channel.dtype), dspatial, dy if need_dresidual else None, None, *to_slots


def _apply_formula(x, channel, spatial):
    return x * (1 + torch.sigmoid(channel[:, :, None, None].to(x.dtype) * spatial.to(x.dtype)))


class _Cast(torch.autograd.Function):
    """Tensors of one dtype in another, and their gradients back again, by one launch for all of them."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtype = tensors[0].dtype
        copies = _cast(tensors, dtype)
        ctx.mark_non_differentiable(*itertools.compress(copies, [not need for need in ctx.needs_input_grad[1:]]))
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        needed = list(itertools.compress(gradients, ctx.needs_input_grad[1:]))
        # A copy to a list of tensors cannot be differentiated, nor run under the vmap of gradients in a batch.
        if torch.is_grad_enabled() or any(map(is_legacy_batchedtensor, needed)):
            casts = iter([g.to(ctx.dtype) for g in needed])
        else:
            casts = iter(_cast(needed, ctx.dtype))
        return None, *(next(casts) if need else None for need in ctx.needs_input_grad[1:])


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def _cast_convolutions(layers: Sequence[nn.Module], dtype: torch.dtype) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Weight and bias in ``dtype`` of the convolutions that have them in another, but for one that kernels compute."""
    convs = [
        layer
        for layer in layers
        if is_plain_layer(layer, nn.Conv2d)
        and layer.weight.dtype != dtype
        and not can_add(layer, layer.in_channels)
        and is_plain(layer)
    ]
    states = [(conv.weight,) if conv.bias is None else (conv.weight, conv.bias) for conv in convs]
    tensors = list(itertools.chain(*states))
    if len({t.dtype for t in tensors}) != 1 or torch.compiler.is_compiling():  # torch.compile fuses casts itself
        return {}
    casts = iter(_Cast.apply(dtype, *tensors))
    return {conv: tuple(itertools.islice(casts, len(state))) for conv, state in zip(convs, states, strict=True)}


def _spatial_logits(reduced: Tensor, gate_s: nn.Sequential) -> Tensor:
    """``reference.bam.spatial_logits``, with kernels for BatchNorm, ReLU and the convolution to one channel."""
    t, layers = reduced, list(gate_s)[1:]
    casts = _cast_convolutions(layers, reduced.dtype)
    while layers:
        layer, *behind = layers
        if behind and is_fusable(layer, behind[0]) and _is_map(t, layer.num_features, reduced):
            last = [conv for conv in behind[1:2] if can_add(conv, layer.num_features)]
            t = batch_norm_relu(t, layer, *last)
            layers = behind[1 + len(last) :]
        elif layer in casts and t.dtype == reduced.dtype:
            t, layers = convolve_by(t, layer, *casts[layer]), behind
        else:
            t, layers = spatial_layer(t, layer), behind
    return t


def _is_map(t: Tensor, channels: int, reduced: Tensor) -> bool:
    """Whether ``t`` is what check_bam has seen; layers of other kinds may make anything of a map."""
    n, _, h, w = reduced.shape
    return (
        type(t) is type(reduced)
        and t.shape == (n, channels, h, w)
        and t.dtype == reduced.dtype
        and channels * h * w < 2**30  # offsets within a sample are 32 bits wide
    )


def bam(x: Tensor, gate_c: nn.Sequential, gate_s: nn.Sequential, residual: Tensor | None, relu: bool) -> Tensor:
    """The fused operator, differentiable; ``x`` and ``residual`` (N, C, H, W), dense in the same layout."""
    reduce = gate_s[0]
    weight, bias = factors(x, reduce.weight, reduce.bias)
    squeeze = _Squeeze.apply if needs_grad(x, weight, bias) else squeeze_op
    mean, reduced, *slots = squeeze(x, weight, bias)
    channel, spatial = check_logits(x, channel_logits(mean, gate_c), _spatial_logits(reduced, gate_s))
    channel, spatial = contiguous(channel, spatial)
    if needs_grad(x, channel, spatial, residual):
        return _Apply.apply(x, channel, spatial, residual, relu, *slots)
    return apply_op(x, channel, spatial, residual, relu, False)[0]
