"""The backward pass of BatchNorm + ReLU: sums of the parameters' gradients, then the map's."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.bam.norm.forward import load_parameter, load_partials, norm_tile
from attn_kernels.ops.common.layout import like
from attn_kernels.ops.common.tile import aligned, load_tile, pixels, store_tile, tile_of_all
from attn_kernels.ops.common.tiling import cdiv, geometry, next_power_of_2


class Parameters(NamedTuple):
    """Of the norm, (C,) or None; of the convolution (1, C, 1, 1), or None where nothing is added up, and (1,) or None.

    Or their gradients, each None where it is not wanted.
    """

    weight: Tensor | None
    bias: Tensor | None
    add_weight: Tensor | None
    add_bias: Tensor | None


@triton.jit
def _load_affine(statistics_ptr, parameters, o_c, C, ACC: tl.constexpr):
    """Mean, 1 / standard deviation, weight and bias of each channel, [BLOCK_C, 1]."""
    b_mean = tl.load(statistics_ptr + o_c, mask=o_c < C, other=0)
    b_invstd = tl.load(statistics_ptr + C + o_c, mask=o_c < C, other=0)
    b_weight = load_parameter(parameters.weight, o_c, C, 1.0, ACC)
    b_bias = load_parameter(parameters.bias, o_c, C, 0.0, ACC)
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
    b_add = load_parameter(parameters.add_weight, o_c, C, 1.0, ACC)
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
    b_dweight = tl.sum(load_partials(partial_ptr, 0, programs, o_c, C, BLOCK_Q), axis=0)
    b_dbias = tl.sum(load_partials(partial_ptr, 1, programs, o_c, C, BLOCK_Q), axis=0)
    b_add = load_parameter(parameters.add_weight, o_c, C, 1.0, ACC)
    if i_q == 0:
        if gradients.weight is not None:
            tl.store(gradients.weight + o_c, b_dweight, mask=m_c)
        if gradients.bias is not None:
            tl.store(gradients.bias + o_c, b_dbias, mask=m_c)
        if gradients.add_weight is not None:
            b_dadd = tl.sum(load_partials(partial_ptr, 2, programs, o_c, C, BLOCK_Q), axis=0)
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


class Gradients(NamedTuple):
    """dc, and of each parameter its gradient, or empty where there is no such parameter."""

    dc: Tensor
    weight: Tensor
    bias: Tensor
    add_weight: Tensor
    add_bias: Tensor


def launch_backward(
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
