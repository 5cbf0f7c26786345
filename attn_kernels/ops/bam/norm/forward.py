"""The forward pass of BatchNorm + ReLU: the batch's statistics, and the normalised map."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common import batch_norm, tiling
from attn_kernels.ops.common.batch_norm import Norm, NormOptions, norm_use
from attn_kernels.ops.common.layout import contiguous
from attn_kernels.ops.common.moments import update_running
from attn_kernels.ops.common.scalar import number, number_bits
from attn_kernels.ops.common.tile import aligned, load_tile, pixels, store_tile, tile_of_all
from attn_kernels.ops.common.tiling import Geometry, Tile, cdiv, geometry, next_power_of_2


@triton.jit
def statistics_kernel(
    c_ptr,  # (N, C, P)
    partial_ptr,  # sums and sums of squared deviations (2, programs, C), and counts (programs,), of a program's pixels
    batches_ptr,  # (), int64, counted up, or None
    N,
    C,
    P,
    TILE: tl.constexpr,
):
    """The statistics of BLOCK_C channels over a program's tiles, merged as they come (Chan et al., 1983). Reads c."""
    BLOCK_C: tl.constexpr = TILE.block_c
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    tiles = N * tl.cdiv(P, TILE.block_p)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    # A one-element tensor, so that it is the same type from the first pass on.
    seen = tl.zeros([1], ACC)
    b_sum = tl.zeros([BLOCK_C], ACC)
    b_m2 = tl.zeros([BLOCK_C], ACC)
    for t in tl.range(i_q, tiles, programs, num_stages=TILE.stages):
        at = tile_of_all(t, c, C, P, TILE)
        m_p = pixels(at, TILE) < P
        b_c = load_tile(c_ptr, at, TILE)
        count = tl.minimum(P - at.pixel, TILE.block_p).to(ACC)
        b_tile_sum = tl.sum(b_c, axis=1)
        b_mean = b_tile_sum / count
        b_d = tl.where(m_p[None, :], b_c - b_mean[:, None], 0.0)
        b_delta = b_mean - b_sum / tl.maximum(seen, 1.0)
        # 0 at first, also where delta^2 would be infinite.
        b_m2 += tl.sum(b_d * b_d, axis=1) + b_delta * (b_delta * (seen * count / (seen + count)))
        b_sum += b_tile_sum
        seen += count
    tl.store(partial_ptr + i_q * C + o_c, b_sum, mask=o_c < C)
    tl.store(partial_ptr + (programs + i_q) * C + o_c, b_m2, mask=o_c < C)
    if c == 0:
        tl.store(partial_ptr + 2 * programs * C + i_q + tl.arange(0, 1), seen)
        if batches_ptr is not None:  # here, for all programs of the next launch read it
            tl.store(batches_ptr, tl.load(batches_ptr) + 1, mask=i_q == 0)


@triton.jit
def load_partials(partial_ptr, i, programs, o_c, C, BLOCK_Q: tl.constexpr):
    """[BLOCK_Q, BLOCK_C] of the i-th (programs, C)."""
    o_q = tl.arange(0, BLOCK_Q)
    m = (o_q < programs)[:, None] & (o_c < C)[None, :]
    return tl.load(partial_ptr + (i * programs + o_q)[:, None] * C + o_c[None, :], mask=m, other=0)


