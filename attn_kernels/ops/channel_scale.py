"""Channel attention by any gate: ``y = act(x * gate(pools of x) + residual)``, the gate's network left to PyTorch.

For gates that ``channel_gate`` has no kernel for: a BatchNorm between the layers, a mixture of pools, a single layer,
another activation. What touches x is fused in two operators; the network between them works on (N, C) values.
N = bytes of x.

- pool: the means and maxima of the planes from one read of x, N. Backward: dx from one read of dy, the gradient by way
  of the scale included, 2N.
- scale: reads x, writes y, 2N (+ N residual). Backward: reads dy and x for the gate's gradient, 2N (+ N for dy behind
  the ReLU, which is the residual's gradient).
Forward 3N, backward 4N. Saved: x, the argmax and the gate; one bit an element with ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._channel import POOLS, empty_argmax, pool, pool_bits
from attn_kernels.ops._device import aligned, load_tail_grad, load_tile, store_tail, store_tile
from attn_kernels.ops._launch import multiprocessors, tile_options
from attn_kernels.ops._library import (
    contiguous,
    empty_mask,
    is_channels_last,
    like,
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
    unmask,
)
from reference._common import accumulation_dtype
from reference.cbam import POOLS as FORMULAS


@triton.jit
def scale_fwd_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    gate_ptr,  # (N, C)
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
    """y of BLOCK_C channels by BLOCK_P pixels. Reads x (and residual), writes y."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    i_n, c, p = _tile_of_program(C, P, BLOCK_C, BLOCK_P)
    b_gate = _load_channels(gate_ptr, i_n, c, C, ACC, BLOCK_C)
    b_y = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P) * b_gate[:, None]
    store_tail(b_y, y_ptr, residual_ptr, mask_ptr, i_n, c, p, C, P, RELU, CHANNELS_LAST, BLOCK_C, BLOCK_P)


