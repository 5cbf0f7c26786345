"""Pools of planes on the device: average, maximum, lp norm and logsumexp over the pixels of each channel.

The first phase of a channel gate (see grid_sync.py), and the pools of channel attention. A task owns a block of
channels, ``samples`` samples one after another, and of large planes a part. The statistics that the parts of a plane
leave (``stats``) are added up, in order, by the task of the last one. Of an average alone nobody adds up the parts:
the product of each with fc1 is a partial sum as that of a block of channels.

Shapes: x (N, C, P) in either layout; pool (N, K, C); stats (N, S, Q, C) of S parts of a plane; argmax (N, C).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from attn_kernels.ops.common.excite import Rows, fc1
from attn_kernels.ops.common.grid_sync import JOIN, PARTS, unless, wait
from attn_kernels.ops.common.matmul import put_row
from attn_kernels.ops.common.reduce import first_max, nowhere, running_max
from attn_kernels.ops.common.tile import Place, at_pixel, channels, load_tile


class Scratch(NamedTuple):
    """Pointers to what the programs of a forward pass leave each other.

    Partial sums of fc1 (N, J, K, R), and of each part of a plane its statistics (N, S, Q, C) and its first maxima
    (N, S, C).
    """

    partial: tl.tensor
    stats: tl.tensor
    arg: tl.tensor


class Workspace(NamedTuple):
    """Offsets of the scratch memory's parts, of which the first is at 0, and its size in elements without flags."""

    arg: int
    stats: int
    size: int


@triton.jit
def workspace(N, C, R, S, J, POOLS: tl.constexpr, JOINED: tl.constexpr):
    """Also called by the host, as ``workspace.fn``; a kernel gives N as an int64."""
    arg = N * J * POOLS.K * R
    stats = arg + N * S * C * (POOLS.max if JOINED else 0)
    return Workspace(arg, stats, stats + N * S * POOLS.Q * C * (1 if JOINED else 0))


@triton.jit
def scratch_pointers(scratch_ptr, size, J, POOLS: tl.constexpr, JOINED: tl.constexpr):
    begin = workspace(tl.cast(size.N, tl.int64), size.C, size.R, size.S, J, POOLS, JOINED)
    arg_ptr = (scratch_ptr + begin.arg).to(tl.pointer_type(tl.int32), bitcast=True)
    return Scratch(scratch_ptr, scratch_ptr + begin.stats, arg_ptr)


@triton.jit
def _top_shift(b_top):
    """The shift of logsumexp's exponents."""
    return tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)


@triton.jit
def _sum_exp(x_ptr, at, begin, end, b_shift, TILE: tl.constexpr):
    """[BLOCK_C] sums of exp(x - shift). Reads x."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], b_shift.dtype)
    for p in range(begin, end, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        b_x = load_tile(x_ptr, at_pixel(at, p), TILE)
        b_sum += tl.where((o_p < at.P)[None, :], tl.exp(b_x - b_shift[:, None]), 0.0)
    return tl.sum(b_sum, axis=1)


@triton.jit
def _pool_done(b_rows, row, b_pool, pool_ptr, at, k, L: tl.constexpr, STORED: tl.constexpr, TILE: tl.constexpr):
    """Stores a pool of a sample, the k-th of L, if it is STORED, and puts it among those of the other samples."""
    o_c = channels(at, TILE)
    if pool_ptr is not None and STORED:
        tl.store(pool_ptr + (at.sample * L + k) * at.C + o_c, b_pool, mask=o_c < at.C)
    return put_row(b_rows, row, tl.where(o_c < at.C, b_pool, 0.0))


@triton.jit
def _squeeze_samples(
    x_ptr,
    w1_ptr,
    pool_ptr,
    argmax_ptr,
    scratch,
    group,
    i_j,
    size,
    POOLS: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """:func:`squeeze_planes` of several samples, whose planes are a tile each."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    SAMPLES: tl.constexpr = WORK.samples
    L: tl.constexpr = POOLS.lp + POOLS.lse
    ACC: tl.constexpr = scratch.partial.dtype.element_ty
    C, P = size.C, size.P
    c = i_j * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    b_avgs = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_maxs = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_lps = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_lses = tl.zeros([SAMPLES, BLOCK_C], ACC)
    for row in tl.range(0, tl.minimum(SAMPLES, size.N - group * SAMPLES), num_stages=TILE.stages):
        at = Place(tl.cast(group * SAMPLES + row, tl.int64), c, 0, C, P)
        b_x = load_tile(x_ptr, at, TILE)
        if POOLS.avg:
            b_avgs = put_row(b_avgs, row, tl.sum(b_x, axis=1) / P)
        if POOLS.max or POOLS.lse:
            b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + o_p[None, :]
            b_top, b_first = first_max(b_x + nowhere(o_p < P, ACC)[None, :], b_arg, 1)
        if POOLS.max:
            if argmax_ptr is not None:
                tl.store(argmax_ptr + at.sample * C + o_c, b_first, mask=o_c < C)
            b_maxs = _pool_done(b_maxs, row, b_top, pool_ptr, at, 0, L, False, TILE)
        if POOLS.lp:
            b_lp = tl.sqrt(tl.sum(b_x * b_x, axis=1))
            b_lps = _pool_done(b_lps, row, b_lp, pool_ptr, at, 0, L, True, TILE)
        if POOLS.lse:
            b_shift = _top_shift(b_top)
            b_exp = tl.where((o_p < P)[None, :], tl.exp(b_x - b_shift[:, None]), 0.0)
            b_lse = tl.log(tl.sum(b_exp, axis=1)) + b_shift
            b_lses = _pool_done(b_lses, row, b_lse, pool_ptr, at, POOLS.lp, L, True, TILE)
    rows = Rows(b_avgs, b_maxs, b_lps, b_lses)
    fc1(rows, w1_ptr, scratch.partial, group, i_j, o_c, tl.cdiv(C, BLOCK_C), size, POOLS, WORK.block_r)


