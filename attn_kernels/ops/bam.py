"""BAM: ``y = act(x * (1 + sigmoid(gate_c(mean_p x) * gate_s(x))) + residual)``.

Park et al., BMVC 2018, as published (a product of the two logits). N = bytes of x.

What touches x is fused in two operators:
- squeeze: the channel means and the reducing 1x1 convolution from one read of x, N. Backward: reads dy and x, writes
  dx, the gradient by way of the apply included, and sums for the weight's, 3N.
- apply: reads x, writes y, 2N (+ N residual). Backward: reads dy and x, writes sums for the gradients of both logits,
  2N (+ N for dy behind the ReLU, which is the residual's gradient).
Of the branches between them, on 1/16 of the channels, BatchNorm + ReLU are kernels too (batch_norm_relu.py), the rest
PyTorch's: three maps, of which forward moves 13/16 N and backward 20/16 N. Forward 3.8N, backward 6.25N; launches 8 and
8, and PyTorch's, sums over programs among them. Saved: x, the logits and five maps of 1/16 N; one bit an element with
ReLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from attn_kernels.ops import _config as config
from attn_kernels.ops import _norm
from attn_kernels.ops._channel import load_weight
from attn_kernels.ops._device import aligned, load_tail_grad, load_tile, store_tail, store_tile
from attn_kernels.ops._launch import pixel_tile, reduce_bwd_tile, reduce_tile, tile_options
from attn_kernels.ops._library import (
    contiguous,
    empty_mask,
    factors,
    is_channels_last,
    like,
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
    unmask,
)
from attn_kernels.ops.batch_norm_relu import batch_norm_relu, can_add, is_fusable
from reference._common import accumulation_dtype, is_plain_layer
from reference.bam import channel_logits, check_logits, convolve_by, spatial_layer

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# A default as Triton 3.6 compiles it.
ZERO = tl.constexpr(0)


@triton.jit
def _attention(channel_ptr, b_spatial, i_n, o_c, C, OUTSIDE: tl.constexpr = ZERO):
    """The channel logits, OUTSIDE from C on, and the gate of a tile."""
    b_channel = tl.load(channel_ptr + i_n * C + o_c, mask=o_c < C, other=OUTSIDE).to(b_spatial.dtype)
    return b_channel, tl.sigmoid(b_channel[:, None] * b_spatial[None, :])


@triton.jit
def apply_fwd_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    channel_ptr,  # (N, C)
    spatial_ptr,  # (N, P)
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    C,
    P,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y of BLOCK_P pixels. Reads x (and residual), writes y."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(P, BLOCK_P)
    # Last pixels first: what squeeze_kernel read last is what may still be in L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    i_n = (pid // blocks).to(tl.int64)
    p = pid % blocks * BLOCK_P
    o_p = p + tl.arange(0, BLOCK_P)
    b_spatial = tl.load(spatial_ptr + i_n * P + o_p, mask=o_p < P, other=0).to(ACC)
    for c in range(0, C, BLOCK_C):
        _, b_gate = _attention(channel_ptr, b_spatial, i_n, c + tl.arange(0, BLOCK_C), C)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_y = b_x * (1 + b_gate)
        store_tail(b_y, y_ptr, residual_ptr, mask_ptr, i_n, c, p, C, P, RELU, CHANNELS_LAST, BLOCK_C, BLOCK_P)


@triton.jit
def dlogits_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    channel_ptr,  # (N, C)
    spatial_ptr,  # (N, P)
    dresidual_ptr,  # (N, C, P), written, or None: dy behind the ReLU
    dchannel_ptr,  # (N, blocks, C), written: sums over the pixels of each block
    dspatial_ptr,  # (N, P), written
    C,
    P,
    WHOLE: tl.constexpr,  # BLOCK_C divides C
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Both logits' gradients, of BLOCK_P pixels. Reads dy and x."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = dchannel_ptr.dtype.element_ty
    blocks = tl.cdiv(P, BLOCK_P)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = tl.program_id(0) % blocks
    p = i_b * BLOCK_P
    o_p = p + tl.arange(0, BLOCK_P)
    # Logits are 1 outside the map: 0 times an infinite one would be NaN, and so would the sums.
    b_spatial = tl.load(spatial_ptr + i_n * P + o_p, mask=o_p < P, other=1).to(ACC)
    b_dspatial = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for c in tl.range(0, C, BLOCK_C, num_stages=2):
        o_c = c + tl.arange(0, BLOCK_C)
        b_dy = load_tail_grad(dy_ptr, mask_ptr, dresidual_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_channel, b_gate = _attention(channel_ptr, b_spatial, i_n, o_c, C, 0 if WHOLE else 1)
        b_dlogit = b_dy * b_x * b_gate * (1 - b_gate)
        b_dspatial += b_dlogit * b_channel[:, None]
        b_dchannel = tl.sum(b_dlogit * b_spatial[None, :], axis=1)
        tl.store(dchannel_ptr + (i_n * blocks + i_b) * C + o_c, b_dchannel, mask=o_c < C)
    tl.store(dspatial_ptr + i_n * P + o_p, tl.sum(b_dspatial, axis=0), mask=o_p < P)


@triton.jit
def _product(b_weight, b_x, ACC: tl.constexpr):
    """The matrix product of operands in x's dtype, which tensor cores take as they are: 16-bit ones lose nothing."""
    if INTERPRETED:  # it would multiply the bits of bfloat16
        b_weight = b_weight.to(ACC)
        b_x = b_x.to(ACC)
    return tl.dot(b_weight, b_x, input_precision="ieee", out_dtype=ACC)


