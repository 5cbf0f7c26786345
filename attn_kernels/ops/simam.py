"""SimAM: ``y = act(x * sigmoid(d / (4 * (sum_p(d) / n + lambda)) + 0.5) + residual)``, ``d = (x - mean_p(x))^2``.

Yang et al., ICML 2021, equations 5 and 6; n = max(P - 1, 1). |x| is the bytes of x.

Forward, 1 launch, 2|x| (+ |x| residual). A plane that does not fit a program is read again, backwards, from L2.
Backward, 1 launch, 3|x| (+ |x| dresidual); likewise. With t = x - mean, q = 1 / (4 * (variance + lambda)),
s = sigmoid(q t^2 + 0.5) and u = dy s x (1 - s) q t:
    dx = dy s + 2 (u - 4 q t sum_p(u t) / n - sum_p(u) / P).
Saved: x, and mean and q of planes that do not fit a program; one bit per element with ReLU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common import tiling
from attn_kernels.ops.common.epilogue import (
    empty_dresidual,
    empty_mask,
    load_epilogue_grad,
    optional,
    residual_grad,
    store_epilogue,
    unmask,
)
from attn_kernels.ops.common.layout import is_channels_last, like
from attn_kernels.ops.common.operator import (
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from attn_kernels.ops.common.scalar import number, number_bits
from attn_kernels.ops.common.tile import aligned, at_pixel, channel_block, channels, load_tile, store_tile
from attn_kernels.ops.common.tiling import Geometry, Tile, cdiv, geometry, next_power_of_2
from reference._common import accumulation_dtype
from reference.simam import simam as formula


@triton.jit
def _deviations(b_x, b_mean, p, P):
    """t of a tile's pixels, from p on; 0 from P on."""
    return tl.where((p + tl.arange(0, b_x.shape[1]) < P)[None, :], b_x - b_mean[:, None], 0.0)


@triton.jit
def _moments(b_x, p, P):
    """How many of a tile's pixels, from p on, are below P; their mean, deviations and the sum of their squares."""
    count = tl.minimum(P - p, b_x.shape[1]).to(b_x.dtype)
    b_mean = tl.sum(b_x, axis=1) / count
    b_t = _deviations(b_x, b_mean, p, P)
    return count, b_mean, b_t, tl.sum(b_t * b_t, axis=1)


@triton.jit
def _inverse(b_m2, P, e_lambda):
    """q, from the sum of squared deviations."""
    return 1 / (4 * (b_m2 / tl.maximum(P - 1, 1) + e_lambda))


@triton.jit
def _attention(b_t, b_qt):
    """s = sigmoid(q t^2 + 0.5), and 1 - s."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    b_exp = tl.exp2(b_qt * b_t * -LOG2_E - 0.5 * LOG2_E)
    # Of 1 to 1.6: the root and a square are two instructions, a division is ten.
    b_root = tl.rsqrt(1 + b_exp)
    b_s = b_root * b_root
    return b_s, b_exp * b_s


@triton.jit
def _gated(b_x, b_t, b_q):
    b_s, _ = _attention(b_t, b_t * b_q[:, None])
    return b_x * b_s


@triton.jit(do_not_specialize=["e_lambda"])
def simam_fwd_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    saved_ptr,  # (N, 2, C), written unless WHOLE, or None: mean and q
    C,
    P,
    e_lambda,  # number_bits
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """y of BLOCK_C planes. Reads x once if the planes fit the tile (WHOLE), else twice."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, P = aligned(C, P, TILE)
    e_lambda = number(e_lambda, ACC)
    at = channel_block(tl.program_id(0), C, P, TILE)
    if WHOLE:
        b_x = load_tile(x_ptr, at, TILE)
        _, _, b_t, b_m2 = _moments(b_x, 0, P)
        b_y = _gated(b_x, b_t, _inverse(b_m2, P, e_lambda))
        store_epilogue(b_y, y_ptr, residual_ptr, mask_ptr, at, RELU, TILE)
    else:
        b_mean = tl.zeros([BLOCK_C], ACC)
        b_m2 = tl.zeros([BLOCK_C], ACC)
        for p in range(0, P, BLOCK_P):
            b_tile = load_tile(x_ptr, at_pixel(at, p), TILE)
            # With those of the pixels before as in Chan et al., 1983.
            count, b_tile_mean, _, b_tile_m2 = _moments(b_tile, p, P)
            b_delta = b_tile_mean - b_mean
            b_mean += b_delta * (count / (p + count))
            # 0 at first, also where delta^2 would be infinite.
            b_m2 += b_tile_m2 + b_delta * (b_delta * (p * count / (p + count)))
        b_q = _inverse(b_m2, P, e_lambda)
        if saved_ptr is not None:
            o_c = channels(at, TILE)
            tl.store(saved_ptr + at.sample * 2 * C + o_c, b_mean, mask=o_c < C)
            tl.store(saved_ptr + (at.sample * 2 + 1) * C + o_c, b_q, mask=o_c < C)
        for i in range(0, tl.cdiv(P, BLOCK_P)):
            p = (tl.cdiv(P, BLOCK_P) - 1 - i) * BLOCK_P  # backwards: the end of the planes was read last
            b_tile = load_tile(x_ptr, at_pixel(at, p), TILE, "evict_first")
            b_y = _gated(b_tile, b_tile - b_mean[:, None], b_q)
            store_epilogue(b_y, y_ptr, residual_ptr, mask_ptr, at_pixel(at, p), RELU, TILE, "evict_first")


