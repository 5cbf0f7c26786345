"""Squeeze and excitation of channels: the part that SE and CBAM's channel gate share, forward.

A gate ``g[n, c] = gate(sum over pools k of fc2(act(fc1(pool_k(x)))))`` in two kinds of work items, neither of which
walks all the weights of a layer: those that pool x also multiply the channels that they own by their columns of fc1
(partial sums over channels, ``part``), and those that use the gate add the partial sums up and multiply by their rows
of fc2.

An item owns a block of channels, some samples one after another, and of large planes a part. What the parts of a plane
leave (``stats``) is added up, in order, by whichever of their programs comes last.

Shapes: x (N, C, P) in either layout; pool (N, K, C); part (N, J, K, H) of J blocks of channels; stats (N, S, Q, C) of S
parts of a plane; pre (N, K, H); gate (N, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops._config import ChannelPlan
from attn_kernels.ops._device import activate, aligned, gate_value, load_tile
from attn_kernels.ops._launch import channel_plan, tile_options
from attn_kernels.ops._tickets import counters, is_last_of, split_counter
from reference._common import accumulation_dtype

# A set of pools is an integer of these bits; the k-th pool is the k-th bit that is set.
POOLS = ("avg", "max", "lp", "lse")


@triton.jit
def running_max(b_max, b_arg, b_x, o_x):
    """Lane by lane: only a greater value, or the first NaN, takes the place of an earlier one."""
    better = (b_x > b_max) | ((b_x != b_x) & (b_max == b_max))
    return tl.where(better, b_x, b_max), tl.where(better, o_x, b_arg)


@triton.jit
def first_max(b_max, b_arg, AXIS: tl.constexpr):
    """The maximum of lanes along an axis and its lowest index; NaN, the first one, counts as the greatest."""
    nan = b_max != b_max
    first_nan = tl.min(tl.where(nan, b_arg, 0x7FFFFFFF), axis=AXIS)
    b_top = tl.max(tl.where(nan, float("-inf"), b_max), axis=AXIS)
    first = tl.min(tl.where(b_max == tl.expand_dims(b_top, AXIS), b_arg, 0x7FFFFFFF), axis=AXIS)
    has_nan = first_nan != 0x7FFFFFFF
    return tl.where(has_nan, float("nan"), b_top), tl.where(has_nan, first_nan, first)


@triton.jit
def load_w1(w1_ptr, o_h, o_c, C, H, ACC: tl.constexpr):
    """[BLOCK_H, BLOCK_C] of fc1's weights (H, C)."""
    p_w1 = w1_ptr + o_h[:, None].to(tl.int64) * C + o_c[None, :]
    return tl.load(p_w1, mask=(o_h < H)[:, None] & (o_c < C)[None, :], other=0).to(ACC)


@triton.jit
def load_w2(w2_ptr, o_c, o_h, C, H, ACC: tl.constexpr):
    """[BLOCK_C, BLOCK_H] of fc2's weights (C, H)."""
    p_w2 = w2_ptr + o_c[:, None].to(tl.int64) * H + o_h[None, :]
    return tl.load(p_w2, mask=(o_c < C)[:, None] & (o_h < H)[None, :], other=0).to(ACC)


@triton.jit
def _top_shift(b_top):
    """What logsumexp subtracts."""
    return tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)