@triton.jit
def squeeze_kernel(
    x_ptr,  # (N, C, P)
    weight_ptr,  # (H, C)
    bias_ptr,  # (H,) or None
    reduced_ptr,  # (N, H, P), in x's layout, written
    mean_ptr,  # (N, blocks, C), written: sums over the pixels of each block, divided by P
    C,
    P,
    H,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The reducing convolution and the channels' means of BLOCK_P pixels. Reads x (again for each BLOCK_H units)."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    X: tl.constexpr = x_ptr.dtype.element_ty
    blocks = tl.cdiv(P, BLOCK_P)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = tl.program_id(0) % blocks
    p = i_b * BLOCK_P
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        m_h = o_h < H
        b_reduced = tl.zeros([BLOCK_H, BLOCK_P], ACC)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            b_reduced += _product(load_weight(weight_ptr, o_h, o_c, H, C, X), b_x.to(X), ACC)
            if h == 0:
                tl.store(mean_ptr + (i_n * blocks + i_b) * C + o_c, tl.sum(b_x, axis=1) / P, mask=o_c < C)
        if bias_ptr is not None:
            b_bias = tl.load(bias_ptr + o_h, mask=m_h, other=0).to(X)  # as the reference does
            b_reduced += b_bias.to(ACC)[:, None]
        # A reduced map is a sample of H channels in x's layout.
        store_tile(b_reduced, reduced_ptr, i_n, h, p, H, P, CHANNELS_LAST, BLOCK_H, BLOCK_P)


@triton.jit
def dx_kernel(
    dy_ptr,  # (N, C, P), behind the ReLU
    x_ptr,  # (N, C, P)
    channel_ptr,  # (N, C)
    spatial_ptr,  # (N, P)
    dreduced_ptr,  # (N, H, P), in x's layout
    weight_ptr,  # (H, C)
    dmean_ptr,  # (N, C)
    dx_ptr,  # (N, C, P), written
    dparameters_ptr,  # (programs, H * C + H), written: sums of both gradients over the tiles of each program
    N,
    C,
    P,
    H,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dx = dy * (1 + gate) + dmean / P + weight^T @ dreduced, and the weight's gradient, for BLOCK_C channels.

    Reads dy and x, writes dx (again for each BLOCK_H units, of which there is one block as a rule).
    """
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = dmean_ptr.dtype.element_ty
    # Products of 16-bit operands are exact in tf32. In 16 bits Triton 3.6 fails to compile this loop on sm_90.
    PRECISION: tl.constexpr = "tf32" if x_ptr.dtype.element_ty.primitive_bitwidth == 16 else "ieee"
    blocks = tl.cdiv(P, BLOCK_P)
    i_q = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    for h in range(0, H, BLOCK_H):
        if h > 0:
            tl.debug_barrier()  # other threads of this program stored the dx that is read below
        o_h = h + tl.arange(0, BLOCK_H)
        m_h = o_h < H
        # Rounded to x's dtype, in which the reference convolves.
        b_weight = load_weight(weight_ptr, o_h, o_c, H, C, x_ptr.dtype.element_ty).to(ACC)
        b_dweight = tl.zeros([BLOCK_H, BLOCK_C], ACC)
        b_dbias = tl.zeros([BLOCK_H], ACC)
        for t in range(i_q, N * blocks, tl.num_programs(1)):
            i_n = tl.cast(t // blocks, tl.int64)
            p = t % blocks * BLOCK_P
            o_p = p + tl.arange(0, BLOCK_P)
            b_dreduced = load_tile(dreduced_ptr, i_n, h, p, H, P, ACC, CHANNELS_LAST, BLOCK_H, BLOCK_P)
            b_dbias += tl.sum(b_dreduced, axis=1)
            b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            b_dweight += tl.dot(b_dreduced, tl.trans(b_x), input_precision=PRECISION, out_dtype=ACC)
            b_dx = tl.dot(tl.trans(b_weight), b_dreduced, input_precision=PRECISION, out_dtype=ACC)
            if h == 0:
                b_spatial = tl.load(spatial_ptr + i_n * P + o_p, mask=o_p < P, other=0).to(ACC)
                _, b_gate = _attention(channel_ptr, b_spatial, i_n, o_c, C)
                b_dy = load_tile(dy_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                b_dmean = tl.load(dmean_ptr + i_n * C + o_c, mask=m_c, other=0) / P
                b_dx += b_dy * (1 + b_gate) + b_dmean[:, None]
            else:
                b_dx += load_tile(dx_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            store_tile(b_dx, dx_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        p_dweight = dparameters_ptr + tl.cast(i_q, tl.int64) * H * (C + 1)
        tl.store(p_dweight + o_h[:, None] * C + o_c[None, :], b_dweight, mask=m_h[:, None] & m_c[None, :])
        tl.store(p_dweight + H * C + o_h, b_dbias, mask=o_h < tl.where(c == 0, H, 0))


def _apply(
    x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, relu: bool, save: bool
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    tile = pixel_tile(x)
    y, mask = torch.empty_like(x), empty_mask(x, relu and save)
    apply_fwd_kernel[(n * config.cdiv(h * w, tile.block_p),)](
        x,
        residual,
        channel,
        spatial,
        y,
        mask if relu and save else None,
        c,
        h * w,
        RELU=relu,
        **tile_options(x, tile),
    )
    return y, mask


def _apply_fake(x, channel, spatial, residual, relu, save):
    return torch.empty_like(x), empty_mask(x, relu and save)


def _dlogits(
    dy: Tensor, x: Tensor, channel: Tensor, spatial: Tensor, mask: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    tile = pixel_tile(x)
    blocks = config.cdiv(h * w, tile.block_p)
    dresidual = torch.empty_like(x) if relu else None
    dchannel = x.new_empty((n, blocks, c), dtype=accumulation_dtype(x))
    dspatial = torch.empty_like(spatial)
    dlogits_kernel[(n * blocks,)](
        like(dy, x),
        mask if relu else None,
        x,
        channel,
        spatial,
        dresidual,
        dchannel,
        dspatial,
        c,
        h * w,
        WHOLE=c % tile.block_c == 0,
        **tile_options(x, tile),
        maxnreg={2: 128}.get(x.element_size()),  # programs of 4 warps fit four times
    )
    dresidual = x.new_empty(0) if dresidual is None else dresidual
    return dchannel.sum(1).to(channel.dtype), dspatial, dresidual


def _dlogits_fake(dy, x, channel, spatial, mask, relu):
    return torch.empty_like(channel), torch.empty_like(spatial), torch.empty_like(x) if relu else x.new_empty(0)


def _squeeze(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    hidden = weight.shape[0]
    tile, block_h = reduce_tile(x, hidden)
    blocks = config.cdiv(h * w, tile.block_p)
    mean = x.new_empty((n, blocks, c), dtype=accumulation_dtype(x))
    reduced = _empty_reduced(x, weight)
    squeeze_kernel[(n * blocks,)](
        x,
        weight.to(x.dtype),  # in the kernel, that costs registers that it has not
        bias,
        reduced,
        mean,
        c,
        h * w,
        hidden,
        BLOCK_H=block_h,
        **tile_options(x, tile),
        num_stages=3 if x.element_size() == 2 and block_h * tile.block_p <= 2048 else 2,  # more spill
        maxnreg=168 if tile.num_warps == 4 else 128,
    )
    return mean.sum(1), reduced


def _empty_reduced(x: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = x.shape
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty((n, weight.shape[0], h, w), dtype=x.dtype, device=x.device, memory_format=layout)


def _squeeze_fake(x, weight, bias):
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x)), _empty_reduced(x, weight)


def _dx(
    dy: Tensor, x: Tensor, channel: Tensor, spatial: Tensor, dmean: Tensor, dreduced: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    hidden = weight.shape[0]
    tile, block_h, programs = reduce_bwd_tile(x, hidden)
    dx = torch.empty_like(x)
    dparameters = dmean.new_empty((programs, hidden * (c + 1)))
    dx_kernel[(config.cdiv(c, tile.block_c), programs)](
        dy,
        x,
        channel,
        spatial,
        dreduced,
        weight,
        dmean,
        dx,
        dparameters,
        n,
        c,
        h * w,
        hidden,
        BLOCK_H=block_h,
        **tile_options(x, tile),
        num_stages=2,
        maxnreg=168,
    )
    return dx, dparameters.sum(0)


def _dx_fake(dy, x, channel, spatial, dmean, dreduced, weight):
    return torch.empty_like(x), dmean.new_empty(weight.numel() + weight.shape[0])


apply_op = register(
    "bam_apply(Tensor x, Tensor channel, Tensor spatial, Tensor? residual, bool relu, bool save) -> (Tensor, Tensor)",
    _apply,
    _apply_fake,
)
dlogits_op = register(
    "bam_dlogits(Tensor dy, Tensor x, Tensor channel, Tensor spatial, Tensor mask, bool relu) "
    "-> (Tensor, Tensor, Tensor)",
    _dlogits,
    _dlogits_fake,
)
squeeze_op = register("bam_squeeze(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)", _squeeze, _squeeze_fake)
dx_op = register(
    "bam_dx(Tensor dy, Tensor x, Tensor channel, Tensor spatial, Tensor dmean, Tensor dreduced, Tensor weight) "
    "-> (Tensor, Tensor)",
    _dx,
    _dx_fake,
)


class _Squeeze(torch.autograd.Function):
    """x to its means and its reduced map; and to three slots, which nobody reads, of the shapes of x and both logits.

    dx is computed here, for it needs the branches' gradients. What it needs of the apply, whose backward comes before,
    that one returns as the "gradients" of the slots: dy behind the ReLU, and both logits.
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
            dy = unmask(dy, mask, x) if ctx.relu else dy
            gradients = reference_gradients(_apply_formula, (x, channel, spatial), (dy,))
            return *gradients, dy if need_dresidual else None, None, *to_slots
        dchannel, dspatial, dresidual = dlogits_op(dy, x, channel, spatial, mask, ctx.relu)
        dy = dresidual if ctx.relu else dy
        if to_slots:
            to_slots = dy, channel.to(accumulation_dtype(x)), spatial.to(x.dtype)
        return None, dchannel, dspatial, dy if need_dresidual else None, None, *to_slots


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
        and _norm.is_plain(layer)
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