@triton.jit
def _local_grads(b_dy, b_x, b_t, b_q):
    """dx as far as it does not go through the moments, and sum_p(u), sum_p(u t); u is 0 where dy and t are."""
    b_qt = b_t * b_q[:, None]
    b_s, b_rest = _attention(b_t, b_qt)
    b_direct = b_dy * b_s
    b_u = b_direct * (b_x * b_rest) * b_qt  # in this order, for x t may be no float32
    return b_direct + 2 * b_u, tl.sum(b_u, axis=1), tl.sum(b_u * b_t, axis=1)


@triton.jit
def _x_grad(b_t, b_local, b_q, b_sum_u, b_sum_ut, P):
    """dx, from the sums over whole planes."""
    b_slope = 8 * b_q * (b_sum_ut / tl.maximum(P - 1, 1))
    b_dmean = 2 * b_sum_u / P + 0 * b_slope  # NaN where a sum is infinite, as in the reference, which subtracts them
    return b_local - b_t * b_slope[:, None] - b_dmean[:, None]


@triton.jit(do_not_specialize=["e_lambda"])
def simam_bwd_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    saved_ptr,  # (N, 2, C): mean and q; not read if WHOLE
    dx_ptr,  # (N, C, P), written
    dresidual_ptr,  # (N, C, P), written, or None
    C,
    P,
    e_lambda,  # number_bits
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx of BLOCK_C planes. Reads dy and x once if the planes fit the tile (WHOLE), else twice; writes dx."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, P = aligned(C, P, TILE)
    e_lambda = number(e_lambda, ACC)
    at = channel_block(tl.program_id(0), C, P, TILE)
    if WHOLE:
        b_x = load_tile(x_ptr, at, TILE)
        b_dy = load_epilogue_grad(dy_ptr, mask_ptr, dresidual_ptr, at, TILE)
        _, _, b_t, b_m2 = _moments(b_x, 0, P)
        b_q = _inverse(b_m2, P, e_lambda)
        b_local, b_sum_u, b_sum_ut = _local_grads(b_dy, b_x, b_t, b_q)
        store_tile(_x_grad(b_t, b_local, b_q, b_sum_u, b_sum_ut, P), dx_ptr, at, TILE)
    else:
        o_c = channels(at, TILE)
        b_mean = tl.load(saved_ptr + at.sample * 2 * C + o_c, mask=o_c < C, other=0)
        b_q = tl.load(saved_ptr + (at.sample * 2 + 1) * C + o_c, mask=o_c < C, other=0)
        b_sum_u = tl.zeros([BLOCK_C], ACC)
        b_sum_ut = tl.zeros([BLOCK_C], ACC)
        for p in range(0, P, BLOCK_P):
            b_g = load_epilogue_grad(dy_ptr, mask_ptr, None, at_pixel(at, p), TILE)
            b_tile = load_tile(x_ptr, at_pixel(at, p), TILE)
            _, b_u_tile, b_ut_tile = _local_grads(b_g, b_tile, _deviations(b_tile, b_mean, p, P), b_q)
            b_sum_u += b_u_tile
            b_sum_ut += b_ut_tile
        for i in range(0, tl.cdiv(P, BLOCK_P)):
            p = (tl.cdiv(P, BLOCK_P) - 1 - i) * BLOCK_P  # backwards, as in the forward pass
            b_g = load_epilogue_grad(dy_ptr, mask_ptr, dresidual_ptr, at_pixel(at, p), TILE, "evict_first")
            b_tile = load_tile(x_ptr, at_pixel(at, p), TILE, "evict_first")
            b_t = b_tile - b_mean[:, None]
            b_local, _, _ = _local_grads(b_g, b_tile, b_t, b_q)
            b_dx = _x_grad(b_t, b_local, b_q, b_sum_u, b_sum_ut, P)
            store_tile(b_dx, dx_ptr, at_pixel(at, p), TILE, "evict_first")


def largest_plane(itemsize: int, channels_last: bool) -> int:
    """Pixels of a plane that a tile holds whole at most, a power of 2."""
    # 32 elements per thread in 16 warps; channels_last, whose sums cross warps, spills there.
    largest = (2 if channels_last else 4) * tiling.TILE if itemsize <= 4 else tiling.TILE
    return largest // _least_channels(itemsize, channels_last)