@triton.jit
def load_parameter(parameter_ptr, o_c, C, DEFAULT: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK_C] in ACC."""
    if parameter_ptr is None:
        return tl.full([o_c.shape[0]], DEFAULT, ACC)
    else:
        return tl.load(parameter_ptr + o_c, mask=o_c < C, other=0).to(ACC)


@triton.jit(do_not_specialize=["momentum", "eps"])
def normalize_kernel(
    c_ptr,  # (N, C, P)
    partial_ptr,  # of statistics_kernel, or None in evaluation
    norm,  # Norm, whose running averages are updated if NORM.update
    add_weight_ptr,  # (1, C, 1, 1), or None where nothing is added up
    add_bias_ptr,  # (1,) or None
    statistics_ptr,  # (2, C), written: mean and 1 / standard deviation
    r_ptr,  # (N, C, P), or (N, P) where channels are added up, written
    N,
    C,
    P,
    momentum,  # number_bits
    eps,  # number_bits
    NORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """r of BLOCK_C channels in a program's tiles, by statistics_kernel's statistics or the running ones. Reads c."""
    BLOCK_C: tl.constexpr = TILE.block_c
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    tiles = N * tl.cdiv(P, TILE.block_p)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if NORM.batch_statistics:
        o_q = tl.arange(0, NORM.block_q)
        b_count = tl.load(partial_ptr + 2 * programs * C + o_q, mask=o_q < programs, other=0)
        b_sum = load_partials(partial_ptr, 0, programs, o_c, C, NORM.block_q)
        b_mean = tl.sum(b_sum, axis=0) / (N * P)
        b_delta = b_sum / tl.maximum(b_count, 1.0)[:, None] - b_mean[None, :]
        b_m2 = load_partials(partial_ptr, 1, programs, o_c, C, NORM.block_q) + b_count[:, None] * b_delta * b_delta
        b_variance = tl.sum(b_m2, axis=0) / (N * P)
    else:
        b_mean = tl.load(norm.running_mean + o_c, mask=m_c, other=0).to(ACC)
        b_variance = tl.load(norm.running_var + o_c, mask=m_c, other=0).to(ACC)
    b_invstd = 1 / tl.sqrt(b_variance + number(eps, ACC))
    if i_q == 0:
        tl.store(statistics_ptr + o_c, b_mean, mask=m_c)
        tl.store(statistics_ptr + C + o_c, b_invstd, mask=m_c)
        if NORM.update:
            factor = number(momentum, ACC)
            if NORM.cumulative:
                factor = 1 / tl.load(norm.batches).to(ACC)
            count = tl.cast(N * P, ACC)
            update_running(norm.running_mean + o_c, b_mean, factor, m_c)
            update_running(norm.running_var + o_c, b_variance * (count / (count - 1)), factor, m_c)

    b_weight = load_parameter(norm.weight, o_c, C, 1.0, ACC)[:, None]
    b_bias = load_parameter(norm.bias, o_c, C, 0.0, ACC)[:, None]
    b_add = load_parameter(add_weight_ptr, o_c, C, 1.0, ACC)
    add_bias = 0.0
    if add_bias_ptr is not None:
        add_bias = tl.load(add_bias_ptr).to(ACC)
    for t in tl.range(i_q, tiles, programs, num_stages=TILE.stages):
        at = tile_of_all(t, c, C, P, TILE)
        b_c = load_tile(c_ptr, at, TILE)
        b_r = (b_c - b_mean[:, None]) * b_invstd[:, None] * b_weight + b_bias
        b_r = tl.where(b_r <= 0, 0.0, b_r)
        if add_weight_ptr is None:
            store_tile(b_r, r_ptr, at, TILE)
        else:
            b_r = tl.where(m_c[:, None], b_r * b_add[:, None], 0.0)
            o_p = pixels(at, TILE)
            tl.store(r_ptr + at.sample * P + o_p, tl.sum(b_r, axis=0) + add_bias, mask=o_p < P)


@functools.lru_cache
def norm_tile(g: Geometry, whole: bool) -> tuple[Tile, int]:
    """A program owns ``block_c`` channels, all if ``whole``; and programs that share the pixels."""
    block_c = next_power_of_2(g.c)
    if not whole:
        # Rows of 256 bytes; of 256 pixels where planes are large.
        most = 256 // g.itemsize if g.channels_last else max(tiling.TILE // min(next_power_of_2(g.p), 256), 1)
        block_c = min(block_c, most)
    blocks, block_p = cdiv(g.c, block_c), min(next_power_of_2(g.p), max(tiling.TILE // block_c, 1))
    while block_p > 32 and g.n * cdiv(g.p, block_p) * blocks < g.multiprocessors:
        block_p //= 2
    # Every program of the next launch reads the sums of all programs, 8 bytes per channel each, as one tile. So there
    # are only as many programs as keep that below the bytes of the map.
    programs = min(math.isqrt(g.n * g.p * g.itemsize // 8), tiling.TILE // block_c, cdiv(2 * g.multiprocessors, blocks))
    # The partial sums need registers: half as many bytes per thread.
    tile = Tile.of(g, block_c, block_p, thread_bytes=32)._replace(stages=tiling.STAGES[g.itemsize])
    return tile, min(max(programs, 1), g.n * cdiv(g.p, block_p))


class Outputs(NamedTuple):
    """r like c, or (N, 1, H, W) where channels are added up; mean and 1 / standard deviation (2, C)."""

    r: Tensor
    statistics: Tensor


def launch_forward(
    outputs: Outputs, c, weight, bias, add_weight, add_bias, running_mean, running_var, batches, *options
) -> None:
    n, channels, h, w = c.shape
    options = NormOptions(*options)
    tile, programs = norm_tile(geometry(c), add_weight is not None)
    grid = cdiv(channels, tile.block_c), programs
    partial = None
    mean, variance = contiguous(running_mean, running_var)
    if options.batch_statistics:
        partial = outputs.statistics.new_empty(programs * (2 * channels + 1))
        statistics_kernel[grid](
            c_ptr=c,
            partial_ptr=partial,
            batches_ptr=batches if options.update else None,
            N=n,
            C=channels,
            P=h * w,
            TILE=tile,
            **tile.options,
        )
    normalize_kernel[grid](
        c_ptr=c,
        partial_ptr=partial,
        norm=Norm(weight, bias, mean, variance, batches),
        add_weight_ptr=add_weight,
        add_bias_ptr=add_bias,
        statistics_ptr=outputs.statistics,
        r_ptr=outputs.r,
        N=n,
        C=channels,
        P=h * w,
        momentum=number_bits(options.momentum or 0.0, c),
        eps=number_bits(options.eps, c),
        NORM=norm_use(options, programs),
        TILE=tile,
        **tile.options,
    )
    if options.update:
        for buffer, written in ((running_mean, mean), (running_var, variance)):
            if buffer is not written:
                buffer.copy_(written)
        batch_norm.mark_updated(running_mean, running_var, batches)
