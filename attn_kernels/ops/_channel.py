"""Squeeze and excitation of channels: the part that SE and CBAM's channel gate share, forward.

A gate ``g[n, c] = gate(sum over pools k of fc2(act(fc1(pool_k(x)))))`` in three kinds of work items (see _phases.py),
none of which walks all the weights of a layer: those that pool x also multiply the channels that they own by their
columns of fc1 (partial sums over channels, ``part``); those that add the partial sums up (``pre``); and those
that use the gate, which multiply by their rows of fc2.

An item owns a block of channels, ``SAMPLES`` samples one after another, whose products are one matrix product, and of
large planes a part. What the parts of a plane leave (``stats``) is added up, in order, by the item of the last one. Of
an average alone nobody adds up the parts: the product of each with fc1 is a partial sum as that of a block of channels.

Shapes: x (N, C, P) in either layout; pool (N, K, C); part (N, J, K, H) of J blocks of channels, or blocks and parts;
stats (N, S, Q, C) of S parts of a plane; pre (N, K, H); gate (N, C). Saved for backward are ``pre``, from which the
gate follows, the maximum's index, and the pools that backward would not have from x at little cost (lp, lse).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._device import activate, aligned, gate_value, load_tile
from attn_kernels.ops._launch import channel_plan, tile_options
from attn_kernels.ops._phases import (
    JOIN,
    PARTS,
    empty_scratch,
    launches,
    mark,
    new_stamp,
    phase_item,
    slots_pointer,
    unless,
    wait,
)
from reference._common import accumulation_dtype

# A set of pools is an integer of these bits; the k-th pool is the k-th bit that is set.
POOLS = ("avg", "max", "lp", "lse")
AVERAGE = 1


@triton.jit
def _bits(b):
    return b.to(tl.int64 if b.dtype == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def nowhere(m, ACC: tl.constexpr):
    """What added to a value makes it one for :func:`running_max`: nothing where m, -inf elsewhere. -0 becomes 0."""
    return tl.where(m, 0.0, float("-inf")).to(ACC)


@triton.jit
def running_max(b_max, b_arg, b_x, o_x):
    """Lane by lane: only a greater value, or the first NaN, takes the place of an earlier one. x must not be -0."""
    # A maximum that is NaN stays the same NaN, so that whether bits change tells whether it is a new one. To compare
    # values with NaN in mind takes twice as many instructions.
    b_new = tl.maximum(b_max, b_x, propagate_nan=tl.PropagateNan.ALL)
    return b_new, tl.where(_bits(b_new) != _bits(b_max), o_x, b_arg)


# More than any index of a maximum.
_NO_INDEX = tl.constexpr(1 << 30)


@triton.jit
def first_max(b_max, b_arg, AXIS: tl.constexpr):
    """The maximum of lanes along an axis and its lowest index; NaN, the first one, counts as the greatest."""
    # NaN as an infinity whose index comes before those of the others.
    nan = b_max != b_max
    b_max = tl.where(nan, float("inf"), b_max)
    b_arg = tl.where(nan, b_arg - _NO_INDEX, b_arg)
    b_top = tl.max(b_max, axis=AXIS)
    first = tl.min(tl.where(b_max == tl.expand_dims(b_top, AXIS), b_arg, _NO_INDEX), axis=AXIS)
    return tl.where(first < 0, float("nan"), b_top), tl.where(first < 0, first + _NO_INDEX, first)


@triton.jit
def load_weight(weight_ptr, o_m, o_k, M, K, ACC: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of a layer's weights (M, K)."""
    pointers = weight_ptr + o_m[:, None].to(tl.int64) * K + o_k[None, :]
    return tl.load(pointers, mask=(o_m < M)[:, None] & (o_k < K)[None, :], other=0).to(ACC)


@triton.jit
def product(b_rows, b_weight):
    """[ROWS, K] times [M, K] transposed."""
    if b_rows.shape[0] == 1:
        return tl.expand_dims(tl.sum(b_rows * b_weight, axis=1), 0)
    else:
        return tl.dot(b_rows, tl.trans(b_weight), input_precision="ieee", out_dtype=b_rows.dtype)


