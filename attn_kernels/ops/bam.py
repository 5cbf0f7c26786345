"""BAM: ``y = act(x * (1 + sigmoid(gate_c(mean_p x) * gate_s(x))) + residual)``.

Park et al., BMVC 2018, as published (a product of the two logits). N = bytes of x.

What touches x is fused in two operators; the branches between them, on 1/16 of the channels, stay PyTorch's:
- squeeze: the channel means (a kernel) and the reducing 1x1 convolution (cuDNN) read x, 2N. It hands x on, so that its
  backward receives the gradient of the apply and adds both of its own to it in one pass: reads that and writes dx, 2N,
  after the weight's gradient (cuDNN) has read x, N.
- apply: reads x, writes y, 2N (+ N residual). Backward: reads dy and x, writes the gradient of x and sums for those of
  both logits, 3N (+ N dresidual).
Forward 4N, backward 6N. Saved: x, and the logits; one bit an element with ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from attn_kernels.ops import _config as config
from attn_kernels.ops._channel import pool
from attn_kernels.ops._device import aligned, load_tail_grad, load_tile, store_tail, store_tile
from attn_kernels.ops._launch import pixel_tile, tile_options
from attn_kernels.ops._library import (
    contiguous,
    empty_mask,
    like,
    needs_grad,
    reference_gradients,
    register,
    unmask,
)
from reference._common import accumulation_dtype
from reference.bam import channel_logits, spatial_logits


@triton.jit
def _attention(channel_ptr, b_spatial, i_n, o_c, C):
    """The channel logits, and the gate of a tile."""
    b_channel = tl.load(channel_ptr + i_n * C + o_c, mask=o_c < C, other=0).to(b_spatial.dtype)
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
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P
    o_p = p + tl.arange(0, BLOCK_P)
    b_spatial = tl.load(spatial_ptr + i_n * P + o_p, mask=o_p < P, other=0).to(ACC)
    for c in range(0, C, BLOCK_C):
        _, b_gate = _attention(channel_ptr, b_spatial, i_n, c + tl.arange(0, BLOCK_C), C)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_y = b_x * (1 + b_gate)
        store_tail(b_y, y_ptr, residual_ptr, mask_ptr, i_n, c, p, C, P, RELU, CHANNELS_LAST, BLOCK_C, BLOCK_P)


@triton.jit
def apply_bwd_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    channel_ptr,  # (N, C)
    spatial_ptr,  # (N, P)
    dx_ptr,  # (N, C, P), written
    dresidual_ptr,  # (N, C, P), written, or None
    dchannel_ptr,  # (N, blocks, C), written: sums over the pixels of each block
    dspatial_ptr,  # (N, P), written
    C,
    P,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx = dy * (1 + gate) and both logits' gradients, of BLOCK_P pixels. Reads dy and x, writes dx."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = dspatial_ptr.dtype.element_ty
    blocks = tl.cdiv(P, BLOCK_P)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = tl.program_id(0) % blocks
    p = i_b * BLOCK_P
    o_p = p + tl.arange(0, BLOCK_P)
    b_spatial = tl.load(spatial_ptr + i_n * P + o_p, mask=o_p < P, other=0).to(ACC)
    b_dspatial = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_channel, b_gate = _attention(channel_ptr, b_spatial, i_n, o_c, C)
        b_dy = load_tail_grad(dy_ptr, mask_ptr, dresidual_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        store_tile(b_dy * (1 + b_gate), dx_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_dlogit = b_dy * b_x * b_gate * (1 - b_gate)
        b_dspatial += b_dlogit * b_channel[:, None]
        b_dchannel = tl.sum(b_dlogit * b_spatial[None, :], axis=1)
        tl.store(dchannel_ptr + (i_n * blocks + i_b) * C + o_c, b_dchannel, mask=o_c < C)
    tl.store(dspatial_ptr + i_n * P + o_p, tl.sum(b_dspatial, axis=0), mask=o_p < P)


@triton.jit
def squeeze_bwd_kernel(
    dx_apply_ptr,  # (N, C, P)
    dreduced_ptr,  # (N, H, P)
    weight_ptr,  # (H, C)
    dmean_ptr,  # (N, C)
    dx_ptr,  # (N, C, P), written
    C,
    P,
    H,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dx = its gradient in the apply + dmean / P + weight^T @ dreduced. Reads and writes one full-size tensor each."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = dmean_ptr.dtype.element_ty
    # Products of 16-bit operands are exact in tf32 on the tensor cores.
    PRECISION: tl.constexpr = "tf32" if dx_ptr.dtype.element_ty.primitive_bitwidth == 16 else "ieee"
    c_blocks = tl.cdiv(C, BLOCK_C)
    p_blocks = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    i_n = (pid // (c_blocks * p_blocks)).to(tl.int64)
    p = pid // c_blocks % p_blocks * BLOCK_P
    c = pid % c_blocks * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_dx = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        p_weight = weight_ptr + o_h[None, :].to(tl.int64) * C + o_c[:, None]
        b_weight = tl.load(p_weight, mask=m_c[:, None] & (o_h < H)[None, :], other=0).to(ACC)
        # A reduced map is a sample of H channels in x's layout.
        b_dreduced = load_tile(dreduced_ptr, i_n, h, p, H, P, ACC, CHANNELS_LAST, BLOCK_H, BLOCK_P)
        b_dx += tl.dot(b_weight, b_dreduced, input_precision=PRECISION, out_dtype=ACC)
    b_dx += (tl.load(dmean_ptr + i_n * C + o_c, mask=m_c, other=0) / P)[:, None]
    b_dx += load_tile(dx_apply_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    store_tile(b_dx, dx_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)


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


def _apply_backward(
    dy: Tensor, x: Tensor, channel: Tensor, spatial: Tensor, mask: Tensor, relu: bool, need_dresidual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    tile = pixel_tile(x)
    blocks = config.cdiv(h * w, tile.block_p)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else None
    dchannel = x.new_empty((n, blocks, c), dtype=accumulation_dtype(x))
    dspatial = dchannel.new_empty((n, 1, h, w))
    apply_bwd_kernel[(n * blocks,)](
        like(dy, x),
        mask if relu else None,
        x,
        channel,
        spatial,
        dx,
        dresidual,
        dchannel,
        dspatial,
        c,
        h * w,
        **tile_options(x, tile),
    )
    dresidual = x.new_empty(0) if dresidual is None else dresidual
    return dx, dchannel.sum(1).to(channel.dtype), dspatial.to(spatial.dtype), dresidual


def _apply_backward_fake(dy, x, channel, spatial, mask, relu, need_dresidual):
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(channel), torch.empty_like(spatial), dresidual


def _mean(x: Tensor) -> Tensor:
    return pool(x, 1)[0].view(x.shape[:2])


def _mean_fake(x):
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))


def _squeeze_backward(dx_apply: Tensor, dreduced: Tensor, weight: Tensor, dmean: Tensor) -> Tensor:
    n, c, h, w = dx_apply.shape
    dx = torch.empty_like(dx_apply)
    block_c, block_p = min(max(config.next_power_of_2(c), 16), 64), min(max(config.next_power_of_2(h * w), 16), 64)
    squeeze_bwd_kernel[(n * config.cdiv(c, block_c) * config.cdiv(h * w, block_p),)](
        dx_apply,
        dreduced,
        weight,
        dmean,
        dx,
        c,
        h * w,
        weight.shape[0],
        BLOCK_H=config.hidden_block(weight.shape[0], block_c),
        **tile_options(dx_apply, config.Tile(block_c, block_p, 4)),
    )
    return dx


def _squeeze_backward_fake(dx_apply, dreduced, weight, dmean):
    return torch.empty_like(dx_apply)


apply_op = register(
    "bam_apply(Tensor x, Tensor channel, Tensor spatial, Tensor? residual, bool relu, bool save) -> (Tensor, Tensor)",
    _apply,
    _apply_fake,
)
apply_backward_op = register(
    "bam_apply_backward(Tensor dy, Tensor x, Tensor channel, Tensor spatial, Tensor mask, bool relu, "
    "bool need_dresidual) -> (Tensor, Tensor, Tensor, Tensor)",
    _apply_backward,
    _apply_backward_fake,
)
mean_op = register("bam_mean(Tensor x) -> Tensor", _mean, _mean_fake)
squeeze_backward_op = register(
    "bam_squeeze_backward(Tensor dx_apply, Tensor dreduced, Tensor weight, Tensor dmean) -> Tensor",
    _squeeze_backward,
    _squeeze_backward_fake,
)


class _Squeeze(torch.autograd.Function):
    """x to its means, its reduced map and itself."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return mean_op(x), F.conv2d(x, weight, bias), torch.ops.aten.alias(x)  # view_as may change strides

    @staticmethod
    def backward(ctx, dmean, dreduced, dx_apply):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = _squeeze_formula(dmean.dtype)
            return tuple(reference_gradients(formula, (x, weight, bias), (dmean, dreduced, dx_apply)))
        dreduced = like(dreduced, x)
        dx = squeeze_backward_op(like(dx_apply, x), dreduced, weight.flatten(1).contiguous(), dmean.contiguous())
        _, dweight, dbias = torch.ops.aten.convolution_backward(
            dreduced,
            x,
            weight,
            None if bias is None else [bias.shape[0]],
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [False, True, bias is not None],
        )
        return dx, dweight, dbias


