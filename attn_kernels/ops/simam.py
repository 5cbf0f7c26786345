"""SimAM: ``y = act(x * sigmoid(d / (4 * (sum_p(d) / n + lambda)) + 0.5) + residual)``, ``d = (x - mean_p(x))^2``.

Yang et al., ICML 2021, equations 5 and 6; n = max(P - 1, 1). N = bytes of x.

Forward, 1 launch, 2N (+ N residual). A plane that does not fit a program is read again, backwards, from L2.
Backward, 1 launch, 3N (+ N dresidual); likewise. With t = x - mean, q = 1 / (4 * (variance + lambda)),
s = sigmoid(q t^2 + 0.5) and u = dy s x (1 - s) q t:
    dx = dy s + 2 (u - 4 q t sum_p(u t) / n - sum_p(u) / P).
Saved: x, and mean and q of planes that do not fit a program; one bit an element with ReLU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._device import aligned, load_tail_grad, load_tile, number, store_tail, store_tile
from attn_kernels.ops._launch import number_bits, tile_options, whole_plane_tile
from attn_kernels.ops._library import (
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
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y of BLOCK_C planes. Reads x once if the planes fit the tile (WHOLE), else twice."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    e_lambda = number(e_lambda, ACC)
    blocks = tl.cdiv(C, BLOCK_C)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C
    if WHOLE:
        b_x = load_tile(x_ptr, i_n, c, 0, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        _, _, b_t, b_m2 = _moments(b_x, 0, P)
        b_y = _gated(b_x, b_t, _inverse(b_m2, P, e_lambda))
        store_tail(b_y, y_ptr, residual_ptr, mask_ptr, i_n, c, 0, C, P, RELU, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    else:
        b_mean = tl.zeros([BLOCK_C], ACC)
        b_m2 = tl.zeros([BLOCK_C], ACC)
        for p in range(0, P, BLOCK_P):
            b_tile = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            # With those of the pixels before as in Chan et al., 1983.
            count, b_tile_mean, _, b_tile_m2 = _moments(b_tile, p, P)
            b_delta = b_tile_mean - b_mean
            b_mean += b_delta * (count / (p + count))
            # 0 at first, also where delta^2 would be infinite.
            b_m2 += b_tile_m2 + b_delta * (b_delta * (p * count / (p + count)))
        b_q = _inverse(b_m2, P, e_lambda)
        if saved_ptr is not None:
            o_c = c + tl.arange(0, BLOCK_C)
            tl.store(saved_ptr + i_n * 2 * C + o_c, b_mean, mask=o_c < C)
            tl.store(saved_ptr + (i_n * 2 + 1) * C + o_c, b_q, mask=o_c < C)
        for i in range(0, tl.cdiv(P, BLOCK_P)):
            p = (tl.cdiv(P, BLOCK_P) - 1 - i) * BLOCK_P  # backwards: the end of the planes was read last
            b_tile = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first")
            b_y = _gated(b_tile, b_tile - b_mean[:, None], b_q)
            store_tail(
                b_y, y_ptr, residual_ptr, mask_ptr, i_n, c, p, C, P, RELU, CHANNELS_LAST, BLOCK_C, BLOCK_P,
                "evict_first",
            )  # fmt: skip


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
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx of BLOCK_C planes. Reads dy and x once if the planes fit the tile (WHOLE), else twice; writes dx."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    e_lambda = number(e_lambda, ACC)
    blocks = tl.cdiv(C, BLOCK_C)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C

    if WHOLE:
        b_x = load_tile(x_ptr, i_n, c, 0, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_dy = load_tail_grad(dy_ptr, mask_ptr, dresidual_ptr, i_n, c, 0, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        _, _, b_t, b_m2 = _moments(b_x, 0, P)
        b_q = _inverse(b_m2, P, e_lambda)
        b_local, b_sum_u, b_sum_ut = _local_grads(b_dy, b_x, b_t, b_q)
        b_dx = _x_grad(b_t, b_local, b_q, b_sum_u, b_sum_ut, P)
        store_tile(b_dx, dx_ptr, i_n, c, 0, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    else:
        o_c = c + tl.arange(0, BLOCK_C)
        b_mean = tl.load(saved_ptr + i_n * 2 * C + o_c, mask=o_c < C, other=0)
        b_q = tl.load(saved_ptr + (i_n * 2 + 1) * C + o_c, mask=o_c < C, other=0)
        b_sum_u = tl.zeros([BLOCK_C], ACC)
        b_sum_ut = tl.zeros([BLOCK_C], ACC)
        for p in range(0, P, BLOCK_P):
            b_g = load_tail_grad(dy_ptr, mask_ptr, None, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            b_tile = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            _, b_u_tile, b_ut_tile = _local_grads(b_g, b_tile, _deviations(b_tile, b_mean, p, P), b_q)
            b_sum_u += b_u_tile
            b_sum_ut += b_ut_tile
        for i in range(0, tl.cdiv(P, BLOCK_P)):
            p = (tl.cdiv(P, BLOCK_P) - 1 - i) * BLOCK_P  # backwards, as in the forward pass
            b_g = load_tail_grad(
                dy_ptr, mask_ptr, dresidual_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first"
            )  # fmt: skip
            b_tile = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first")
            b_t = b_tile - b_mean[:, None]
            b_local, _, _ = _local_grads(b_g, b_tile, b_t, b_q)
            b_dx = _x_grad(b_t, b_local, b_q, b_sum_u, b_sum_ut, P)
            store_tile(b_dx, dx_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first")


def _launch_forward(
    x: Tensor, residual: Tensor | None, e_lambda: float, relu: bool, saved: Tensor | None, mask: Tensor | None
) -> Tensor:
    n, c, h, w = x.shape
    tile = whole_plane_tile(x, backward=False)
    whole = tile.block_p >= h * w
    y = torch.empty_like(x)
    simam_fwd_kernel[(n * config.cdiv(c, tile.block_c),)](
        x,
        residual,
        y,
        mask,
        None if whole else saved,
        c,
        h * w,
        number_bits(e_lambda, x),
        RELU=relu,
        WHOLE=whole,
        **tile_options(x, tile),
        maxnreg=128,
    )
    return y


def _inference(x: Tensor, residual: Tensor | None, e_lambda: float, relu: bool) -> Tensor:
    return _launch_forward(x, residual, e_lambda, relu, None, None)


def _inference_fake(x, residual, e_lambda, relu):
    return torch.empty_like(x)


def _forward(x: Tensor, residual: Tensor | None, e_lambda: float, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    saved, mask = _empty_saved(x), empty_mask(x, relu)
    y = _launch_forward(x, residual, e_lambda, relu, saved, mask if relu else None)
    return y, saved, mask


def _empty_saved(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    whole = h * w <= config.largest_plane(x.element_size(), is_channels_last(x))
    return torch.empty((n, 2, 0 if whole else c), dtype=accumulation_dtype(x), device=x.device)


def _forward_fake(x, residual, e_lambda, relu):
    return torch.empty_like(x), _empty_saved(x), empty_mask(x, relu)


def _backward(
    dy: Tensor, x: Tensor, saved: Tensor, mask: Tensor, e_lambda: float, relu: bool, need_dresidual: bool
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    tile = whole_plane_tile(x, backward=True)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else None
    simam_bwd_kernel[(n * config.cdiv(c, tile.block_c),)](
        like(dy, x),
        mask if relu else None,
        x,
        saved,
        dx,
        dresidual,
        c,
        h * w,
        number_bits(e_lambda, x),
        WHOLE=tile.block_p >= h * w,
        **tile_options(x, tile),
    )
    return dx, x.new_empty(0) if dresidual is None else dresidual


def _backward_fake(dy, x, saved, mask, e_lambda, relu, need_dresidual):
    return torch.empty_like(x), torch.empty_like(x) if need_dresidual else x.new_empty(0)


inference_op = register(
    "simam(Tensor x, Tensor? residual, float e_lambda, bool relu) -> Tensor", _inference, _inference_fake
)
forward_op = register(
    "simam_forward(Tensor x, Tensor? residual, float e_lambda, bool relu) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = register(
    "simam_backward(Tensor dy, Tensor x, Tensor saved, Tensor mask, float e_lambda, bool relu, bool need_dresidual) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _SimAM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, e_lambda, relu):
        y, *kept = forward_op(x, residual, e_lambda, relu)
        save_tensors(ctx, x, *kept)
        ctx.e_lambda, ctx.relu = e_lambda, relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, statistics, mask = saved_tensors(ctx)
        need_dresidual = ctx.needs_input_grad[1]
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x) if ctx.relu else dy
            (dx,) = reference_gradients(lambda x: formula(x, ctx.e_lambda), (x,), (dy,))
            return dx, dy if need_dresidual else None, None, None
        dx, dresidual = backward_op(dy, x, statistics, mask, ctx.e_lambda, ctx.relu, ctx.relu and need_dresidual)
        return dx, (dresidual if ctx.relu else dy) if need_dresidual else None, None, None


def simam(x: Tensor, residual: Tensor | None, e_lambda: float, relu: bool) -> Tensor:
    """The fused operator, differentiable; ``x`` and ``residual`` (N, C, H, W), dense in the same layout."""
    if needs_grad(x, residual):
        return _SimAM.apply(x, residual, float(e_lambda), relu)
    return inference_op(x, residual, float(e_lambda), relu)