@triton.jit
def _tile_of_program(C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample, first channel and first pixel; the pixels of a block of channels follow one another."""
    pixel_blocks = tl.cdiv(P, BLOCK_P)
    planes = tl.program_id(0) // pixel_blocks
    channel_blocks = tl.cdiv(C, BLOCK_C)
    c = planes % channel_blocks * BLOCK_C
    return (planes // channel_blocks).to(tl.int64), c, tl.program_id(0) % pixel_blocks * BLOCK_P


@triton.jit
def _load_channels(ptr, i_n, c, C, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C] values of sample i_n from (N, C)."""
    o_c = c + tl.arange(0, BLOCK_C)
    return tl.load(ptr + i_n * C + o_c, mask=o_c < C, other=0).to(ACC)


@triton.jit
def dgate_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    dresidual_ptr,  # (N, C, P), written, or None: dy behind the ReLU
    dgate_ptr,  # (N, C), written
    C,
    P,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dgate[c] = sum_p dy * x of BLOCK_C planes. Reads dy and x."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = dgate_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p in range(0, P, BLOCK_P):
        b_dy = load_tail_grad(dy_ptr, mask_ptr, dresidual_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_sum += b_dy * load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    tl.store(dgate_ptr + i_n * C + o_c, tl.sum(b_sum, axis=1), mask=o_c < C)


@triton.jit
def dx_kernel(
    dy_ptr,  # (N, C, P), behind the ReLU
    gate_ptr,  # (N, C)
    dpool_ptr,  # (N, K, C)
    argmax_ptr,  # (N, C), or None
    dx_ptr,  # (N, C, P), written
    C,
    P,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx = dy * gate + dmean / P + dmax at the first maximum, of BLOCK_C channels by BLOCK_P pixels. Reads dy."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = dpool_ptr.dtype.element_ty
    K: tl.constexpr = AVG + MAX
    i_n, c, p = _tile_of_program(C, P, BLOCK_C, BLOCK_P)
    b_gate = _load_channels(gate_ptr, i_n, c, C, ACC, BLOCK_C)
    b_dx = load_tile(dy_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P) * b_gate[:, None]
    if AVG:
        b_dx += (_load_channels(dpool_ptr, i_n * K, c, C, ACC, BLOCK_C) / P)[:, None]
    if MAX:
        b_first = _load_channels(argmax_ptr, i_n, c, C, tl.int32, BLOCK_C)
        b_dmax = _load_channels(dpool_ptr + AVG * C, i_n * K, c, C, ACC, BLOCK_C)
        o_p = p + tl.arange(0, BLOCK_P)
        b_dx += tl.where(o_p[None, :] == b_first[:, None], b_dmax[:, None], 0.0)
    store_tile(b_dx, dx_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)


def _tile(x: Tensor, divided: bool) -> tuple[config.Tile, int]:
    """A tile of x, and how many of them divide it, or divide its planes into whole ones."""
    n, c, h, w = x.shape
    tile = config.plane_tile(n, c, h * w, x.element_size(), is_channels_last(x), multiprocessors(x), divided)
    programs = n * config.cdiv(c, tile.block_c)
    return tile, programs * config.cdiv(h * w, tile.block_p) if divided else programs


def _pool(x: Tensor, pools: int) -> tuple[Tensor, Tensor]:
    return pool(x, pools)


def _pool_fake(x, pools):
    n, c, _, _ = x.shape
    values = x.new_empty((n, pools.bit_count(), c), dtype=accumulation_dtype(x))
    return values, empty_argmax(x, pools)


def _scale(x: Tensor, gate: Tensor, residual: Tensor | None, relu: bool, save: bool) -> tuple[Tensor, Tensor]:
    _, c, h, w = x.shape
    tile, programs = _tile(x, divided=True)
    y, mask = torch.empty_like(x), empty_mask(x, relu and save)
    scale_fwd_kernel[(programs,)](
        x, residual, gate, y, mask if relu and save else None, c, h * w, RELU=relu, **tile_options(x, tile)
    )
    return y, mask


def _scale_fake(x, gate, residual, relu, save):
    return torch.empty_like(x), empty_mask(x, relu and save)


def _dgate(dy: Tensor, x: Tensor, gate: Tensor, mask: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    _, c, h, w = x.shape
    tile, programs = _tile(x, divided=False)
    dgate = torch.empty_like(gate, dtype=accumulation_dtype(x))
    dresidual = torch.empty_like(x) if relu else None
    dgate_kernel[(programs,)](
        like(dy, x), mask if relu else None, x, dresidual, dgate, c, h * w, **tile_options(x, tile)
    )
    return dgate.to(gate.dtype), x.new_empty(0) if dresidual is None else dresidual


def _dgate_fake(dy, x, gate, mask, relu):
    return torch.empty_like(gate), torch.empty_like(x) if relu else x.new_empty(0)


def _dx(dy: Tensor, gate: Tensor, dpool: Tensor, argmax: Tensor, pools: int) -> Tensor:
    _, c, h, w = dy.shape
    tile, programs = _tile(dy, divided=True)
    dx = torch.empty_like(dy)
    dx_kernel[(programs,)](
        dy,
        gate,
        dpool,
        argmax if pools & 2 else None,
        dx,
        c,
        h * w,
        AVG=pools & 1,
        MAX=pools >> 1 & 1,
        **tile_options(dy, tile),
    )
    return dx


def _dx_fake(dy, gate, dpool, argmax, pools):
    return torch.empty_like(dy)


pool_op = register("channel_pool(Tensor x, int pools) -> (Tensor, Tensor)", _pool, _pool_fake)
scale_op = register(
    "channel_scale(Tensor x, Tensor gate, Tensor? residual, bool relu, bool save) -> (Tensor, Tensor)",
    _scale,
    _scale_fake,
)
dgate_op = register(
    "channel_dgate(Tensor dy, Tensor x, Tensor gate, Tensor mask, bool relu) -> (Tensor, Tensor)", _dgate, _dgate_fake
)
dx_op = register("channel_dx(Tensor dy, Tensor gate, Tensor dpool, Tensor argmax, int pools) -> Tensor", _dx, _dx_fake)


class _Pool(torch.autograd.Function):
    """x to its pools; and to two slots, which nobody reads, of the shapes of x and the gate.

    dx is computed here, for it needs the network's gradients. What it needs of the scale, whose backward comes before,
    that one returns as the "gradients" of the slots: dy behind the ReLU, and the gate.
    """

    @staticmethod
    def forward(ctx, x, pools):
        values, argmax = pool_op(x, pools)
        save_tensors(ctx, x, argmax)
        ctx.pools = pools
        # view_as may change strides
        return values, torch.ops.aten.alias(x), torch.empty_like(values[:, 0])

    @staticmethod
    def backward(ctx, dpool, dy, gate):
        x, argmax = saved_tensors(ctx)
        if torch.is_grad_enabled():
            names = [name for i, name in enumerate(POOLS) if ctx.pools >> i & 1]

            def formula(x):
                return torch.stack([FORMULAS[name](x) for name in names], 1)

            return *reference_gradients(formula, (x,), (dpool,)), None
        return dx_op(like(dy, x), *contiguous(gate, dpool), argmax, ctx.pools), None


class _Scale(torch.autograd.Function):
    """x, the gate and the residual to y; the gradient of x goes by the slots, unless it will be differentiated."""

    @staticmethod
    def forward(ctx, x, gate, residual, relu, *slots):
        y, mask = scale_op(x, gate, residual, relu, True)
        save_tensors(ctx, x, gate, mask)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, mask = saved_tensors(ctx)
        need_dresidual, to_slots = ctx.needs_input_grad[2], [None] * (len(ctx.needs_input_grad) - 4)
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x) if ctx.relu else dy
            gradients = reference_gradients(_scaled, (x, gate), (dy,))
            return *gradients, dy if need_dresidual else None, None, *to_slots
        dgate, dresidual = dgate_op(dy, x, gate, mask, ctx.relu)
        dy = dresidual if ctx.relu else dy
        if to_slots:
            to_slots = dy, gate.to(accumulation_dtype(x))
        return None, dgate, dy if need_dresidual else None, None, *to_slots


def _scaled(x, gate):
    return x * gate.to(x.dtype)[:, :, None, None]


def channel_attention(
    x: Tensor, gate: Callable[..., Tensor], pool_types: Sequence[str], residual: Tensor | None, relu: bool
) -> Tensor:
    """The fused operators, differentiable; ``x`` and ``residual`` (N, C, H, W), dense in the same layout."""
    bits = pool_bits(pool_types)
    values, *slots = _Pool.apply(x, bits) if needs_grad(x) else pool_op(x, bits)[:1]
    order = sorted(pool_types, key=POOLS.index)
    (scale,) = contiguous(gate(*(values[:, order.index(name)] for name in pool_types)))
    if needs_grad(x, scale, residual):
        return _Scale.apply(x, scale, residual, relu, *slots)
    return scale_op(x, scale, residual, relu, False)[0]