@triton.jit
def put_row(b_rows, row, b_row):
    return tl.where((tl.arange(0, b_rows.shape[0]) == row)[:, None], b_row[None, :], b_rows)


@triton.jit
def get_row(b_rows, row):
    return tl.sum(tl.where((tl.arange(0, b_rows.shape[0]) == row)[:, None], b_rows, 0.0), axis=0)


@triton.jit
def pool_pointer(saved_ptr, N, H, K: tl.constexpr):
    """Where the pools are in what is saved, behind ``pre`` (N, K, H)."""
    return saved_ptr + tl.cast(N, tl.int64) * K * H


@triton.jit
def forward_pointers(scratch_ptr, N, C, H, J, S, K: tl.constexpr, MAX: tl.constexpr):
    """Where ``part``, ``stats`` and ``arg`` are; the latter two only where parts are joined, and ``arg`` if MAX."""
    n = tl.cast(N, tl.int64)
    arg_ptr = scratch_ptr + n * J * K * H
    return scratch_ptr, arg_ptr + n * S * C * MAX, arg_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _top_shift(b_top):
    """What logsumexp subtracts."""
    return tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)


@triton.jit
def _sum_exp(
    x_ptr, i_n, c, begin, end, C, P, b_shift, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C] sums of exp(x - shift). Reads x."""
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p in range(begin, end, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_sum += tl.where((o_p < P)[None, :], tl.exp(b_x - b_shift[:, None]), 0.0)
    return tl.sum(b_sum, axis=1)


@triton.jit
def squeeze_samples(
    x_ptr, w1_ptr, pool_ptr, argmax_ptr, part_ptr, group, i_j, N, C, P, H, AVG: tl.constexpr, MAX: tl.constexpr,
    LP: tl.constexpr, LSE: tl.constexpr, ACC: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """:func:`squeeze_sample` of several samples, whose planes are a tile each."""
    c = i_j * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    b_avg_rows = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_max_rows = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_lp_rows = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_lse_rows = tl.zeros([SAMPLES, BLOCK_C], ACC)
    for row in tl.range(0, tl.minimum(SAMPLES, N - group * SAMPLES), num_stages=STAGES):
        i_n = tl.cast(group * SAMPLES + row, tl.int64)
        b_x = load_tile(x_ptr, i_n, c, 0, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if AVG:
            b_avg_rows = put_row(b_avg_rows, row, tl.sum(b_x, axis=1) / P)
        if MAX or LSE:
            b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + o_p[None, :]
            b_top, b_first = first_max(b_x + nowhere(o_p < P, ACC)[None, :], b_arg, 1)
        if MAX:
            if argmax_ptr is not None:
                tl.store(argmax_ptr + i_n * C + o_c, b_first, mask=o_c < C)
            b_max_rows = _pool_done(b_max_rows, row, b_top, pool_ptr, i_n, o_c, 0, C, False, LP + LSE)
        if LP:
            b_lp = tl.sqrt(tl.sum(b_x * b_x, axis=1))
            b_lp_rows = _pool_done(b_lp_rows, row, b_lp, pool_ptr, i_n, o_c, 0, C, True, LP + LSE)
        if LSE:
            b_shift = _top_shift(b_top)
            b_exp = tl.where((o_p < P)[None, :], tl.exp(b_x - b_shift[:, None]), 0.0)
            b_lse = tl.log(tl.sum(b_exp, axis=1)) + b_shift
            b_lse_rows = _pool_done(b_lse_rows, row, b_lse, pool_ptr, i_n, o_c, LP, C, True, LP + LSE)
    _fc1(b_avg_rows, b_max_rows, b_lp_rows, b_lse_rows, w1_ptr, part_ptr, group, i_j, o_c, N, C, H, tl.cdiv(C, BLOCK_C),
         AVG, MAX, LP, LSE, SAMPLES, BLOCK_H)  # fmt: skip


@triton.jit
def squeeze_sample(
    x_ptr,  # (N, C, P)
    w1_ptr,  # (H, C), or None to pool only
    stats_ptr,  # (N, S, Q, C), written if JOINED: sum, maximum, sum of squares, sum of exponentials
    arg_ptr,  # (N, S, C), written if JOINED and there is a maximum
    pool_ptr,  # (N, L, C), written, or None: all pools, or those that backward cannot have from x at little cost
    argmax_ptr,  # (N, C), written if there is a maximum, or None
    part_ptr,  # (N, J, K, H), written, or None; (N, J * S, 1, H) if planes are divided but not JOINED
    slots_ptr,  # of the group's items of this phase, or None where each phase is a launch
    given_up_ptr,
    stamp,
    phase,  # PARTS, or JOIN: x has been read, and the parts are to be added up
    group,
    item,
    N,
    C,
    P,
    H,
    S,  # parts of a plane, of CHUNK pixels; computed in the kernel it takes a register throughout, which may spill
    CHUNK,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    ALL: tl.constexpr,
    ACC: tl.constexpr,
    JOINED: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """pool_k[c] and fc1[:, c] @ pool_k[c] of a work item. Reads its part of x once (twice with lse)."""
    FIRST: tl.constexpr = ALL * (AVG + MAX)  # pools that are stored before lp and lse
    TOP: tl.constexpr = MAX or LSE
    Q: tl.constexpr = AVG + TOP + LP + LSE
    BLOCK_S: tl.constexpr = max(1024 // BLOCK_C, 2)
    J = tl.cdiv(C, BLOCK_C)
    i_j = item // S
    i_s = item % S
    c = i_j * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = i_s * CHUNK
    end = tl.minimum(begin + CHUNK, P)
    if JOINED and slots_ptr is None:
        end = tl.where(phase == JOIN, begin, end)
    i_n = tl.cast(group, tl.int64)
    # Lane by lane along the plane; lanes meet once, at the end.
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_square = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_max = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
    b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + begin + tl.arange(0, BLOCK_P)[None, :]
    for p in tl.range(begin, end, BLOCK_P, num_stages=STAGES):
        o_p = p + tl.arange(0, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if AVG:
            b_sum += b_x
        if LP:
            b_square += b_x * b_x
        if TOP:
            b_max, b_arg = running_max(b_max, b_arg, b_x + nowhere(o_p < P, ACC)[None, :], o_p[None, :])
    b_avg = tl.zeros([BLOCK_C], ACC)
    b_top = tl.full([BLOCK_C], float("-inf"), ACC)
    b_first = tl.zeros([BLOCK_C], tl.int32)
    b_lp = tl.zeros([BLOCK_C], ACC)
    b_exp = tl.zeros([BLOCK_C], ACC)
    if AVG:
        b_avg = tl.sum(b_sum, axis=1)
    if TOP:
        b_top, b_first = first_max(b_max, b_arg, 1)
    if LP:
        b_lp = tl.sum(b_square, axis=1)
    if LSE:
        b_exp = _sum_exp(x_ptr, i_n, c, begin, end, C, P, _top_shift(b_top), ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)

    last = True
    if JOINED:
        p_stats = stats_ptr + (i_n * S + i_s) * Q * C + o_c
        p_arg = i_n * S * C + o_c
        if slots_ptr is None:
            last = phase == JOIN
            m_own = o_c < tl.where(phase == PARTS, C, 0)
        else:
            last = i_s == S - 1
            m_own = m_c
        if AVG:
            tl.store(p_stats, b_avg, mask=m_own)
        if TOP:
            tl.store(p_stats + AVG * C, b_top, mask=m_own)
        if MAX:
            tl.store(arg_ptr + p_arg + i_s * C, b_first, mask=m_own)
        if LP:
            tl.store(p_stats + (AVG + TOP) * C, b_lp, mask=m_own)
        if LSE:
            tl.store(p_stats + (AVG + TOP + LP) * C, b_exp, mask=m_own)
        if last:
            p_stats = stats_ptr + i_n * S * Q * C + o_c
            b_avg = tl.zeros([BLOCK_C], ACC)
            b_top = tl.full([BLOCK_C], float("-inf"), ACC)
            b_first = tl.zeros([BLOCK_C], tl.int32)
            b_lp = tl.zeros([BLOCK_C], ACC)
            b_exp = tl.zeros([BLOCK_C], ACC)
            parts = S
            if slots_ptr is not None:
                parts = tl.where(wait(slots_ptr + i_j * S, S - 1, given_up_ptr, stamp), 0, S)
            # A tile of parts at a time: one after another they would be a chain of round trips to L2.
            for s in range(0, parts, BLOCK_S):
                o_s = s + tl.arange(0, BLOCK_S)[None, :]
                m_s = m_c[:, None] & (o_s < S)
                p_s = p_stats[:, None] + o_s * Q * C
                if AVG:
                    b_avg += tl.sum(tl.load(p_s, mask=m_s, other=0, cache_modifier=".cg"), axis=1)
                if TOP:
                    b_tops = tl.load(p_s + AVG * C, mask=m_s, other=float("-inf"), cache_modifier=".cg")
                    b_args = tl.zeros([BLOCK_C, BLOCK_S], tl.int32)
                    if MAX:
                        p_i = arg_ptr + p_arg[:, None] + o_s * C
                        b_args = tl.load(p_i, mask=m_s, other=0, cache_modifier=".cg")
                    b_s, b_i = first_max(b_tops, b_args, 1)
                    # The first of -inf only is a maximum as well.
                    b_first = tl.where(s == 0, b_i, b_first)
                    b_top, b_first = running_max(b_top, b_first, b_s, b_i)
                if LP:
                    b_lps = tl.load(p_s + (AVG + TOP) * C, mask=m_s, other=0, cache_modifier=".cg")
                    b_lp += tl.sum(b_lps, axis=1)
            if LSE:
                shift = _top_shift(b_top)
                for s in range(0, parts, BLOCK_S):
                    o_s = s + tl.arange(0, BLOCK_S)[None, :]
                    m_s = m_c[:, None] & (o_s < S)
                    p_s = p_stats[:, None] + o_s * Q * C
                    b_tops = tl.load(p_s + AVG * C, mask=m_s, other=0, cache_modifier=".cg")
                    b_exps = tl.load(p_s + (AVG + TOP + LP) * C, mask=m_s, other=0, cache_modifier=".cg")
                    # 0 of a part that is all -inf, whose factor may be infinite.
                    b_scaled = b_exps * tl.exp(_top_shift(b_tops) - shift[:, None])
                    b_exp += tl.sum(tl.where(b_exps == 0, 0.0, b_scaled), axis=1)
            b_avg = unless(parts == 0, b_avg)
            b_top = unless(parts == 0, b_top)
            b_lp = unless(parts == 0, b_lp)

    if last:
        b_none = tl.zeros([1, BLOCK_C], ACC)
        b_avg_row = _pool_done(b_none, 0, b_avg / P, pool_ptr, i_n, o_c, 0, C, ALL and AVG, FIRST + LP + LSE)
        if MAX and argmax_ptr is not None:
            tl.store(argmax_ptr + i_n * C + o_c, b_first, mask=m_c)
        b_max_row = _pool_done(b_none, 0, b_top, pool_ptr, i_n, o_c, AVG, C, ALL and MAX, FIRST + LP + LSE)
        b_lp_row = _pool_done(b_none, 0, tl.sqrt(b_lp), pool_ptr, i_n, o_c, FIRST, C, LP, FIRST + LP + LSE)
        b_lse = b_exp
        if LSE:
            b_lse = tl.log(b_exp) + _top_shift(b_top)
        b_lse_row = _pool_done(b_none, 0, b_lse, pool_ptr, i_n, o_c, FIRST + LP, C, LSE, FIRST + LP + LSE)
        if w1_ptr is not None:
            if JOINED:
                _fc1(b_avg_row, b_max_row, b_lp_row, b_lse_row, w1_ptr, part_ptr, group, i_j, o_c, N, C, H, J,
                     AVG, MAX, LP, LSE, 1, BLOCK_H)  # fmt: skip
            else:  # fc1 of an average is the sum of that of its parts, which need not meet first
                _fc1(b_avg_row, b_max_row, b_lp_row, b_lse_row, w1_ptr, part_ptr, group, item, o_c, N, C, H, J * S,
                     AVG, MAX, LP, LSE, 1, BLOCK_H)  # fmt: skip


@triton.jit
def _pool_done(b_rows, row, b_pool, pool_ptr, i_n, o_c, k, C, STORED: tl.constexpr, L: tl.constexpr):
    """Stores a pool of a sample, the k-th of L, if it is STORED, and puts it among those of the other samples."""
    if pool_ptr is not None and STORED:
        tl.store(pool_ptr + (i_n * L + k) * C + o_c, b_pool, mask=o_c < C)
    return put_row(b_rows, row, tl.where(o_c < C, b_pool, 0.0))


@triton.jit
def squeeze(
    x_ptr, w1_ptr, stats_ptr, arg_ptr, pool_ptr, argmax_ptr, part_ptr, slots_ptr, given_up_ptr, stamp, phase, group,
    item, N, C, P, H, S, CHUNK, AVG: tl.constexpr, MAX: tl.constexpr, LP: tl.constexpr, LSE: tl.constexpr,
    JOINED: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The pools of a work item, and its partial sums of fc1."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    if SAMPLES == 1:
        squeeze_sample(
            x_ptr, w1_ptr, stats_ptr, arg_ptr, pool_ptr, argmax_ptr, part_ptr, slots_ptr, given_up_ptr, stamp, phase,
            group, item, N, C, P, H, S, CHUNK, AVG, MAX, LP, LSE, False, ACC, JOINED, STAGES, CHANNELS_LAST, BLOCK_C,
            BLOCK_P, BLOCK_H,
        )  # fmt: skip
    else:
        squeeze_samples(
            x_ptr, w1_ptr, pool_ptr, argmax_ptr, part_ptr, group, item, N, C, P, H, AVG, MAX, LP, LSE, ACC, SAMPLES,
            STAGES, CHANNELS_LAST, BLOCK_C, BLOCK_P, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _fc1(
    b_avg, b_max, b_lp, b_lse, w1_ptr, part_ptr, group, i_j, o_c, N, C, H, J, AVG: tl.constexpr, MAX: tl.constexpr,
    LP: tl.constexpr, LSE: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = AVG + MAX + LP + LSE
    o_n = group * SAMPLES + tl.arange(0, SAMPLES)
    m_n = o_n < N
    p_part = part_ptr + (o_n.to(tl.int64)[:, None] * J + i_j) * K * H
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        m = m_n[:, None] & (o_h < H)[None, :]
        b_w = load_weight(w1_ptr, o_h, o_c, H, C, b_avg.dtype)
        pointers = p_part + o_h[None, :]
        if AVG:
            tl.store(pointers, product(b_avg, b_w), mask=m)
        if MAX:
            tl.store(pointers + AVG * H, product(b_max, b_w), mask=m)
        if LP:
            tl.store(pointers + (AVG + MAX) * H, product(b_lp, b_w), mask=m)
        if LSE:
            tl.store(pointers + (AVG + MAX + LP) * H, product(b_lse, b_w), mask=m)


@triton.jit
def sum_parts(part_ptr, i_n, o_e, m, J, SIZE, ACC: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_E] sums over J partial sums, in a fixed order: of element o_e of SIZE of sample i_n."""
    ROWS: tl.constexpr = 1024 // BLOCK_E  # the pointers of more spill in 4 warps with Triton 3.6
    b_sum = tl.zeros([BLOCK_E], ACC)
    for j in range(0, J, ROWS):
        o_j = j + tl.arange(0, ROWS)
        pointers = part_ptr + (i_n[None, :] * J + o_j[:, None]) * SIZE + o_e[None, :]
        b_part = tl.load(pointers, mask=(o_j < J)[:, None] & m[None, :], other=0, cache_modifier=".cg")
        b_sum += tl.sum(b_part, axis=0)
    return b_sum