@triton.jit
def squeeze(
    x_ptr,  # (N, C, P)
    w1_ptr,  # (H, C), or None to pool only
    stats_ptr,  # (N, S, Q, C), written, or None if S = 1: sum, maximum, sum of squares, sum of exponentials
    arg_ptr,  # (N, S, C), written, or None if S = 1 or there is no maximum
    pool_ptr,  # (N, K, C), written
    argmax_ptr,  # (N, C), written if there is a maximum
    part_ptr,  # (N, J, K, H), written, or None
    counters_ptr,
    groups,
    group,
    item,
    N,
    C,
    P,
    H,
    CHUNK,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """pool_k[c] and fc1[:, c] @ pool_k[c] of a work item. Reads its part of x once (twice with lse)."""
    ACC: tl.constexpr = pool_ptr.dtype.element_ty
    K: tl.constexpr = AVG + MAX + LP + LSE
    TOP: tl.constexpr = MAX or LSE
    Q: tl.constexpr = AVG + TOP + LP + LSE
    J = tl.cdiv(C, BLOCK_C)
    S = tl.cdiv(P, CHUNK)
    i_j = item // S
    i_s = item % S
    c = i_j * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = i_s * CHUNK
    end = tl.minimum(begin + CHUNK, P)
    # With several samples the weights stay: the plan has seen to it that BLOCK_H holds all hidden units.
    b_w1 = None
    if w1_ptr is not None and SAMPLES > 1:
        b_w1 = load_w1(w1_ptr, tl.arange(0, BLOCK_H), o_c, C, H, ACC)
    for i in range(group * SAMPLES, tl.minimum(group * SAMPLES + SAMPLES, N)):
        i_n = tl.cast(i, tl.int64)
        # Lane by lane along the plane; lanes meet once, at the end.
        b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        b_square = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        b_max = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
        b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + begin + tl.arange(0, BLOCK_P)[None, :]
        for p in range(begin, end, BLOCK_P):
            o_p = p + tl.arange(0, BLOCK_P)
            b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            if AVG:
                b_sum += b_x
            if LP:
                b_square += b_x * b_x
            if TOP:
                b_x = tl.where((o_p < P)[None, :], b_x, float("-inf"))
                b_max, b_arg = running_max(b_max, b_arg, b_x, o_p[None, :])
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
            shift = _top_shift(b_top)
            b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
            for p in range(begin, end, BLOCK_P):
                o_p = p + tl.arange(0, BLOCK_P)
                b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                b_sum += tl.where((o_p < P)[None, :], tl.exp(b_x - shift[:, None]), 0.0)
            b_exp = tl.sum(b_sum, axis=1)

        last = True
        if stats_ptr is not None:
            p_stats = stats_ptr + (i_n * S + i_s) * Q * C + o_c
            p_arg = i_n * S * C + o_c
            if AVG:
                tl.store(p_stats, b_avg, mask=m_c)
            if TOP:
                tl.store(p_stats + AVG * C, b_top, mask=m_c)
            if MAX:
                tl.store(arg_ptr + p_arg + i_s * C, b_first, mask=m_c)
            if LP:
                tl.store(p_stats + (AVG + TOP) * C, b_lp, mask=m_c)
            if LSE:
                tl.store(p_stats + (AVG + TOP + LP) * C, b_exp, mask=m_c)
            last = is_last_of(split_counter(counters_ptr, groups, i_n * J + i_j), S)
            if last:
                p_stats = stats_ptr + i_n * S * Q * C + o_c
                b_avg = tl.zeros([BLOCK_C], ACC)
                b_top = tl.full([BLOCK_C], float("-inf"), ACC)
                b_first = tl.zeros([BLOCK_C], tl.int32)
                b_lp = tl.zeros([BLOCK_C], ACC)
                b_exp = tl.zeros([BLOCK_C], ACC)
                for s in range(0, S):
                    p_s = p_stats + s * Q * C
                    if AVG:
                        b_avg += tl.load(p_s, mask=m_c, other=0, cache_modifier=".cg")
                    if TOP:
                        b_s = tl.load(p_s + AVG * C, mask=m_c, other=0, cache_modifier=".cg")
                        b_i = b_first
                        if MAX:
                            b_i = tl.load(arg_ptr + p_arg + s * C, mask=m_c, other=0, cache_modifier=".cg")
                        # The first of -inf only is a maximum as well.
                        b_first = tl.where(s == 0, b_i, b_first)
                        b_top, b_first = running_max(b_top, b_first, b_s, b_i)
                    if LP:
                        b_lp += tl.load(p_s + (AVG + TOP) * C, mask=m_c, other=0, cache_modifier=".cg")
                if LSE:
                    shift = _top_shift(b_top)
                    for s in range(0, S):
                        p_s = p_stats + s * Q * C
                        b_s = tl.load(p_s + AVG * C, mask=m_c, other=0, cache_modifier=".cg")
                        b_e = tl.load(p_s + (AVG + TOP + LP) * C, mask=m_c, other=1, cache_modifier=".cg")
                        b_exp += b_e * tl.exp(_top_shift(b_s) - shift)

        if last:
            p_pool = pool_ptr + i_n * K * C + o_c
            p_part = part_ptr
            if part_ptr is not None:
                p_part = part_ptr + (i_n * J + i_j) * K * H
            if AVG:
                _pool_done(b_avg / P, p_pool, p_part, w1_ptr, b_w1, o_c, m_c, 0, C, H, BLOCK_H)
            if MAX:
                tl.store(argmax_ptr + i_n * C + o_c, b_first, mask=m_c)
                _pool_done(b_top, p_pool, p_part, w1_ptr, b_w1, o_c, m_c, AVG, C, H, BLOCK_H)
            if LP:
                _pool_done(tl.sqrt(b_lp), p_pool, p_part, w1_ptr, b_w1, o_c, m_c, AVG + MAX, C, H, BLOCK_H)
            if LSE:
                b_lse = tl.log(b_exp) + _top_shift(b_top)
                _pool_done(b_lse, p_pool, p_part, w1_ptr, b_w1, o_c, m_c, AVG + MAX + LP, C, H, BLOCK_H)


@triton.jit
def _pool_done(b_pool, p_pool, p_part, w1_ptr, b_w1, o_c, m_c, k, C, H, BLOCK_H: tl.constexpr):
    tl.store(p_pool + k * C, b_pool, mask=m_c)
    if w1_ptr is not None:
        b_pool = tl.where(m_c, b_pool, 0.0)
        if b_w1 is not None:
            o_h = tl.arange(0, BLOCK_H)
            tl.store(p_part + k * H + o_h, tl.sum(b_w1 * b_pool[None, :], axis=1), mask=o_h < H)
        else:
            for h in range(0, H, BLOCK_H):
                o_h = h + tl.arange(0, BLOCK_H)
                b_w = load_w1(w1_ptr, o_h, o_c, C, H, b_pool.dtype)
                tl.store(p_part + k * H + o_h, tl.sum(b_w * b_pool[None, :], axis=1), mask=o_h < H)


@triton.jit
def sum_parts(p_part, o_h, m_h, J, STRIDE, ACC: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_H] sum of J rows that lie STRIDE apart, in a fixed order."""
    b_sum = tl.zeros([BLOCK_H], ACC)
    for j in range(0, J, 16):
        o_j = j + tl.arange(0, 16)
        pointers = p_part + o_j[:, None].to(tl.int64) * STRIDE + o_h[None, :]
        b_part = tl.load(pointers, mask=(o_j < J)[:, None] & m_h[None, :], other=0, cache_modifier=".cg")
        b_sum += tl.sum(b_part, axis=0)
    return b_sum


@triton.jit
def excite(
    part_ptr,  # (N, J, K, H)
    b1_ptr,  # (H,) or None
    w2_ptr,  # (C, H)
    b_w2,  # [BLOCK_C, BLOCK_H], all of its rows' weights, or None
    b2_ptr,  # (C,) or None
    pre_ptr,  # (N, K, H), written if ``store_pre``, or None
    gate_ptr,  # (N, C), written if ``store_gate``, or None
    i_n,
    c,
    store_pre,
    store_gate,
    C,
    H,
    J,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[BLOCK_C] gates of the channels from c on of sample i_n."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_logit = tl.zeros([BLOCK_C], ACC)
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        m_h = o_h < H
        b_hidden = tl.zeros([BLOCK_H], ACC)
        for k in tl.static_range(K):
            b_pre = sum_parts(part_ptr + (i_n * J * K + k) * H, o_h, m_h, J, K * H, ACC, BLOCK_H)
            if b1_ptr is not None:
                b_pre += tl.load(b1_ptr + o_h, mask=m_h, other=0).to(ACC)
            if pre_ptr is not None:
                tl.store(pre_ptr + (i_n * K + k) * H + o_h, b_pre, mask=m_h & store_pre)
            b_hidden += activate(b_pre, ACTIVATION)
        if b_w2 is None:
            b_logit += tl.sum(load_w2(w2_ptr, o_c, o_h, C, H, ACC) * b_hidden[None, :], axis=1)
        else:
            b_logit += tl.sum(b_w2 * b_hidden[None, :], axis=1)
    if b2_ptr is not None:
        b_logit += K * tl.load(b2_ptr + o_c, mask=m_c, other=0).to(ACC)
    b_gate = gate_value(b_logit, GATE)
    if gate_ptr is not None:
        tl.store(gate_ptr + i_n * C + o_c, b_gate, mask=m_c & store_gate)
    return b_gate


@triton.jit(do_not_specialize=["groups"])
def squeeze_kernel(
    x_ptr,  # (N, C, P)
    stats_ptr,  # (N, S, Q, C), written, or None if S = 1
    arg_ptr,  # (N, S, C), written, or None
    pool_ptr,  # (N, K, C), written
    argmax_ptr,  # (N, C), written if MAX
    counters_ptr,
    groups,
    C,
    P,
    CHUNK,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The pools alone."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    items = tl.cdiv(C, BLOCK_C) * tl.cdiv(P, CHUNK)
    pid = tl.program_id(0)
    squeeze(
        x_ptr, None, stats_ptr, arg_ptr, pool_ptr, argmax_ptr, None, counters_ptr,
        groups, pid // items, pid % items, groups, C, P, 1, CHUNK,
        AVG, MAX, LP, LSE, 1, CHANNELS_LAST, BLOCK_C, BLOCK_P, 16,
    )  # fmt: skip


def pool_bits(pool_types: Sequence[str]) -> int:
    return sum(1 << POOLS.index(pool) for pool in pool_types)


def pool_flags(pools: int) -> dict[str, int]:
    """The kernels' constexpr 0 or 1 of each pool."""
    return {name.upper(): pools >> i & 1 for i, name in enumerate(POOLS)}


def pool_count(pools: int) -> int:
    return pools.bit_count()


def empty_stats(x: Tensor, plan: ChannelPlan, pools: int) -> tuple[Tensor | None, Tensor | None]:
    """``stats, arg``: what the parts of divided planes leave; None where planes are whole."""
    if plan.splits == 1:
        return None, None
    n, c, _, _ = x.shape
    extra = (pools & 10) == 8  # logsumexp needs the maximum, too
    stats = x.new_empty((n, plan.splits, pool_count(pools) + extra, c), dtype=accumulation_dtype(x))
    return stats, x.new_empty((n, plan.splits, c), dtype=torch.int32) if pools & 2 else None


def pool(x: Tensor, pools: int) -> tuple[Tensor, Tensor]:
    """Launch the pools alone: ``pool`` (N, K, C) and ``argmax`` (N, C), empty without "max"."""
    n, c, h, w = x.shape
    plan = channel_plan(x, 0)
    values = x.new_empty((n, pool_count(pools), c), dtype=accumulation_dtype(x))
    argmax = x.new_empty((n, c) if pools & 2 else 0, dtype=torch.int32)
    squeeze_kernel[(n * plan.items,)](
        x,
        *empty_stats(x, plan, pools),
        values,
        argmax,
        counters(x, plan) if plan.splits > 1 else None,
        n,
        c,
        h * w,
        plan.chunk,
        **pool_flags(pools),
        **tile_options(x, plan.tile),
    )
    return values, argmax


def empty_saved(x: Tensor, w1: Tensor, pools: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the gate saves, empty: ``pool, argmax, pre, gate``."""
    n, c, _, _ = x.shape
    k = pool_count(pools)
    pool = x.new_empty((n, k, c), dtype=accumulation_dtype(x))
    argmax = x.new_empty((n, c) if pools & 2 else 0, dtype=torch.int32)
    return pool, argmax, pool.new_empty((n, k, w1.shape[0])), pool.new_empty((n, c))


def empty_dweights(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dw1, db1, dw2, db2``, empty."""
    return torch.empty_like(w1), w1.new_empty(w1.shape[0]), torch.empty_like(w2), w2.new_empty(w2.shape[0])