@triton.jit
def squeeze_planes(
    x_ptr,  # (N, C, P)
    w1_ptr,  # (R, C), or None to pool only
    pool_ptr,  # (N, L, C), written, or None: all pools if ALL, else lp and lse
    argmax_ptr,  # (N, C), written if there is a maximum, or None
    scratch,  # pointers: partial, written unless there is no fc1; stats and arg, written if WORK.joined
    sync,  # of the group's tasks of this phase
    group,
    task,
    size,
    ALL: tl.constexpr,  # pool_ptr is for all pools
    POOLS: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """pool_k[c] and fc1[:, c] @ pool_k[c] of a task. Reads its part of x once (twice with lse)."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    BLOCK_S: tl.constexpr = max(1024 // TILE.block_c, 2)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    TOP: tl.constexpr = POOLS.max or POOLS.lse
    Q: tl.constexpr = POOLS.Q
    # Where lp and lse begin in the statistics, and among the pools that are stored.
    AFTER_TOP: tl.constexpr = POOLS.avg + TOP
    FIRST: tl.constexpr = POOLS.avg + POOLS.max if ALL else 0
    L: tl.constexpr = FIRST + POOLS.lp + POOLS.lse
    C, P, S, chunk = size.C, size.P, size.S, size.chunk
    J = tl.cdiv(C, BLOCK_C)
    i_j = task // S
    i_s = task % S
    c = i_j * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = i_s * chunk
    end = tl.minimum(begin + chunk, P)
    if WORK.joined and not WORK.single:
        end = tl.where(sync.epoch == JOIN, begin, end)
    i_n = tl.cast(group, tl.int64)
    at = Place(i_n, c, begin, C, P)
    # Lane by lane along the plane; lanes meet once, at the end.
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_square = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_max = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
    b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + begin + tl.arange(0, BLOCK_P)[None, :]
    for p in tl.range(begin, end, BLOCK_P, num_stages=TILE.stages):
        o_p = p + tl.arange(0, BLOCK_P)
        b_x = load_tile(x_ptr, at_pixel(at, p), TILE)
        if POOLS.avg:
            b_sum += b_x
        if POOLS.lp:
            b_square += b_x * b_x
        if TOP:
            b_max, b_arg = running_max(b_max, b_arg, b_x + nowhere(o_p < P, ACC)[None, :], o_p[None, :])
    b_avg = tl.zeros([BLOCK_C], ACC)
    b_top = tl.full([BLOCK_C], float("-inf"), ACC)
    b_first = tl.zeros([BLOCK_C], tl.int32)
    b_lp = tl.zeros([BLOCK_C], ACC)
    b_exp = tl.zeros([BLOCK_C], ACC)
    if POOLS.avg:
        b_avg = tl.sum(b_sum, axis=1)
    if TOP:
        b_top, b_first = first_max(b_max, b_arg, 1)
    if POOLS.lp:
        b_lp = tl.sum(b_square, axis=1)
    if POOLS.lse:
        b_exp = _sum_exp(x_ptr, at, begin, end, _top_shift(b_top), TILE)

    last = True
    if WORK.joined:
        p_stats = scratch.stats + (i_n * S + i_s) * Q * C + o_c
        p_arg = i_n * S * C + o_c
        if WORK.single:
            last = i_s == S - 1
            m_own = m_c
        else:
            last = sync.epoch == JOIN
            m_own = o_c < tl.where(sync.epoch == PARTS, C, 0)
        if POOLS.avg:
            tl.store(p_stats, b_avg, mask=m_own)
        if TOP:
            tl.store(p_stats + POOLS.avg * C, b_top, mask=m_own)
        if POOLS.max:
            tl.store(scratch.arg + p_arg + i_s * C, b_first, mask=m_own)
        if POOLS.lp:
            tl.store(p_stats + AFTER_TOP * C, b_lp, mask=m_own)
        if POOLS.lse:
            tl.store(p_stats + (AFTER_TOP + POOLS.lp) * C, b_exp, mask=m_own)
        if last:
            p_stats = scratch.stats + i_n * S * Q * C + o_c
            b_avg = tl.zeros([BLOCK_C], ACC)
            b_top = tl.full([BLOCK_C], float("-inf"), ACC)
            b_first = tl.zeros([BLOCK_C], tl.int32)
            b_lp = tl.zeros([BLOCK_C], ACC)
            b_exp = tl.zeros([BLOCK_C], ACC)
            parts = tl.where(wait(sync.first + i_j * S, S - 1, sync, WORK.single), 0, S)
            # A tile of parts at a time: one after another they would be a chain of round trips to L2.
            for s in range(0, parts, BLOCK_S):
                o_s = s + tl.arange(0, BLOCK_S)[None, :]
                m_s = m_c[:, None] & (o_s < S)
                p_s = p_stats[:, None] + o_s * Q * C
                if POOLS.avg:
                    b_avg += tl.sum(tl.load(p_s, mask=m_s, other=0, cache_modifier=".cg"), axis=1)
                if TOP:
                    b_tops = tl.load(p_s + POOLS.avg * C, mask=m_s, other=float("-inf"), cache_modifier=".cg")
                    b_args = tl.zeros([BLOCK_C, BLOCK_S], tl.int32)
                    if POOLS.max:
                        p_i = scratch.arg + p_arg[:, None] + o_s * C
                        b_args = tl.load(p_i, mask=m_s, other=0, cache_modifier=".cg")
                    b_s, b_i = first_max(b_tops, b_args, 1)
                    # The first of -inf only is a maximum as well.
                    b_first = tl.where(s == 0, b_i, b_first)
                    b_top, b_first = running_max(b_top, b_first, b_s, b_i)
                if POOLS.lp:
                    b_lps = tl.load(p_s + AFTER_TOP * C, mask=m_s, other=0, cache_modifier=".cg")
                    b_lp += tl.sum(b_lps, axis=1)
            if POOLS.lse:
                shift = _top_shift(b_top)
                for s in range(0, parts, BLOCK_S):
                    o_s = s + tl.arange(0, BLOCK_S)[None, :]
                    m_s = m_c[:, None] & (o_s < S)
                    p_s = p_stats[:, None] + o_s * Q * C
                    b_tops = tl.load(p_s + POOLS.avg * C, mask=m_s, other=0, cache_modifier=".cg")
                    p_exps = p_s + (AFTER_TOP + POOLS.lp) * C
                    b_exps = tl.load(p_exps, mask=m_s, other=0, cache_modifier=".cg")
                    # 0 of a part that is all -inf, whose factor may be infinite.
                    b_scaled = b_exps * tl.exp(_top_shift(b_tops) - shift[:, None])
                    b_exp += tl.sum(tl.where(b_exps == 0, 0.0, b_scaled), axis=1)
            b_avg = unless(parts == 0, b_avg)
            b_top = unless(parts == 0, b_top)
            b_lp = unless(parts == 0, b_lp)

    if last:
        b_none = tl.zeros([1, BLOCK_C], ACC)
        b_avg_row = _pool_done(b_none, 0, b_avg / P, pool_ptr, at, 0, L, ALL and POOLS.avg, TILE)
        if POOLS.max and argmax_ptr is not None:
            tl.store(argmax_ptr + i_n * C + o_c, b_first, mask=m_c)
        b_max_row = _pool_done(b_none, 0, b_top, pool_ptr, at, POOLS.avg, L, ALL and POOLS.max, TILE)
        b_lp_row = _pool_done(b_none, 0, tl.sqrt(b_lp), pool_ptr, at, FIRST, L, POOLS.lp, TILE)
        b_lse = b_exp
        if POOLS.lse:
            b_lse = tl.log(b_exp) + _top_shift(b_top)
        b_lse_row = _pool_done(b_none, 0, b_lse, pool_ptr, at, FIRST + POOLS.lp, L, POOLS.lse, TILE)
        if w1_ptr is not None:
            rows = Rows(b_avg_row, b_max_row, b_lp_row, b_lse_row)
            if WORK.joined:
                fc1(rows, w1_ptr, scratch.partial, group, i_j, o_c, J, size, POOLS, WORK.block_r)
            else:  # fc1 of an average is the sum of that of its parts, which need not meet first
                fc1(rows, w1_ptr, scratch.partial, group, task, o_c, J * S, size, POOLS, WORK.block_r)


@triton.jit
def squeeze(
    x_ptr,
    w1_ptr,
    pool_ptr,
    argmax_ptr,
    scratch,
    sync,
    group,
    task,
    size,
    POOLS: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The pools of a task, and its partial sums of fc1; pointers as :func:`squeeze_planes` describes them."""
    if WORK.samples == 1:
        squeeze_planes(x_ptr, w1_ptr, pool_ptr, argmax_ptr, scratch, sync, group, task, size, False, POOLS, WORK, TILE)
    else:
        _squeeze_samples(x_ptr, w1_ptr, pool_ptr, argmax_ptr, scratch, group, task, size, POOLS, WORK, TILE)
