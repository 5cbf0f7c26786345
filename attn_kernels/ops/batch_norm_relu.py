"""BatchNorm + ReLU of a map: ``r = relu((c - mean) / sqrt(var + eps) * weight + bias)``; or ``sum_c w * r + b`` of it.

Ioffe and Szegedy, ICML 2015. M = bytes of c. The sum over the channels is a 1x1 convolution to one channel, of which
neither r nor its gradient is ever written.

Forward 2 launches, in evaluation 1: statistics of the batch read c, M; the second reads c and writes r, 2M.
Backward 2 launches: the parameters' gradients from dr and c, 2M; the second reads dr and c and writes dc, 3M. Behind a
1x1 convolution what is r and dr here is one value a pixel.
Saved: c, and mean and 1 / standard deviation, O(C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from attn_kernels.ops import _config as config
from attn_kernels.ops import _norm
from attn_kernels.ops._device import aligned, load_tile, number, store_tile, update_running
from attn_kernels.ops._launch import norm_tile, number_bits, tile_options
from attn_kernels.ops._library import (
    contiguous,
    dense,
    like,
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from reference._common import accumulation_dtype, is_plain_layer


@triton.jit
def statistics_kernel(
    c_ptr,  # (N, C, P)
    part_ptr,  # sums and sums of squared deviations (2, programs, C), and counts (programs,), of a program's pixels
    batches_ptr,  # (), int64, counted up, or None
    N,
    C,
    P,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The statistics of BLOCK_C channels over a program's tiles, merged as they come (Chan et al., 1983). Reads c."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    blocks = tl.cdiv(P, BLOCK_P)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    # A one-element tensor, so that it is the same type from the first pass on.
    seen = tl.zeros([1], ACC)
    b_sum = tl.zeros([BLOCK_C], ACC)
    b_m2 = tl.zeros([BLOCK_C], ACC)
    for t in tl.range(i_q, N * blocks, programs, num_stages=STAGES):
        p = t % blocks * BLOCK_P
        m_p = p + tl.arange(0, BLOCK_P) < P
        b_c = load_tile(c_ptr, tl.cast(t // blocks, tl.int64), c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        count = tl.minimum(P - p, BLOCK_P).to(ACC)
        b_tile_sum = tl.sum(b_c, axis=1)
        b_mean = b_tile_sum / count
        b_d = tl.where(m_p[None, :], b_c - b_mean[:, None], 0.0)
        b_delta = b_mean - b_sum / tl.maximum(seen, 1.0)
        # 0 at first, also where delta^2 would be infinite.
        b_m2 += tl.sum(b_d * b_d, axis=1) + b_delta * (b_delta * (seen * count / (seen + count)))
        b_sum += b_tile_sum
        seen += count
    tl.store(part_ptr + i_q * C + o_c, b_sum, mask=o_c < C)
    tl.store(part_ptr + (programs + i_q) * C + o_c, b_m2, mask=o_c < C)
    if c == 0:
        tl.store(part_ptr + 2 * programs * C + i_q + tl.arange(0, 1), seen)
        if batches_ptr is not None:  # here, for all programs of the next launch read it
            tl.store(batches_ptr, tl.load(batches_ptr) + 1, mask=i_q == 0)


@triton.jit
def _load_parts(part_ptr, i, programs, o_c, C, PARTS: tl.constexpr):
    """[PARTS, BLOCK_C] of the i-th (programs, C)."""
    o_q = tl.arange(0, PARTS)
    m = (o_q < programs)[:, None] & (o_c < C)[None, :]
    return tl.load(part_ptr + (i * programs + o_q)[:, None] * C + o_c[None, :], mask=m, other=0)


@triton.jit
def _load_parameter(parameter_ptr, o_c, C, DEFAULT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    if parameter_ptr is None:
        return tl.full([BLOCK_C], DEFAULT, ACC)
    else:
        return tl.load(parameter_ptr + o_c, mask=o_c < C, other=0).to(ACC)


@triton.jit(do_not_specialize=["momentum", "eps"])
def normalize_kernel(
    c_ptr,  # (N, C, P)
    part_ptr,  # of statistics_kernel, or None in evaluation
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    add_weight_ptr,  # (1, C, 1, 1), or None where nothing is added up
    add_bias_ptr,  # (1,) or None
    running_mean_ptr,  # (C,), updated if UPDATE, or None
    running_var_ptr,  # (C,), updated if UPDATE, or None
    batches_ptr,  # (), int64, or None
    statistics_ptr,  # (2, C), written: mean and 1 / standard deviation
    r_ptr,  # (N, C, P), or (N, P) where channels are added up, written
    N,
    C,
    P,
    momentum,  # number_bits
    eps,  # number_bits
    UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """r of BLOCK_C channels in a program's tiles, by statistics_kernel's statistics or the running ones. Reads c."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    blocks = tl.cdiv(P, BLOCK_P)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if part_ptr is not None:
        o_q = tl.arange(0, PARTS)
        b_count = tl.load(part_ptr + 2 * programs * C + o_q, mask=o_q < programs, other=0)
        b_sum = _load_parts(part_ptr, 0, programs, o_c, C, PARTS)
        b_mean = tl.sum(b_sum, axis=0) / (N * P)
        b_delta = b_sum / tl.maximum(b_count, 1.0)[:, None] - b_mean[None, :]
        b_m2 = _load_parts(part_ptr, 1, programs, o_c, C, PARTS) + b_count[:, None] * b_delta * b_delta
        b_variance = tl.sum(b_m2, axis=0) / (N * P)
    else:
        b_mean = tl.load(running_mean_ptr + o_c, mask=m_c, other=0).to(ACC)
        b_variance = tl.load(running_var_ptr + o_c, mask=m_c, other=0).to(ACC)
    b_invstd = 1 / tl.sqrt(b_variance + number(eps, ACC))
    if i_q == 0:
        tl.store(statistics_ptr + o_c, b_mean, mask=m_c)
        tl.store(statistics_ptr + C + o_c, b_invstd, mask=m_c)
        if UPDATE:
            factor = number(momentum, ACC)
            if CUMULATIVE:
                factor = 1 / tl.load(batches_ptr).to(ACC)
            count = tl.cast(N * P, ACC)
            update_running(running_mean_ptr + o_c, b_mean, factor, m_c)
            update_running(running_var_ptr + o_c, b_variance * (count / (count - 1)), factor, m_c)

    b_weight = _load_parameter(weight_ptr, o_c, C, 1.0, ACC, BLOCK_C)[:, None]
    b_bias = _load_parameter(bias_ptr, o_c, C, 0.0, ACC, BLOCK_C)[:, None]
    b_add = _load_parameter(add_weight_ptr, o_c, C, 1.0, ACC, BLOCK_C)
    add_bias = 0.0
    if add_bias_ptr is not None:
        add_bias = tl.load(add_bias_ptr).to(ACC)
    for t in tl.range(i_q, N * blocks, programs, num_stages=STAGES):
        i_n = tl.cast(t // blocks, tl.int64)
        p = t % blocks * BLOCK_P
        b_c = load_tile(c_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_r = (b_c - b_mean[:, None]) * b_invstd[:, None] * b_weight + b_bias
        b_r = tl.where(b_r <= 0, 0.0, b_r)
        if add_weight_ptr is None:
            store_tile(b_r, r_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        else:
            b_r = tl.where(m_c[:, None], b_r * b_add[:, None], 0.0)
            o_p = p + tl.arange(0, BLOCK_P)
            tl.store(r_ptr + i_n * P + o_p, tl.sum(b_r, axis=0) + add_bias, mask=o_p < P)


@triton.jit
def _load_affine(statistics_ptr, weight_ptr, bias_ptr, o_c, C, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean, 1 / standard deviation, weight and bias of each channel, [BLOCK_C, 1]."""
    b_mean = tl.load(statistics_ptr + o_c, mask=o_c < C, other=0)
    b_invstd = tl.load(statistics_ptr + C + o_c, mask=o_c < C, other=0)
    b_weight = _load_parameter(weight_ptr, o_c, C, 1.0, ACC, BLOCK_C)
    b_bias = _load_parameter(bias_ptr, o_c, C, 0.0, ACC, BLOCK_C)
    return b_mean[:, None], b_invstd[:, None], b_weight[:, None], b_bias[:, None]


@triton.jit
def _load_dsum(dsum_ptr, i_n, p, P, ACC: tl.constexpr, BLOCK_P: tl.constexpr):
    o_p = p + tl.arange(0, BLOCK_P)
    return tl.load(dsum_ptr + i_n * P + o_p, mask=o_p < P, other=0).to(ACC)


@triton.jit
def dparameters_kernel(
    dr_ptr,  # (N, C, P), or (N, P) where channels were added up
    c_ptr,  # (N, C, P)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    add_weight_ptr,  # (1, C, 1, 1) or None
    statistics_ptr,  # (2, C)
    part_ptr,  # gradients of weight, bias and add_weight (2 or 3, programs, C), and of add_bias (programs,), written
    N,
    C,
    P,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of the parameters' gradients of BLOCK_C channels over a program's tiles. Reads dr and c."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    blocks = tl.cdiv(P, BLOCK_P)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_mean, b_invstd, b_weight, b_bias = _load_affine(statistics_ptr, weight_ptr, bias_ptr, o_c, C, ACC, BLOCK_C)
    b_add = _load_parameter(add_weight_ptr, o_c, C, 1.0, ACC, BLOCK_C)
    b_dweight = tl.zeros([BLOCK_C], ACC)
    b_dbias = tl.zeros([BLOCK_C], ACC)
    b_dadd = tl.zeros([BLOCK_C], ACC)
    b_dadd_bias = tl.zeros([1], ACC)
    for t in tl.range(i_q, N * blocks, programs, num_stages=STAGES):
        i_n = tl.cast(t // blocks, tl.int64)
        p = t % blocks * BLOCK_P
        b_c = load_tile(c_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        # The mean where there is no map, not 0, which may be an infinite number of deviations away.
        m_p = (p + tl.arange(0, BLOCK_P) < P)[None, :]
        b_normal = (tl.where(m_p, b_c, b_mean) - b_mean) * b_invstd
        b_r = b_normal * b_weight + b_bias
        if add_weight_ptr is None:
            b_dr = load_tile(dr_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        else:
            b_dsum = _load_dsum(dr_ptr, i_n, p, P, ACC, BLOCK_P)
            b_dr = b_add[:, None] * b_dsum[None, :]
            b_dadd += tl.sum(tl.where(b_r <= 0, 0.0, b_r) * b_dsum[None, :], axis=1)
            b_dadd_bias += tl.sum(b_dsum, axis=0)
        b_d = tl.where(b_r <= 0, 0.0, b_dr)
        b_dweight += tl.sum(b_d * b_normal, axis=1)
        b_dbias += tl.sum(b_d, axis=1)
    tl.store(part_ptr + i_q * C + o_c, b_dweight, mask=m_c)
    tl.store(part_ptr + (programs + i_q) * C + o_c, b_dbias, mask=m_c)
    if add_weight_ptr is not None:
        tl.store(part_ptr + (2 * programs + i_q) * C + o_c, b_dadd, mask=m_c)
        tl.store(part_ptr + 3 * programs * C + i_q + tl.arange(0, 1), b_dadd_bias)


@triton.jit
def dc_kernel(
    dr_ptr,  # (N, C, P), or (N, P) where channels were added up
    c_ptr,  # (N, C, P)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    add_weight_ptr,  # (1, C, 1, 1) or None
    statistics_ptr,  # (2, C)
    part_ptr,  # of dparameters_kernel
    dc_ptr,  # (N, C, P), written
    dweight_ptr,  # (C,), written, or None
    dbias_ptr,  # (C,), written, or None
    dadd_weight_ptr,  # (1, C, 1, 1), written, or None
    dadd_bias_ptr,  # (1,), written, or None
    N,
    C,
    P,
    BATCH_STATISTICS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dc of BLOCK_C channels in a program's tiles, and the parameters' gradients. Reads dr and c."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    blocks = tl.cdiv(P, BLOCK_P)
    i_q, programs = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_dweight = tl.sum(_load_parts(part_ptr, 0, programs, o_c, C, PARTS), axis=0)
    b_dbias = tl.sum(_load_parts(part_ptr, 1, programs, o_c, C, PARTS), axis=0)
    b_add = _load_parameter(add_weight_ptr, o_c, C, 1.0, ACC, BLOCK_C)
    if i_q == 0:
        if dweight_ptr is not None:
            tl.store(dweight_ptr + o_c, b_dweight, mask=m_c)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + o_c, b_dbias, mask=m_c)
        if dadd_weight_ptr is not None:
            b_dadd = tl.sum(_load_parts(part_ptr, 2, programs, o_c, C, PARTS), axis=0)
            tl.store(dadd_weight_ptr + o_c, b_dadd, mask=m_c)
        if dadd_bias_ptr is not None:
            o_q = tl.arange(0, PARTS)
            b_dadd_bias = tl.load(part_ptr + 3 * programs * C + o_q, mask=o_q < programs, other=0)
            tl.store(dadd_bias_ptr, tl.sum(b_dadd_bias, axis=0))

    b_mean, b_invstd, b_weight, b_bias = _load_affine(statistics_ptr, weight_ptr, bias_ptr, o_c, C, ACC, BLOCK_C)
    for t in tl.range(i_q, N * blocks, programs, num_stages=STAGES):
        i_n = tl.cast(t // blocks, tl.int64)
        p = t % blocks * BLOCK_P
        b_c = load_tile(c_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if add_weight_ptr is None:
            b_dr = load_tile(dr_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        else:
            b_dr = b_add[:, None] * _load_dsum(dr_ptr, i_n, p, P, ACC, BLOCK_P)[None, :]
        b_normal = (b_c - b_mean) * b_invstd
        b_dc = tl.where(b_normal * b_weight + b_bias <= 0, 0.0, b_dr)
        if BATCH_STATISTICS:
            b_dc -= (b_dbias[:, None] + b_normal * b_dweight[:, None]) / (N * P)
        b_dc *= b_weight * b_invstd
        store_tile(b_dc, dc_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)


def _options(c: Tensor, tile: config.Tile) -> dict[str, int]:
    return {"STAGES": config.STAGES[c.element_size()], **tile_options(c, tile)}


def _forward(
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
) -> tuple[Tensor, Tensor]:
    n, channels, h, w = c.shape
    tile, programs = norm_tile(c, add_weight is not None)
    grid, common = (config.cdiv(channels, tile.block_c), programs), _options(c, tile)
    r, statistics = _empty_outputs(c, add_weight)
    parts = None
    mean, variance = contiguous(running_mean, running_var)
    if batch_statistics:
        parts = statistics.new_empty(programs * (2 * channels + 1))
        statistics_kernel[grid](c, parts, batches if update else None, n, channels, h * w, **common)
    normalize_kernel[grid](
        c,
        parts,
        weight,
        bias,
        add_weight,
        add_bias,
        mean,
        variance,
        batches,
        statistics,
        r,
        n,
        channels,
        h * w,
        number_bits(momentum or 0.0, c),
        number_bits(eps, c),
        UPDATE=update,
        CUMULATIVE=momentum is None,
        PARTS=config.next_power_of_2(programs),
        **common,
    )
    if update:
        for buffer, written in ((running_mean, mean), (running_var, variance)):
            if buffer is not written:
                buffer.copy_(written)
        _norm.mark_updated(running_mean, running_var, batches)
    return r, statistics


def _empty_outputs(c: Tensor, add_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    n, channels, h, w = c.shape
    r = torch.empty_like(c) if add_weight is None else c.new_empty((n, 1, h, w))
    return r, c.new_empty((2, channels), dtype=accumulation_dtype(c))


def _forward_fake(
    c,
    weight,
    bias,
    add_weight,
    add_bias,
    running_mean,
    running_var,
    batches,
    batch_statistics,
    update,
    momentum,
    eps,
):
    return _empty_outputs(c, add_weight)


def _backward(
    dr: Tensor,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add_weight: Tensor | None,
    add_bias: Tensor | None,
    statistics: Tensor,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, channels, h, w = c.shape
    tile, programs = norm_tile(c, add_weight is not None)
    grid, common = (config.cdiv(channels, tile.block_c), programs), _options(c, tile)
    dr = like(dr, c) if add_weight is None else dr.contiguous()
    parameters = weight, bias, add_weight, add_bias
    dc, *gradients = _empty_gradients(dr, c, *parameters, statistics, batch_statistics)
    parts = statistics.new_empty(programs * (2 * channels if add_weight is None else 3 * channels + 1))
    # Beside the sums over channels, tiles ahead would take one of two programs.
    stages = common["STAGES"] if add_weight is None else 1
    dparameters_kernel[grid](
        dr, c, weight, bias, add_weight, statistics, parts, n, channels, h * w, **common | {"STAGES": stages}
    )
    dc_kernel[grid](
        dr,
        c,
        weight,
        bias,
        add_weight,
        statistics,
        parts,
        dc,
        *(None if p is None else g for p, g in zip(parameters, gradients, strict=True)),
        n,
        channels,
        h * w,
        BATCH_STATISTICS=batch_statistics,
        PARTS=config.next_power_of_2(programs),
        **common,
    )
    return dc, *gradients


def _empty_gradients(dr, c, weight, bias, add_weight, add_bias, statistics, batch_statistics):
    parameters = weight, bias, add_weight, add_bias
    return torch.empty_like(c), *(c.new_empty(0) if p is None else torch.empty_like(p) for p in parameters)


forward_op = register(
    "batch_norm_relu(Tensor c, Tensor? weight, Tensor? bias, Tensor? add_weight, Tensor? add_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, "
    "bool batch_statistics, bool update, float? momentum, float eps) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = register(
    "batch_norm_relu_backward(Tensor dr, Tensor c, Tensor? weight, Tensor? bias, Tensor? add_weight, "
    "Tensor? add_bias, Tensor statistics, bool batch_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
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
    return _norm.is_fusable(norm) and is_plain_layer(activation, nn.ReLU) and _norm.has_usual_state(norm)


def can_add(conv: object, channels: int) -> bool:
    """Whether the kernels can stand for this layer behind them: a plain 1x1 convolution of few channels to one."""
    return (
        is_plain_layer(conv, nn.Conv2d)
        and (conv.in_channels, conv.out_channels) == (channels, 1)
        and channels <= config.ADDED_CHANNELS
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.weight.shape == (1, channels, 1, 1)
        and (conv.bias is None or conv.bias.shape == (1,))
        and _norm.is_plain(conv)
    )


def batch_norm_relu(c: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d | None = None) -> Tensor:
    """``conv(relu(norm(c)))``, differentiable, of the map ``c`` (N, C, H, W); in its dtype and, without conv, layout.

    ``norm`` and ``conv`` as :func:`is_fusable` and :func:`can_add` want them. The buffers are updated in the kernels.
    """
    add = (None, None) if conv is None else (conv.weight, conv.bias)
    parameters = contiguous(norm.weight, norm.bias, *add)
    function = _BatchNormReLU.apply if needs_grad(c, *parameters) else _inference
    return function(dense(c), *parameters, *_norm.buffers(norm), *_norm.options(norm))


def _inference(*args) -> Tensor:
    return forward_op(*args)[0]
