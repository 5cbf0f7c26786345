"""The convolution of CBAM's spatial gate, two maps to one, and its BatchNorm's statistics, forward and backward.

Maps are one value per pixel, small beside x; the kernel x kernel taps of a pixel are gathered from L1 and L2. Programs
leave partial sums that the launch after them adds up, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common import tiling
from attn_kernels.ops.common.layout import is_channels_last
from attn_kernels.ops.common.tiling import cdiv, next_power_of_2

# Programs at most: each leaves partial statistics that every program of the next kernel adds up.
PROGRAMS = 256


class Conv(NamedTuple):
    """The kernels' constexpr CONV: sides of the kernel, its power of 2, strides in the weight, and pixels at once."""

    kernel: int
    taps: int
    map_stride: int
    tap_stride: int
    block: int


class Pixels(NamedTuple):
    """[BLOCK] flat indices in (N, H, W), their validity, rows and columns."""

    q: tl.tensor
    m: tl.tensor
    h: tl.tensor
    w: tl.tensor


@triton.jit
def _pixels(start, COUNT, H, W, BLOCK: tl.constexpr):
    """Those from start on."""
    q = start + tl.arange(0, BLOCK).to(tl.int64)
    p = (q % (H * W)).to(tl.int32)
    return Pixels(q, q < COUNT, p // W, p % W)


@triton.jit
def _row_of_taps(at, i, H, W, CONV: tl.constexpr):
    """The pixels that row i of the taps sees from those at ``at``: flat indices and validity, [TAPS, BLOCK].

    A tap looks back: the correlation that PyTorch calls a convolution turns its taps round. So only pixels have
    consecutive addresses, along which Triton then puts the threads, each with a pixel's whole row.
    """
    KERNEL: tl.constexpr = CONV.kernel
    t = tl.arange(0, CONV.taps)
    row = at.h + KERNEL // 2 - i
    column = (at.w + KERNEL // 2)[None, :] - t[:, None]
    m = (at.m & (row >= 0) & (row < H))[None, :] & (t < KERNEL)[:, None] & (column >= 0) & (column < W)
    return (at.q + ((KERNEL // 2 - i) * W + KERNEL // 2))[None, :] - t[:, None], m


@triton.jit
def _load_weights(weight_ptr, o_t, m_t, ACC: tl.constexpr, CONV: tl.constexpr):
    """Of the taps o_t, for the maximum's and for the mean's map."""
    b_wmax = tl.load(weight_ptr + o_t * CONV.tap_stride, mask=m_t, other=0).to(ACC)
    b_wmean = tl.load(weight_ptr + CONV.map_stride + o_t * CONV.tap_stride, mask=m_t, other=0).to(ACC)
    return b_wmax, b_wmean


@triton.jit
def conv_fwd_kernel(
    pools_ptr,  # (2, N, P): maximum, mean
    partial_ptr,  # (3, programs), written: count, sum and sum of squared deviations of the pixels of a program
    weight_ptr,  # (2, kernel, kernel), in either layout
    z_ptr,  # (N, P), written
    COUNT,
    H,
    W,
    CONV: tl.constexpr,
):
    """The convolution of two maps to one and, in the same pass, its statistics (Chan et al., 1983)."""
    KERNEL: tl.constexpr = CONV.kernel
    TAPS: tl.constexpr = CONV.taps
    BLOCK: tl.constexpr = CONV.block
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.program_id(0)
    t = tl.arange(0, TAPS)
    # The running statistics are kept as one-element tensors, so that they are the same type from the first pass on.
    # The sum and not the mean, which an infinity followed by others would make NaN.
    seen = tl.zeros([1], ACC)
    total = tl.zeros([1], ACC)
    m2 = tl.zeros([1], ACC)
    for start in range(pid * BLOCK, COUNT, tl.num_programs(0) * BLOCK):
        at = _pixels(start, COUNT, H, W, BLOCK)
        b_z = tl.zeros([BLOCK], ACC)
        for i in tl.range(0, KERNEL, num_stages=2):
            o_map, m = _row_of_taps(at, i, H, W, CONV)
            o_t = KERNEL * KERNEL - 1 - i * KERNEL - t
            b_wmax, b_wmean = _load_weights(weight_ptr, o_t, t < KERNEL, ACC, CONV)
            b_taps = tl.load(pools_ptr + o_map, mask=m, other=0) * b_wmax[:, None]
            b_taps += tl.load(pools_ptr + COUNT + o_map, mask=m, other=0) * b_wmean[:, None]
            b_z += tl.sum(b_taps, axis=0)
        tl.store(z_ptr + at.q, b_z, mask=at.m)
        count = tl.minimum(COUNT - start, BLOCK).to(ACC)
        tile_sum = tl.sum(b_z, axis=0)
        tile_mean = tile_sum / count
        b_deviation = tl.where(at.m, b_z - tile_mean, 0.0)
        delta = tile_mean - total / tl.maximum(seen, 1.0)
        # 0 at first, also where delta^2 would be infinite.
        m2 += tl.sum(b_deviation * b_deviation, axis=0) + delta * (delta * (seen * count / (seen + count)))
        total += tile_sum
        seen += count
    p_partial = partial_ptr + pid + tl.arange(0, 1)
    tl.store(p_partial, seen)
    tl.store(p_partial + tl.num_programs(0), total)
    tl.store(p_partial + 2 * tl.num_programs(0), m2)


@triton.jit
def conv_bwd_kernel(
    z_ptr,  # (N, P) and, behind it, its mean and 1 / standard deviation
    pools_ptr,  # (2, N, P): maximum, mean
    dlogit_ptr,  # (N, P)
    partial_ptr,  # (programs, 2): sums of dlogit and of dlogit * normalised z
    conv_weight_ptr,  # (2, kernel, kernel), in either layout
    weight_ptr,  # (1,) or None
    spatial_ptr,  # (N, 3, P), its last two maps written: gradients of the maximum and of each channel by the mean
    dconv_ptr,  # (programs, 2, kernel, kernel), written
    dweight_ptr,  # (1,), written
    dbias_ptr,  # (1,), written
    programs,
    COUNT,
    C,
    H,
    W,
    BATCH_STATISTICS: tl.constexpr,
    CONV: tl.constexpr,
):
    """Backward of BatchNorm and of the convolution, on maps.

    The gradients dz of the outputs that see a pixel are those of its pools, times the taps; and those of the taps,
    times its pools.
    """
    KERNEL: tl.constexpr = CONV.kernel
    TAPS: tl.constexpr = CONV.taps
    BLOCK: tl.constexpr = CONV.block
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.program_id(0)
    b_sum = tl.zeros([1024], ACC)
    b_dot = tl.zeros([1024], ACC)
    for i in range(0, programs, 1024):
        o_q = i + tl.arange(0, 1024)
        b_sum += tl.load(partial_ptr + o_q * 2, mask=o_q < programs, other=0)
        b_dot += tl.load(partial_ptr + o_q * 2 + 1, mask=o_q < programs, other=0)
    dbias = tl.sum(b_sum, axis=0)
    dweight = tl.sum(b_dot, axis=0)
    if pid == 0:
        tl.store(dweight_ptr, dweight)
        tl.store(dbias_ptr, dbias)
    mean = tl.load(z_ptr + COUNT)
    invstd = tl.load(z_ptr + COUNT + 1)
    scale = invstd
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr).to(ACC)
    slope = dweight / COUNT * invstd

    t = tl.arange(0, TAPS)
    b_dwmax = tl.zeros([TAPS, TAPS], ACC)
    b_dwmean = tl.zeros([TAPS, TAPS], ACC)
    for start in range(pid * BLOCK, COUNT, tl.num_programs(0) * BLOCK):
        at = _pixels(start, COUNT, H, W, BLOCK)
        b_max = tl.load(pools_ptr + at.q, mask=at.m, other=0)
        b_mean = tl.load(pools_ptr + COUNT + at.q, mask=at.m, other=0)
        b_dmax = tl.zeros([BLOCK], ACC)
        b_dmean = tl.zeros([BLOCK], ACC)
        for i in tl.range(0, KERNEL, num_stages=2):
            o_map, m = _row_of_taps(at, i, H, W, CONV)
            b_dz = tl.load(dlogit_ptr + o_map, mask=m, other=0)
            if BATCH_STATISTICS:
                b_dz -= dbias / COUNT + (tl.load(z_ptr + o_map, mask=m, other=0) - mean) * slope
                b_dz = tl.where(m, b_dz, 0.0)
            b_wmax, b_wmean = _load_weights(conv_weight_ptr, i * KERNEL + t, t < KERNEL, ACC, CONV)
            b_dmax += tl.sum(b_dz * b_wmax[:, None], axis=0)
            b_dmean += tl.sum(b_dz * b_wmean[:, None], axis=0)
            is_row = (t == i)[:, None]
            # Pixels that no output sees take no part, for they may be infinite.
            b_dwmax += tl.where(is_row, tl.sum(tl.where(m, b_dz * b_max[None, :], 0.0), axis=1)[None, :], 0.0)
            b_dwmean += tl.where(is_row, tl.sum(tl.where(m, b_dz * b_mean[None, :], 0.0), axis=1)[None, :], 0.0)
        p_out = spatial_ptr + at.q + at.q // (H * W) * (2 * H * W)
        tl.store(p_out + H * W, b_dmax * scale, mask=at.m)
        tl.store(p_out + 2 * H * W, b_dmean * scale / C, mask=at.m)
    m_t = (t < KERNEL)[:, None] & (t < KERNEL)[None, :]
    p_dconv = dconv_ptr + pid * 2 * KERNEL * KERNEL + t[:, None] * KERNEL + t[None, :]
    tl.store(p_dconv, b_dwmax * scale, mask=m_t)
    tl.store(p_dconv + KERNEL * KERNEL, b_dwmean * scale, mask=m_t)


def programs(x: Tensor, weight: Tensor) -> int:
    """Of both kernels."""
    n, _, h, w = x.shape
    return min(cdiv(n * h * w, _block(weight)), PROGRAMS)


def _block(weight: Tensor) -> int:
    """Pixels of a tile: four per thread with a row of 8 taps."""
    return max(tiling.TILE // next_power_of_2(weight.shape[-1]), 1)


def _conv(weight: Tensor) -> Conv:
    kernel = weight.shape[-1]
    # A network in channels_last has its weights so, too: [kernel, kernel, 2].
    map_stride, tap_stride = (1, 2) if is_channels_last(weight) else (kernel * kernel, 1)
    return Conv(kernel, next_power_of_2(kernel), map_stride, tap_stride, _block(weight))


# Triton's options: no more programs fit with fewer registers, and ptxas spills where it chooses itself.
_OPTIONS = {"num_warps": 4, "maxnreg": 224}


def launch_forward(z: Tensor, x: Tensor, pools: Tensor, weight: Tensor) -> Tensor:
    """Fill ``z`` with the convolution of ``pools``; the partial sums of its statistics, (3, programs)."""
    n, _, h, w = x.shape
    partial = z.new_empty((3, programs(x, weight)))
    conv_fwd_kernel[(partial.shape[1],)](
        pools_ptr=pools,
        partial_ptr=partial,
        weight_ptr=weight,
        z_ptr=z,
        COUNT=n * h * w,
        H=h,
        W=w,
        CONV=_conv(weight),
        **_OPTIONS,
    )
    return partial


def launch_backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    z: Tensor,
    pools: Tensor,
    dlogit: Tensor,
    partial: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    spatial: Tensor,
    batch_statistics: bool,
) -> None:
    """Fill ``gradients``, of the convolution's weight and of BatchNorm's weight and bias, and those in ``spatial``."""
    n, c, h, w = x.shape
    dconv, dweight, dbias = gradients
    dconvs = z.new_empty((programs(x, conv_weight), *conv_weight.shape))
    conv_bwd_kernel[(dconvs.shape[0],)](
        z_ptr=z,
        pools_ptr=pools,
        dlogit_ptr=dlogit,
        partial_ptr=partial,
        conv_weight_ptr=conv_weight,
        weight_ptr=weight,
        spatial_ptr=spatial,
        dconv_ptr=dconvs,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        programs=partial.shape[0],
        COUNT=n * h * w,
        C=c,
        H=h,
        W=w,
        BATCH_STATISTICS=batch_statistics,
        CONV=_conv(conv_weight),
        **_OPTIONS,
    )
    torch.sum(dconvs, 0, out=dconv)