def _least_channels(itemsize: int, channels_last: bool) -> int:
    return max(tiling.SECTOR // itemsize, tiling.BYTE) if channels_last else 1


@functools.lru_cache
def whole_plane_tile(g: Geometry, backward: bool = False) -> Tile:
    """Whole planes in a tile (``block_p >= p``) where registers allow, else a tile to walk along them.

    ``backward`` holds dy beside x, in more threads.
    """
    least = _least_channels(g.itemsize, g.channels_last)
    if g.p > largest_plane(g.itemsize, g.channels_last):
        tile = tiling.plane_tile(g)
        block_c, block_p = tile.block_c, tile.block_p
    else:
        block_p = max(next_power_of_2(g.p), tiling.BYTE)
        block_c = max(least, min(tiling.TILE // block_p, next_power_of_2(g.c)))
        while block_c > least and g.n * cdiv(g.c, block_c) < 2 * g.multiprocessors:
            block_c //= 2
    thread_bytes = 64
    if backward:
        # More than 16 elements per thread take the place of other programs; more than 8 where each has its own address.
        if tiling.vector_length(g.row, g.itemsize) == 1:
            block_c, thread_bytes = max(block_c // 2, least), 32
        elif g.row * g.itemsize % 16 == 0:
            thread_bytes = min(64, 16 * g.itemsize)
    tile = Tile.of(g, block_c, block_p, thread_bytes=thread_bytes)
    return tile if backward else tile._replace(maxnreg=128)


class Outputs(NamedTuple):
    """Of the forward pass: y like x; mean and q (N, 2, C), or empty; the ReLU's bits, or empty."""

    y: Tensor
    saved: Tensor | None = None
    mask: Tensor | None = None


def _allocate(x: Tensor, residual: Tensor | None, e_lambda: float, relu: bool) -> Outputs:
    n, c, h, w = x.shape
    whole = h * w <= largest_plane(x.element_size(), is_channels_last(x))
    saved = torch.empty((n, 2, 0 if whole else c), dtype=accumulation_dtype(x), device=x.device)
    return Outputs(torch.empty_like(x), saved, empty_mask(x, relu))


def _launch(outputs: Outputs, x: Tensor, residual: Tensor | None, e_lambda: float, relu: bool) -> None:
    n, c, h, w = x.shape
    tile = whole_plane_tile(geometry(x))
    simam_fwd_kernel[(n * cdiv(c, tile.block_c),)](
        x_ptr=x,
        residual_ptr=residual,
        y_ptr=outputs.y,
        mask_ptr=optional(outputs.mask),
        saved_ptr=optional(outputs.saved),
        C=c,
        P=h * w,
        e_lambda=number_bits(e_lambda, x),
        RELU=relu,
        WHOLE=tile.block_p >= h * w,
        TILE=tile,
        **tile.options,
    )


def _allocate_inference(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x)


def _launch_inference(y: Tensor, *args) -> None:
    _launch(Outputs(y), *args)


def _allocate_backward(
    dy: Tensor, x: Tensor, saved: Tensor, mask: Tensor, e_lambda: float, need_dresidual: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_dresidual(x, need_dresidual)


def _launch_backward(
    gradients: tuple[Tensor, Tensor],
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    mask: Tensor,
    e_lambda: float,
    need_dresidual: bool,
) -> None:
    n, c, h, w = x.shape
    dx, dresidual = gradients
    tile = whole_plane_tile(geometry(x), backward=True)
    simam_bwd_kernel[(n * cdiv(c, tile.block_c),)](
        dy_ptr=like(dy, x),
        mask_ptr=optional(mask),
        x_ptr=x,
        saved_ptr=saved,
        dx_ptr=dx,
        dresidual_ptr=optional(dresidual),
        C=c,
        P=h * w,
        e_lambda=number_bits(e_lambda, x),
        WHOLE=tile.block_p >= h * w,
        TILE=tile,
        **tile.options,
    )


_ARGUMENTS = "(Tensor x, Tensor? residual, float e_lambda, bool relu)"
inference_op = register(f"simam{_ARGUMENTS} -> Tensor", _allocate_inference, _launch_inference)
forward_op = register(f"simam_forward{_ARGUMENTS} -> (Tensor, Tensor, Tensor)", _allocate, _launch)
backward_op = register(
    "simam_backward(Tensor dy, Tensor x, Tensor saved, Tensor mask, float e_lambda, bool need_dresidual) "
    "-> (Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


class _SimAM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, e_lambda, relu):
        y, *saved = forward_op(x, residual, e_lambda, relu)
        save_tensors(ctx, x, *saved)
        ctx.e_lambda, ctx.relu = e_lambda, relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, statistics, mask = saved_tensors(ctx)
        need_dresidual = ctx.needs_input_grad[1]
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x)
            (dx,) = reference_gradients(lambda x: formula(x, ctx.e_lambda), (x,), (dy,))
            return dx, dy if need_dresidual else None, None, None
        dx, dresidual = backward_op(dy, x, statistics, mask, ctx.e_lambda, ctx.relu and need_dresidual)
        return dx, residual_grad(need_dresidual, dy, dresidual), None, None


def simam(x: Tensor, residual: Tensor | None, e_lambda: float, relu: bool) -> Tensor:
    """The fused operator, differentiable; ``x`` and ``residual`` (N, C, H, W), dense in the same layout."""
    if needs_grad(x, residual):
        return _SimAM.apply(x, residual, float(e_lambda), relu)
    return inference_op(x, residual, float(e_lambda), relu)
