"""The convolution of CBAM's spatial gate, two maps to one, and what its BatchNorm needs, forward and backward.

Maps are one value a pixel, small beside x; the KERNEL x KERNEL taps of a pixel are gathered from L1 and L2. Programs
leave partial sums that the launch after them adds up, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._library import is_channels_last

# Programs at most: each leaves partial statistics that every program of the next kernel adds up.
PROGRAMS = 256


@triton.jit
def _pixels(start, COUNT, H, W, BLOCK: tl.constexpr):
    """Flat index in (N, H, W), validity, row and column, [BLOCK], of the pixels from start on."""
    q = start + tl.arange(0, BLOCK).to(tl.int64)
    p = (q % (H * W)).to(tl.int32)
    return q, q < COUNT, p // W, p % W


@triton.jit
def _row_of_taps(q, m_q, h, w, i, H, W, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """What row i of the taps sees at pixels q: flat indices and validity, [TAPS, BLOCK].

    A tap looks back: the correlation that PyTorch calls a convolution turns its taps round. So only pixels have
    consecutive addresses, along which Triton then puts the threads, each with a pixel's whole row.
    """
    t = tl.arange(0, TAPS)
    row = h + KERNEL // 2 - i
    column = (w + KERNEL // 2)[None, :] - t[:, None]
    m = (m_q & (row >= 0) & (row < H))[None, :] & (t < KERNEL)[:, None] & (column >= 0) & (column < W)
    return (q + ((KERNEL // 2 - i) * W + KERNEL // 2))[None, :] - t[:, None], m


@triton.jit
def _load_weights(weight_ptr, o_t, m_t, ACC: tl.constexpr, MAP_STRIDE: tl.constexpr, TAP_STRIDE: tl.constexpr):
    """Of the taps o_t, for the maximum's and for the mean's map."""
    b_wmax = tl.load(weight_ptr + o_t * TAP_STRIDE, mask=m_t, other=0).to(ACC)
    b_wmean = tl.load(weight_ptr + MAP_STRIDE + o_t * TAP_STRIDE, mask=m_t, other=0).to(ACC)
    return b_wmax, b_wmean


@triton.jit
def conv_fwd_kernel(
    pools_ptr,  # (2, N, P): maximum, mean
    part_ptr,  # (3, programs), written: count, sum and sum of squared deviations of the pixels of a program
    weight_ptr,  # (2, KERNEL, KERNEL), in either layout
    z_ptr,  # (N, P), written
    COUNT,
    H,
    W,
    MAP_STRIDE: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The convolution of two maps to one and, in the same pass, its statistics (Chan et al., 1983)."""
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.program_id(0)
    t = tl.arange(0, TAPS)
    # The running statistics are kept as one-element tensors, so that they are the same type from the first pass on.
    # The sum and not the mean, which an infinity followed by others would make NaN.
    seen = tl.zeros([1], ACC)
    total = tl.zeros([1], ACC)
    m2 = tl.zeros([1], ACC)
    for start in range(pid * BLOCK, COUNT, tl.num_programs(0) * BLOCK):
        q, m_q, h, w = _pixels(start, COUNT, H, W, BLOCK)
        b_z = tl.zeros([BLOCK], ACC)
        for i in tl.range(0, KERNEL, num_stages=2):
            o_map, m = _row_of_taps(q, m_q, h, w, i, H, W, KERNEL, TAPS)
            o_t = KERNEL * KERNEL - 1 - i * KERNEL - t
            b_wmax, b_wmean = _load_weights(weight_ptr, o_t, t < KERNEL, ACC, MAP_STRIDE, TAP_STRIDE)
            b_taps = tl.load(pools_ptr + o_map, mask=m, other=0) * b_wmax[:, None]
            b_taps += tl.load(pools_ptr + COUNT + o_map, mask=m, other=0) * b_wmean[:, None]
            b_z += tl.sum(b_taps, axis=0)
        tl.store(z_ptr + q, b_z, mask=m_q)
        count = tl.minimum(COUNT - start, BLOCK).to(ACC)
        tile_sum = tl.sum(b_z, axis=0)
        tile_mean = tile_sum / count
        b_deviation = tl.where(m_q, b_z - tile_mean, 0.0)
        delta = tile_mean - total / tl.maximum(seen, 1.0)
        # 0 at first, also where delta^2 would be infinite.
        m2 += tl.sum(b_deviation * b_deviation, axis=0) + delta * (delta * (seen * count / (seen + count)))
        total += tile_sum
        seen += count
    o_part = pid + tl.arange(0, 1)
    tl.store(part_ptr + o_part, seen)
    tl.store(part_ptr + tl.num_programs(0) + o_part, total)
    tl.store(part_ptr + 2 * tl.num_programs(0) + o_part, m2)