@triton.jit
def hidden_elements(group, item, N, SIZE, SAMPLES: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sample, element of SIZE, and validity of BLOCK_E elements of a group of samples."""
    o_e = item * BLOCK_E + tl.arange(0, BLOCK_E)
    i_n = (group * SAMPLES + o_e // SIZE).to(tl.int64)
    return i_n, o_e % SIZE, (o_e < SAMPLES * SIZE) & (i_n < N)


@triton.jit
def hidden_layer(
    part_ptr,  # (N, J, K, H)
    b1_ptr,  # (H,) or None
    pre_ptr,  # (N, K, H), written
    given_up,
    group,
    item,
    N,
    H,
    J,
    K: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """pre = fc1 of the pools, BLOCK_E of its elements in a group of samples; NaN where the pools were given up."""
    i_n, o_e, m = hidden_elements(group, item, N, K * H, SAMPLES, BLOCK_E)
    b_pre = sum_parts(part_ptr, i_n, o_e, m, J, K * H, part_ptr.dtype.element_ty, BLOCK_E)
    if b1_ptr is not None:
        b_pre += tl.load(b1_ptr + o_e % H, mask=m, other=0).to(b_pre.dtype)
    tl.store(pre_ptr + i_n * K * H + o_e, unless(given_up, b_pre), mask=m)


@triton.jit
def excite(
    pre_ptr,  # (N, K, H)
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    gate_ptr,  # (N, C), written, or None
    given_up,
    group,
    c,
    N,
    C,
    H,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[SAMPLES, BLOCK_C] gates of the channels from c on of a group of samples; NaN where ``pre`` was given up."""
    ACC: tl.constexpr = pre_ptr.dtype.element_ty
    o_c = c + tl.arange(0, BLOCK_C)
    o_n = (group * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
    m_n = o_n < N
    b_logit = tl.zeros([SAMPLES, BLOCK_C], ACC)
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        m = m_n & (o_h < H)[None, :]
        b_hidden = tl.zeros([SAMPLES, BLOCK_H], ACC)
        for k in tl.static_range(K):
            b_pre = tl.load(pre_ptr + (o_n * K + k) * H + o_h[None, :], mask=m, other=0, cache_modifier=".cg")
            b_hidden += activate(b_pre, ACTIVATION)
        b_logit += product(b_hidden, load_weight(w2_ptr, o_c, o_h, C, H, ACC))
    if b2_ptr is not None:
        b_logit += K * tl.load(b2_ptr + o_c, mask=o_c < C, other=0).to(ACC)[None, :]
    b_gate = unless(given_up, gate_value(b_logit, GATE))
    if gate_ptr is not None:
        tl.store(gate_ptr + o_n * C + o_c[None, :], b_gate, mask=m_n & (o_c < C)[None, :])
    return b_gate


@triton.jit(do_not_specialize=["slots", "stamp", "phase", "N"], do_not_specialize_on_alignment=["S"])
def squeeze_kernel(
    x_ptr,  # (N, C, P)
    pool_ptr,  # (N, K, C), written
    argmax_ptr,  # (N, C), written if MAX
    scratch_ptr,  # arg and stats of forward_pointers, written, or None if planes are not divided
    slots,  # where they begin in scratch
    stamp,
    phase,
    N,
    C,
    P,
    S,  # parts of a plane, of CHUNK pixels
    CHUNK,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    SINGLE: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The pools alone."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = pool_ptr.dtype.element_ty
    DIVIDED: tl.constexpr = scratch_ptr is not None
    J = tl.cdiv(C, BLOCK_C)
    stats_ptr = None
    arg_ptr = None
    given_up_ptr = None
    p_slots = None
    if DIVIDED:
        _, stats_ptr, arg_ptr = forward_pointers(scratch_ptr, N, C, 0, J, S, 0, MAX)
    if SINGLE:
        group = tl.program_id(0) // (J * S)
        item = tl.program_id(0) % (J * S)
        if DIVIDED:
            given_up_ptr = slots_pointer(scratch_ptr, slots)
            p_slots = given_up_ptr + 1 + group * J * S
    else:
        _, group, item = phase_item(tl.program_id(0), phase, S, J * S, 0, 0, 0)
    squeeze_sample(
        x_ptr, None, stats_ptr, arg_ptr, pool_ptr, argmax_ptr, None, p_slots, given_up_ptr, stamp, phase,
        group, item, N, C, P, 1, S, CHUNK,
        AVG, MAX, LP, LSE, True, ACC, DIVIDED, STAGES, CHANNELS_LAST, BLOCK_C, BLOCK_P, 16,
    )  # fmt: skip
    if SINGLE and DIVIDED:
        mark(p_slots + item, stamp)


def pool_bits(pool_types: Sequence[str]) -> int:
    return sum(1 << POOLS.index(pool) for pool in pool_types)


@functools.cache
def pool_flags(pools: int) -> dict[str, int]:
    """The kernels' constexpr 0 or 1 of each pool."""
    return {name.upper(): pools >> i & 1 for i, name in enumerate(POOLS)}


def pool_count(pools: int) -> int:
    return pools.bit_count()


def kept_count(pools: int) -> int:
    """L: the pools that are saved."""
    return (pools >> 2).bit_count()


def stats_count(pools: int) -> int:
    """Q: logsumexp needs the maximum, too."""
    return pool_count(pools) + ((pools & 10) == 8)


def pool(x: Tensor, pools: int) -> tuple[Tensor, Tensor]:
    """Launch the pools alone: ``pool`` (N, K, C) and ``argmax`` (N, C), empty without "max"."""
    n, c, h, w = x.shape
    plan = channel_plan(x, 0, tile_elements=config.TILE // 2)
    values = x.new_empty((n, pool_count(pools), c), dtype=accumulation_dtype(x))
    argmax = empty_argmax(x, pools)
    scratch = slots = None
    if plan.splits > 1:
        slot_count = 1 + n * plan.items if plan.single_launch else 0
        scratch, slots = empty_scratch(x, scratch_size(x, 0, pools, plan), slot_count)
    stamp = new_stamp()
    for phase, programs in launches(plan.single_launch, n * plan.items, n * plan.joins):
        squeeze_kernel[(programs,)](
            x,
            values,
            argmax,
            scratch,
            slots,
            stamp,
            phase,
            n,
            c,
            h * w,
            plan.splits,
            plan.chunk,
            **pool_flags(pools),
            SINGLE=plan.single_launch,
            STAGES=plan.stages,
            **tile_options(x, plan.tile),
        )
    return values, argmax


def scratch_size(x: Tensor, hidden: int, pools: int, plan: config.ChannelPlan) -> int:
    """Elements of ``part`` (N, J, K, H) and, where planes are joined, ``arg`` (N, S, C) and ``stats`` (N, S, Q, C)."""
    n, c, _, _ = x.shape
    joined = is_joined(hidden, pools, plan)
    stats = plan.splits * (stats_count(pools) + (pools >> 1 & 1)) * c if joined else 0
    return n * ((plan.blocks if joined else plan.items) * pool_count(pools) * hidden + stats)


def is_joined(hidden: int, pools: int, plan: config.ChannelPlan) -> bool:
    """Whether the parts of a plane are added up before fc1, as all but those of an average have to be."""
    return plan.splits > 1 and not (hidden and pools == AVERAGE)


def empty_saved(x: Tensor, hidden: int, pools: int) -> tuple[Tensor, Tensor]:
    """What the gate saves for backward, empty: ``pre`` (N, K, H) and lp and lse (N, L, C) in one; ``argmax``."""
    n, c, _, _ = x.shape
    size = n * (pool_count(pools) * hidden + kept_count(pools) * c)
    return torch.empty(size, dtype=accumulation_dtype(x), device=x.device), empty_argmax(x, pools)


def empty_argmax(x: Tensor, pools: int) -> Tensor:
    """(N, C) pixels, or nothing without "max"."""
    n, c, h, w = x.shape
    return torch.empty((n, c) if pools & 2 else 0, dtype=index_dtype(h * w), device=x.device)


def index_dtype(count: int) -> torch.dtype:
    """The smallest dtype of an index below ``count``."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def empty_dweights(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dw1, db1, dw2, db2``, empty."""
    return torch.empty_like(w1), w1.new_empty(w1.shape[0]), torch.empty_like(w2), w2.new_empty(w2.shape[0])
