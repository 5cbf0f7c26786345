"""BatchNorm + ReLU of a map: ``r = relu((c - mean) / sqrt(var + eps) * weight + bias)``; or ``sum_c w * r + b`` of it.

Ioffe and Szegedy, ICML 2015. |c| is the bytes of c. The sum over the channels is a 1x1 convolution to one channel, of
which neither r nor its gradient is ever written.

Forward 2 launches, in evaluation 1: statistics of the batch read c, |c|; the second reads c and writes r, 2|c|.
Backward 2 launches: the parameters' gradients from dr and c, 2|c|; the second reads dr and c and writes dc, 3|c|.
Behind a 1x1 convolution r and dr are one value per pixel.
Saved: c, and mean and 1 / standard deviation, O(C).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from attn_kernels.ops.common import batch_norm, tiling
from attn_kernels.ops.common.batch_norm import Norm, NormOptions, norm_use
from attn_kernels.ops.common.layout import contiguous, dense, like
from attn_kernels.ops.common.moments import update_running
from attn_kernels.ops.common.operator import (
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from attn_kernels.ops.common.scalar import number, number_bits
from attn_kernels.ops.common.tile import aligned, load_tile, pixels, store_tile, tile_of_all
from attn_kernels.ops.common.tiling import Geometry, Tile, cdiv, geometry, next_power_of_2
from reference._common import accumulation_dtype, is_plain_layer

# Channels of a map that a program holds at once at most, where it adds them up.
ADDED_CHANNELS = 128


class Parameters(NamedTuple):
    """Of the norm, (C,) or None; of the convolution (1, C, 1, 1), or None where nothing is added up, and (1,) or None.

    Or their gradients, each None where it is not wanted.
    """

    weight: Tensor | None
    bias: Tensor | None
    add_weight: Tensor | None
    add_bias: Tensor | None


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
def _load_partials(partial_ptr, i, programs, o_c, C, BLOCK_Q: tl.constexpr):
    """[BLOCK_Q, BLOCK_C] of the i-th (programs, C)."""
    o_q = tl.arange(0, BLOCK_Q)
    m = (o_q < programs)[:, None] & (o_c < C)[None, :]
    return tl.load(partial_ptr + (i * programs + o_q)[:, None] * C + o_c[None, :], mask=m, other=0)


@triton.jit
def _load_parameter(parameter_ptr, o_c, C, DEFAULT: tl.constexpr, ACC: tl.constexpr):
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
        b_sum = _load_partials(partial_ptr, 0, programs, o_c, C, NORM.block_q)
        b_mean = tl.sum(b_sum, axis=0) / (N * P)
        b_delta = b_sum / tl.maximum(b_count, 1.0)[:, None] - b_mean[None, :]
        b_m2 = _load_partials(partial_ptr, 1, programs, o_c, C, NORM.block_q) + b_count[:, None] * b_delta * b_delta
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

    b_weight = _load_parameter(norm.weight, o_c, C, 1.0, ACC)[:, None]
    b_bias = _load_parameter(norm.bias, o_c, C, 0.0, ACC)[:, None]
    b_add = _load_parameter(add_weight_ptr, o_c, C, 1.0, ACC)
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


@triton.jit
def _load_affine(statistics_ptr, parameters, o_c, C, ACC: tl.constexpr):
    """Mean, 1 / standard deviation, weight and bias of each channel, [BLOCK_C, 1]."""
    b_mean = tl.load(statistics_ptr + o_c, mask=o_c < C, other=0)
    b_invstd = tl.load(statistics_ptr + C + o_c, mask=o_c < C, other=0)
    b_weight = _load_parameter(parameters.weight, o_c, C, 1.0, ACC)
    b_bias = _load_parameter(parameters.bias, o_c, C, 0.0, ACC)
    return b_mean[:, None], b_invstd[:, None], b_weight[:, None], b_bias[:, None]


@triton.jit
def _load_dsum(dsum_ptr, at, ACC: tl.constexpr, TILE: tl.constexpr):
    o_p = pixels(at, TILE)
    return tl.load(dsum_ptr + at.sample * at.P + o_p, mask=o_p < at.P, other=0).to(ACC)


@triton.jit
def dparameters_kernel(
    dr_ptr,  # (N, C, P), or (N, P) where channels were added up
    c_ptr,  # (N, C, P)
    parameters,  # Parameters
    statistics_ptr,  # (2, C)
    partial_ptr,  # gradients of weight, bias and add_weight (2 or 3, programs, C), and of add_bias (programs,), written
    N,
    C,
    P,
    TILE: tl.constexpr,
):
    """Sums of the parameters' gradients of BLOCK_C channels over a program's tiles. Reads dr and c."""
    BLOCK_C: tl.constexpr = TILE.block_c
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    tiles = N * tl.cdiv(P, TILE.block_p)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_mean, b_invstd, b_weight, b_bias = _load_affine(statistics_ptr, parameters, o_c, C, ACC)
    b_add = _load_parameter(parameters.add_weight, o_c, C, 1.0, ACC)
    b_dweight = tl.zeros([BLOCK_C], ACC)
    b_dbias = tl.zeros([BLOCK_C], ACC)
    b_dadd = tl.zeros([BLOCK_C], ACC)
    b_dadd_bias = tl.zeros([1], ACC)
    for t in tl.range(i_q, tiles, programs, num_stages=TILE.stages):
        at = tile_of_all(t, c, C, P, TILE)
        b_c = load_tile(c_ptr, at, TILE)
        # The mean where there is no map, not 0, which may be an infinite number of deviations away.
        m_p = (pixels(at, TILE) < P)[None, :]
        b_normal = (tl.where(m_p, b_c, b_mean) - b_mean) * b_invstd
        b_r = b_normal * b_weight + b_bias
        if parameters.add_weight is None:
            b_dr = load_tile(dr_ptr, at, TILE)
        else:
            b_dsum = _load_dsum(dr_ptr, at, ACC, TILE)
            b_dr = b_add[:, None] * b_dsum[None, :]
            b_dadd += tl.sum(tl.where(b_r <= 0, 0.0, b_r) * b_dsum[None, :], axis=1)
            b_dadd_bias += tl.sum(b_dsum, axis=0)
        b_d = tl.where(b_r <= 0, 0.0, b_dr)
        b_dweight += tl.sum(b_d * b_normal, axis=1)
        b_dbias += tl.sum(b_d, axis=1)
    tl.store(partial_ptr + i_q * C + o_c, b_dweight, mask=m_c)
    tl.store(partial_ptr + (programs + i_q) * C + o_c, b_dbias, mask=m_c)
    if parameters.add_weight is not None:
        tl.store(partial_ptr + (2 * programs + i_q) * C + o_c, b_dadd, mask=m_c)
        tl.store(partial_ptr + 3 * programs * C + i_q + tl.arange(0, 1), b_dadd_bias)


@triton.jit
def dc_kernel(
    dr_ptr,  # (N, C, P), or (N, P) where channels were added up
    c_ptr,  # (N, C, P)
    parameters,  # Parameters
    statistics_ptr,  # (2, C)
    partial_ptr,  # of dparameters_kernel
    dc_ptr,  # (N, C, P), written
    gradients,  # Parameters, written
    N,
    C,
    P,
    BATCH_STATISTICS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
):
    """dc of BLOCK_C channels in a program's tiles, and the parameters' gradients. Reads dr and c."""
    BLOCK_C: tl.constexpr = TILE.block_c
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    tiles = N * tl.cdiv(P, TILE.block_p)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_dweight = tl.sum(_load_partials(partial_ptr, 0, programs, o_c, C, BLOCK_Q), axis=0)
    b_dbias = tl.sum(_load_partials(partial_ptr, 1, programs, o_c, C, BLOCK_Q), axis=0)
    b_add = _load_parameter(parameters.add_weight, o_c, C, 1.0, ACC)
    if i_q == 0:
        if gradients.weight is not None:
            tl.store(gradients.weight + o_c, b_dweight, mask=m_c)
        if gradients.bias is not None:
            tl.store(gradients.bias + o_c, b_dbias, mask=m_c)
        if gradients.add_weight is not None:
            b_dadd = tl.sum(_load_partials(partial_ptr, 2, programs, o_c, C, BLOCK_Q), axis=0)
            tl.store(gradients.add_weight + o_c, b_dadd, mask=m_c)
        if gradients.add_bias is not None:
            o_q = tl.arange(0, BLOCK_Q)
            b_dadd_bias = tl.load(partial_ptr + 3 * programs * C + o_q, mask=o_q < programs, other=0)
            tl.store(gradients.add_bias, tl.sum(b_dadd_bias, axis=0))

    b_mean, b_invstd, b_weight, b_bias = _load_affine(statistics_ptr, parameters, o_c, C, ACC)
    for t in tl.range(i_q, tiles, programs, num_stages=TILE.stages):
        at = tile_of_all(t, c, C, P, TILE)
        b_c = load_tile(c_ptr, at, TILE)
        if parameters.add_weight is None:
            b_dr = load_tile(dr_ptr, at, TILE)
        else:
            b_dr = b_add[:, None] * _load_dsum(dr_ptr, at, ACC, TILE)[None, :]
        b_normal = (b_c - b_mean) * b_invstd
        b_dc = tl.where(b_normal * b_weight + b_bias <= 0, 0.0, b_dr)
        if BATCH_STATISTICS:
            b_dc -= (b_dbias[:, None] + b_normal * b_dweight[:, None]) / (N * P)
        b_dc *= b_weight * b_invstd
        store_tile(b_dc, dc_ptr, at, TILE)


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


def _launch(
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


class Gradients(NamedTuple):
    """dc, and of each parameter its gradient, or empty where there is no such parameter."""

    dc: Tensor
    weight: Tensor
    bias: Tensor
    add_weight: Tensor
    add_bias: Tensor


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


def _launch_backward(
    gradients: Gradients, dr, c, weight, bias, add_weight, add_bias, statistics, batch_statistics
) -> None:
    n, channels, h, w = c.shape
    parameters = Parameters(weight, bias, add_weight, add_bias)
    tile, programs = norm_tile(geometry(c), add_weight is not None)
    grid = cdiv(channels, tile.block_c), programs
    dr = like(dr, c) if add_weight is None else dr.contiguous()
    partial = statistics.new_empty(programs * (2 * channels if add_weight is None else 3 * channels + 1))
    # Beside the sums over channels, tiles ahead would take one of two programs.
    sums_tile = tile if add_weight is None else tile._replace(stages=1)
    dparameters_kernel[grid](
        dr_ptr=dr,
        c_ptr=c,
        parameters=parameters._replace(add_bias=None),
        statistics_ptr=statistics,
        partial_ptr=partial,
        N=n,
        C=channels,
        P=h * w,
        TILE=sums_tile,
        **sums_tile.options,
    )
    dparameters = (None if p is None else g for p, g in zip(parameters, gradients[1:], strict=True))
    dc_kernel[grid](
        dr_ptr=dr,
        c_ptr=c,
        parameters=parameters._replace(add_bias=None),
        statistics_ptr=statistics,
        partial_ptr=partial,
        dc_ptr=gradients.dc,
        gradients=Parameters(*dparameters),
        N=n,
        C=channels,
        P=h * w,
        BATCH_STATISTICS=batch_statistics,
        BLOCK_Q=next_power_of_2(programs),
        TILE=tile,
        **tile.options,
    )


forward_op = register(
    "batch_norm_relu(Tensor c, Tensor? weight, Tensor? bias, Tensor? add_weight, Tensor? add_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, "
    "bool batch_statistics, bool update, float? momentum, float eps) -> (Tensor, Tensor)",
    _allocate,
    _launch,
)
backward_op = register(
    "batch_norm_relu_backward(Tensor dr, Tensor c, Tensor? weight, Tensor? bias, Tensor? add_weight, "
    "Tensor? add_bias, Tensor statistics, bool batch_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
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