@triton.jit
def conv_bwd_kernel(
    z_ptr,  # (N, P) and, behind it, its mean and 1 / standard deviation
    pools_ptr,  # (2, N, P): maximum, mean
    dlogit_ptr,  # (N, P)
    part_ptr,  # (programs, 2): sums of dlogit and of dlogit * normalised z
    conv_weight_ptr,  # (2, KERNEL, KERNEL), in either layout
    weight_ptr,  # (1,) or None
    spatial_ptr,  # (N, 3, P), its last two maps written: gradients of the maximum and of each channel by the mean
    dconv_ptr,  # (programs, 2, KERNEL, KERNEL), written
    dweight_ptr,  # (1,), written
    dbias_ptr,  # (1,), written
    programs,
    COUNT,
    C,
    H,
    W,
    BATCH_STATISTICS: tl.constexpr,
    MAP_STRIDE: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward of BatchNorm and of the convolution, on maps.

    The gradients dz of the outputs that see a pixel are those of its pools, times the taps; and those of the taps,
    times its pools.
    """
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.program_id(0)
    b_sum = tl.zeros([1024], ACC)
    b_dot = tl.zeros([1024], ACC)
    for i in range(0, programs, 1024):
        o_part = i + tl.arange(0, 1024)
        b_sum += tl.load(part_ptr + o_part * 2, mask=o_part < programs, other=0)
        b_dot += tl.load(part_ptr + o_part * 2 + 1, mask=o_part < programs, other=0)
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
        q, m_q, h, w = _pixels(start, COUNT, H, W, BLOCK)
        b_max = tl.load(pools_ptr + q, mask=m_q, other=0)
        b_mean = tl.load(pools_ptr + COUNT + q, mask=m_q, other=0)
        b_dmax = tl.zeros([BLOCK], ACC)
        b_dmean = tl.zeros([BLOCK], ACC)
        for i in tl.range(0, KERNEL, num_stages=2):
            o_map, m = _row_of_taps(q, m_q, h, w, i, H, W, KERNEL, TAPS)
            b_dz = tl.load(dlogit_ptr + o_map, mask=m, other=0)
            if BATCH_STATISTICS:
                b_dz -= dbias / COUNT + (tl.load(z_ptr + o_map, mask=m, other=0) - mean) * slope
                b_dz = tl.where(m, b_dz, 0.0)
            b_wmax, b_wmean = _load_weights(
                conv_weight_ptr, i * KERNEL + t, t < KERNEL, ACC, MAP_STRIDE, TAP_STRIDE
            )  # fmt: skip
            b_dmax += tl.sum(b_dz * b_wmax[:, None], axis=0)
            b_dmean += tl.sum(b_dz * b_wmean[:, None], axis=0)
            is_row = (t == i)[:, None]
            # What no output sees takes no part, for it may be infinite.
            b_dwmax += tl.where(is_row, tl.sum(tl.where(m, b_dz * b_max[None, :], 0.0), axis=1)[None, :], 0.0)
            b_dwmean += tl.where(is_row, tl.sum(tl.where(m, b_dz * b_mean[None, :], 0.0), axis=1)[None, :], 0.0)
        p_out = spatial_ptr + q + q // (H * W) * (2 * H * W)
        tl.store(p_out + H * W, b_dmax * scale, mask=m_q)
        tl.store(p_out + 2 * H * W, b_dmean * scale / C, mask=m_q)
    m_t = (t < KERNEL)[:, None] & (t < KERNEL)[None, :]
    p_dconv = dconv_ptr + pid * 2 * KERNEL * KERNEL + t[:, None] * KERNEL + t[None, :]
    tl.store(p_dconv, b_dwmax * scale, mask=m_t)
    tl.store(p_dconv + KERNEL * KERNEL, b_dwmean * scale, mask=m_t)


def programs(x: Tensor, weight: Tensor) -> int:
    """Of both kernels."""
    n, _, h, w = x.shape
    return min(config.cdiv(n * h * w, _block(weight)), PROGRAMS)


def _block(weight: Tensor) -> int:
    """Pixels a tile: four a thread with a row of 8 taps."""
    return max(config.TILE // config.next_power_of_2(weight.shape[-1]), 1)


def _options(weight: Tensor) -> dict[str, int]:
    """The kernels' constexpr arguments, and their warps."""
    kernel = weight.shape[-1]
    # A network in channels_last has its weights so, too: [KERNEL, KERNEL, 2].
    map_stride, tap_stride = (1, 2) if is_channels_last(weight) else (kernel * kernel, 1)
    return {
        "MAP_STRIDE": map_stride,
        "TAP_STRIDE": tap_stride,
        "KERNEL": kernel,
        "TAPS": config.next_power_of_2(kernel),
        "BLOCK": _block(weight),
        "num_warps": 4,
        "maxnreg": 224,  # no more programs fit with less, and ptxas spills where it chooses itself
    }


def forward(x: Tensor, pools: Tensor, parts: Tensor, weight: Tensor, z: Tensor) -> None:
    """Launch the convolution of ``pools``: ``z``, and ``parts`` of its statistics."""
    n, _, h, w = x.shape
    conv_fwd_kernel[(programs(x, weight),)](pools, parts, weight, z, n * h * w, h, w, **_options(weight))


def backward(
    x: Tensor,
    z: Tensor,
    pools: Tensor,
    dlogit: Tensor,
    parts: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    spatial: Tensor,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward of BatchNorm and convolution: ``dconv, dweight, dbias``, and the gradients in ``spatial``."""
    n, c, h, w = x.shape
    dconv = z.new_empty((programs(x, conv_weight), *conv_weight.shape))
    dweight, dbias = z.new_empty(1), z.new_empty(1)
    conv_bwd_kernel[(dconv.shape[0],)](
        z,
        pools,
        dlogit,
        parts,
        conv_weight,
        weight,
        spatial,
        dconv,
        dweight,
        dbias,
        parts.shape[0],
        n * h * w,
        c,
        h,
        w,
        BATCH_STATISTICS=batch_statistics,
        **_options(conv_weight),
    )
    return dconv.sum(0), dweight, dbias