def _squeeze_formula(dtype: torch.dtype):
    def formula(x, weight, bias):
        return x.mean((2, 3), dtype=dtype), F.conv2d(x, weight, bias), x.view_as(x)

    return formula


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, channel, spatial, residual, relu):
        y, mask = apply_op(x, channel, spatial, residual, relu, True)
        ctx.save_for_backward(x, channel, spatial, mask)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, channel, spatial, mask = ctx.saved_tensors
        need_dresidual = ctx.needs_input_grad[3]
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x) if ctx.relu else dy
            gradients = reference_gradients(_apply_formula, (x, channel, spatial), (dy,))
            return *gradients, dy if need_dresidual else None, None
        dx, dchannel, dspatial, dresidual = apply_backward_op(
            dy, x, channel, spatial, mask, ctx.relu, ctx.relu and need_dresidual
        )
        return dx, dchannel, dspatial, (dresidual if ctx.relu else dy) if need_dresidual else None, None


def _apply_formula(x, channel, spatial):
    return x * (1 + torch.sigmoid(channel[:, :, None, None].to(x.dtype) * spatial.to(x.dtype)))


def bam(x: Tensor, gate_c: nn.Sequential, gate_s: nn.Sequential, residual: Tensor | None, relu: bool) -> Tensor:
    """The fused operator, differentiable; ``x`` and ``residual`` (N, C, H, W), dense in the same layout."""
    reduce = gate_s[0]
    weight = reduce.weight.to(x.dtype)
    bias = None if reduce.bias is None else reduce.bias.to(x.dtype)
    if needs_grad(x, weight, bias):
        mean, reduced, x = _Squeeze.apply(x, weight, bias)
    else:
        mean, reduced = mean_op(x), F.conv2d(x, weight, bias)
    channel, spatial = contiguous(channel_logits(mean, gate_c), spatial_logits(reduced, gate_s))
    if needs_grad(x, channel, spatial, residual):
        return _Apply.apply(x, channel, spatial, residual, relu)
    return apply_op(x, channel, spatial, residual, relu, False)[0]
