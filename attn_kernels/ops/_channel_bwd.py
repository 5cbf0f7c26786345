"""Squeeze and excitation of channels, backward: the part that SE and CBAM's channel gate share.

Two phases of one launch (see _phases.py). The first reads dy and x: the gradient of the gate, the pools again, and
partial sums of fc2's transposed product (``dpart``) over channels and parts of planes. Items between the two add those
up and go back to the hidden layer. The second goes through fc1 to the pools, reads dy again and writes dx. Items behind
all others compute the weights' gradients from what the first phases have left. Of divided planes the items of the last
parts add that up; only the weights' items wait for it.

Shapes as in _channel.py; dlogit (N, C); dpart (N, J * S, H); dpre (N, K, H). The pools are in two places: average and
maximum, computed here, in scratch, lp and lse in what forward saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._channel import (
    AVERAGE,
    empty_dweights,
    excite,
    get_row,
    hidden_elements,
    kept_count,
    load_weight,
    pool_count,
    pool_flags,
    pool_pointer,
    product,
    put_row,
    sum_parts,
)
from attn_kernels.ops._device import (
    activate,
    activate_bwd,
    aligned,
    gate_bwd,
    load_elements,
    load_tail_grad,
    load_tile,
    store_tile,
)
from attn_kernels.ops._launch import channel_plan, tile_options
from attn_kernels.ops._phases import (
    JOIN,
    WEIGHTS,
    empty_scratch,
    launches,
    mark,
    new_stamp,
    phase_item,
    slots_pointer,
    unless,
    wait,
    work_item,
)


@triton.jit
def _channel_grad(b_dy, spatial_ptr, argmax_ptr, i_n, o_c, o_p, P, ACC: tl.constexpr):
    """The gradient of the channel-gated x: dy itself, or behind a spatial gate dy * gate plus that gate's pools."""
    if spatial_ptr is not None:
        m_p = o_p < P
        p_map = spatial_ptr + i_n * 3 * P + o_p
        b_gate = tl.load(p_map, mask=m_p, other=0)
        b_dmax = tl.load(p_map + P, mask=m_p, other=0)
        b_dmean = tl.load(p_map + 2 * P, mask=m_p, other=0)
        b_argmax = tl.load(argmax_ptr + i_n * P + o_p, mask=m_p, other=0).to(tl.int32)
        b_dpools = tl.where(o_c[:, None] == b_argmax[None, :], (b_dmax + b_dmean)[None, :], b_dmean[None, :])
        b_dy = b_dy * b_gate[None, :] + b_dpools
    return b_dy


@triton.jit
def scratch_pointers(scratch_ptr, N, C, H, AVG: tl.constexpr, MAX: tl.constexpr, K: tl.constexpr):
    """Where ``dlogit``, ``dpre``, ``pool`` and ``dpart`` are, behind ``gate``."""
    n = tl.cast(N, tl.int64)
    dlogit_ptr = scratch_ptr + n * C
    dpre_ptr = dlogit_ptr + n * C
    pool_ptr = dpre_ptr + n * K * H
    return dlogit_ptr, dpre_ptr, pool_ptr, pool_ptr + n * (AVG + MAX) * C


@triton.jit
def _sum_planes(
    dy_ptr, mask_ptr, x_ptr, spatial_ptr, spatial_argmax_ptr, i_n, c, begin, end, C, P, AVG: tl.constexpr,
    ACC: tl.constexpr, EVICT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sum_p dy * x and sum_p x of a part of a sample."""
    o_c = c + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_avg = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p in range(begin, end, BLOCK_P):
        b_dy = load_tail_grad(dy_ptr, mask_ptr, None, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P, EVICT)
        o_p = p + tl.arange(0, BLOCK_P)
        b_sum += _channel_grad(b_dy, spatial_ptr, spatial_argmax_ptr, i_n, o_c, o_p, P, ACC) * b_x
        if AVG:
            b_avg += b_x
    return tl.sum(b_sum, axis=1), tl.sum(b_avg, axis=1)


@triton.jit
def _sum_samples(
    dy_ptr, mask_ptr, x_ptr, spatial_ptr, spatial_argmax_ptr, group, c, N, C, P, AVG: tl.constexpr,
    ACC: tl.constexpr, SAMPLES: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """[SAMPLES, BLOCK_C] sums of dy * x and of x over the planes of several samples, a tile each."""
    o_c = c + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    b_sums = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_avgs = tl.zeros([SAMPLES, BLOCK_C], ACC)
    for row in tl.range(0, tl.minimum(SAMPLES, N - group * SAMPLES), num_stages=STAGES):
        i_n = tl.cast(group * SAMPLES + row, tl.int64)
        b_dy = load_tail_grad(dy_ptr, mask_ptr, None, i_n, c, 0, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, c, 0, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P, EVICT)
        b_dy = _channel_grad(b_dy, spatial_ptr, spatial_argmax_ptr, i_n, o_c, o_p, P, ACC)
        b_sums = put_row(b_sums, row, tl.sum(b_dy * b_x, axis=1))
        if AVG:
            b_avgs = put_row(b_avgs, row, tl.sum(b_x, axis=1))
    return b_sums, b_avgs


@triton.jit
def _store_pools(
    pool_ptr, argmax_ptr, x_ptr, b_sums, group, o_c, N, C, P, AVG: tl.constexpr, MAX: tl.constexpr,
    ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The averages and the maxima of x, of a group of samples, from [SAMPLES, BLOCK_C] sums."""
    o_n = (group * b_sums.shape[0] + tl.arange(0, b_sums.shape[0])).to(tl.int64)[:, None]
    o_c = o_c[None, :]
    m = (o_n < N) & (o_c < C)
    p_pool = pool_ptr + o_n * (AVG + MAX) * C + o_c
    if AVG:
        tl.store(p_pool, b_sums / P, mask=m)
    if MAX:
        b_argmax = tl.load(argmax_ptr + o_n * C + o_c, mask=m, other=0).to(tl.int32)
        tl.store(p_pool + AVG * C, load_elements(x_ptr, o_n, o_c, b_argmax, m, C, P, ACC, CHANNELS_LAST), mask=m)


@triton.jit
def _dgate(
    dy_ptr, mask_ptr, x_ptr, spatial_ptr, spatial_argmax_ptr, w2_ptr, b2_ptr, pre_ptr, argmax_ptr, gate_ptr,
    dlogit_ptr, pool_ptr, dpart_ptr, stats_ptr, group, item, N, C, P, H, S,
    CHUNK, AVG: tl.constexpr, MAX: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    DIVIDED: tl.constexpr, SAMPLES: tl.constexpr, PLANE_STAGES: tl.constexpr, EVICT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dlogit[c] = gate' * sum_p dy * x, fc2[c, :]^T @ dlogit[c] and the pools of a work item. Reads dy and x.

    All are sums over a plane. Those of its parts are partial sums, of ``dlogit`` and the average in ``stats``.
    """
    ACC: tl.constexpr = gate_ptr.dtype.element_ty
    i_s = item % S
    c = item // S * BLOCK_C
    begin = i_s * CHUNK
    end = tl.minimum(begin + CHUNK, P)
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if SAMPLES == 1:
        b_dgate, b_sum = _sum_planes(
            dy_ptr, mask_ptr, x_ptr, spatial_ptr, spatial_argmax_ptr, tl.cast(group, tl.int64), c, begin, end, C, P,
            AVG, ACC, EVICT, CHANNELS_LAST, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        b_dgates = tl.expand_dims(b_dgate, 0)
        b_sums = tl.expand_dims(b_sum, 0)
    else:
        b_dgates, b_sums = _sum_samples(
            dy_ptr, mask_ptr, x_ptr, spatial_ptr, spatial_argmax_ptr, group, c, N, C, P, AVG, ACC, SAMPLES, EVICT,
            PLANE_STAGES, CHANNELS_LAST, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    if not DIVIDED:
        _store_pools(pool_ptr, argmax_ptr, x_ptr, b_sums, group, o_c, N, C, P, AVG, MAX, ACC, CHANNELS_LAST)
    o_n = group * SAMPLES + tl.arange(0, SAMPLES)
    m_n = o_n < N
    p_gate = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
    m = m_n[:, None] & m_c[None, :]
    if spatial_ptr is None:
        b_gates = excite(
            pre_ptr, w2_ptr, b2_ptr, None, False, group, c, N, C, H, K, ACTIVATION, GATE, SAMPLES, BLOCK_C, BLOCK_H
        )
        if i_s == 0:
            tl.store(gate_ptr + p_gate, b_gates, mask=m)
    else:  # needed earlier, by the spatial gate's backward, and therefore there already
        b_gates = tl.load(gate_ptr + p_gate, mask=m, other=0)
    b_dlogits = tl.where(m, gate_bwd(b_dgates, b_gates, GATE), 0.0)
    if DIVIDED:
        p_stats = stats_ptr + (o_n.to(tl.int64)[:, None] * S + i_s) * (1 + AVG) * C + o_c[None, :]
        tl.store(p_stats, b_dlogits, mask=m)
        if AVG:
            tl.store(p_stats + C, b_sums, mask=m)
    else:
        tl.store(dlogit_ptr + p_gate, b_dlogits, mask=m)
    _fc2(
        b_dlogits, w2_ptr, dpart_ptr, group, item, o_c, N, C, H, tl.cdiv(C, BLOCK_C) * S, SAMPLES, BLOCK_H
    )  # fmt: skip


@triton.jit
def _join(
    x_ptr, argmax_ptr, dlogit_ptr, pool_ptr, stats_ptr, given_up, group, i_j, N, C, P, S, AVG: tl.constexpr,
    MAX: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dlogit`` and the pools of a divided plane, from what its parts have left: for the weights' gradients alone."""
    i_n = tl.cast(group, tl.int64)
    o_c = i_j * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_dlogit = tl.zeros([BLOCK_C], ACC)
    b_sum = tl.zeros([BLOCK_C], ACC)
    for s in range(0, S):
        p_stats = stats_ptr + (i_n * S + s) * (1 + AVG) * C + o_c
        b_dlogit += tl.load(p_stats, mask=m_c, other=0, cache_modifier=".cg")
        if AVG:
            b_sum += tl.load(p_stats + C, mask=m_c, other=0, cache_modifier=".cg")
    tl.store(dlogit_ptr + i_n * C + o_c, unless(given_up, b_dlogit), mask=m_c)
    b_sums = tl.expand_dims(unless(given_up, b_sum), 0)
    _store_pools(pool_ptr, argmax_ptr, x_ptr, b_sums, group, o_c, N, C, P, AVG, MAX, ACC, CHANNELS_LAST)


@triton.jit
def _fc2(
    b_dlogit, w2_ptr, dpart_ptr, group, item, o_c, N, C, H, items, SAMPLES: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    o_n = group * SAMPLES + tl.arange(0, SAMPLES)
    m_n = o_n < N
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        b_dpart = product(b_dlogit, tl.trans(load_weight(w2_ptr, o_c, o_h, C, H, b_dlogit.dtype)))
        pointers = dpart_ptr + (o_n.to(tl.int64)[:, None] * items + item) * H + o_h[None, :]
        tl.store(pointers, b_dpart, mask=m_n[:, None] & (o_h < H)[None, :])


@triton.jit
def _hidden_grad(
    dpart_ptr, pre_ptr, dpre_ptr, given_up, group, item, N, H, J, K: tl.constexpr, ACTIVATION: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dpre = act' * fc2^T @ dlogit for every pool, BLOCK_E elements of a group of samples."""
    i_n, o_h, m = hidden_elements(group, item, N, H, SAMPLES, BLOCK_E)
    b_dhidden = unless(given_up, sum_parts(dpart_ptr, i_n, o_h, m, J, H, dpart_ptr.dtype.element_ty, BLOCK_E))
    for k in tl.static_range(K):
        o_pre = (i_n * K + k) * H + o_h
        b_pre = tl.load(pre_ptr + o_pre, mask=m, other=0)
        tl.store(dpre_ptr + o_pre, activate_bwd(b_dhidden, b_pre, ACTIVATION), mask=m)


@triton.jit
def _dpool(
    dpre_ptr, w1_ptr, given_up, group, k, o_c, N, C, H, K: tl.constexpr, ACC: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[SAMPLES, BLOCK_C] gradients of the k-th pool of a group of samples: fc1^T @ dpre_k."""
    o_n = (group * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
    m_n = o_n < N
    b_dpool = tl.zeros([SAMPLES, o_c.shape[0]], ACC)
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        pointers = dpre_ptr + (o_n * K + k) * H + o_h[None, :]
        b_dpre = tl.load(pointers, mask=m_n & (o_h < H)[None, :], other=0, cache_modifier=".cg")
        b_dpool += product(b_dpre, tl.trans(load_weight(w1_ptr, o_h, o_c, H, C, ACC)))
    return unless(given_up, b_dpool)


@triton.jit
def _load_gates(gate_ptr, given_up, group, o_c, N, C, SAMPLES: tl.constexpr):
    """[BLOCK_C] gates that other programs have stored, or [SAMPLES, BLOCK_C]; NaN where given up."""
    if SAMPLES == 1:
        b_gates = tl.load(gate_ptr + tl.cast(group, tl.int64) * C + o_c, mask=o_c < C, other=0, cache_modifier=".cg")
    else:
        o_n = (group * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
        b_gates = tl.load(
            gate_ptr + o_n * C + o_c[None, :], mask=(o_n < N) & (o_c < C)[None, :], other=0, cache_modifier=".cg"
        )
    return unless(given_up, b_gates)


@triton.jit
def _pool_grads(
    b_davgs, b_dmaxs, b_dlps, b_dlses, argmax_ptr, kept_ptr, row, i_n, o_c, C, MAX: tl.constexpr, LP: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """Of a sample: gradients of average and maximum, the maximum's pixel, factors of x and exp(x - lse), and lse."""
    m_c = o_c < C
    b_davg = get_row(b_davgs, row)
    b_dmax = b_davg
    b_argmax = o_c
    b_dlp = b_davg
    b_dlse = b_davg
    b_lse = b_davg
    p_kept = kept_ptr + i_n * (LP + LSE) * C + o_c
    if MAX:
        b_dmax = get_row(b_dmaxs, row)
        b_argmax = tl.load(argmax_ptr + i_n * C + o_c, mask=m_c, other=0).to(tl.int32)
    if LP:
        b_lp = tl.load(p_kept, mask=m_c, other=0)
        b_dlp = tl.where(b_lp == 0, 0.0, get_row(b_dlps, row) / tl.where(b_lp == 0, 1.0, b_lp))
    if LSE:
        b_dlse = get_row(b_dlses, row)
        b_lse = tl.load(p_kept + LP * C, mask=m_c, other=0)
    return b_davg, b_dmax, b_argmax, b_dlp, b_dlse, b_lse


@triton.jit
def _dweights(
    saved_ptr, dlogit_ptr, dpre_ptr, pool_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, given_up, item, N, C, H,
    AVG: tl.constexpr, MAX: tl.constexpr, LP: tl.constexpr, LSE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dw2 = dlogit^T @ hidden, dw1 = dpre^T @ pool, and the biases' sums, of a block of C x H, 16 samples at a time."""
    ACC: tl.constexpr = saved_ptr.dtype.element_ty
    K: tl.constexpr = AVG + MAX + LP + LSE
    kept_ptr = pool_pointer(saved_ptr, N, H, K)
    i_c = item // tl.cdiv(H, BLOCK)
    i_h = item % tl.cdiv(H, BLOCK)
    o_c = (i_c * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_h = (i_h * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_c = o_c < C
    m_h = o_h < H
    b_dw1 = tl.zeros([BLOCK, BLOCK], ACC)
    b_dw2 = tl.zeros([BLOCK, BLOCK], ACC)
    b_db1 = tl.zeros([BLOCK], ACC)
    b_db2 = tl.zeros([BLOCK], ACC)
    for n in range(0, N, 16):
        o_n = (n + tl.arange(0, 16)).to(tl.int64)
        m_n = o_n < N
        m_cn = m_c[:, None] & m_n[None, :]
        m_nh = m_n[:, None] & m_h[None, :]
        b_dlogit = tl.load(dlogit_ptr + o_n[None, :] * C + o_c[:, None], mask=m_cn, other=0, cache_modifier=".cg")
        b_db2 += tl.sum(b_dlogit, axis=1)
        b_hidden = tl.zeros([16, BLOCK], ACC)
        for k in tl.static_range(K):
            p_hidden = (o_n[:, None] * K + k) * H + o_h[None, :]
            b_hidden += activate(tl.load(saved_ptr + p_hidden, mask=m_nh, other=0), ACTIVATION)
            b_dpre = tl.load(dpre_ptr + p_hidden, mask=m_nh, other=0, cache_modifier=".cg")
            b_db1 += tl.sum(b_dpre, axis=0)
            if k < AVG + MAX:
                p_pool = pool_ptr + (o_n[None, :] * (AVG + MAX) + k) * C
            else:
                p_pool = kept_ptr + (o_n[None, :] * (LP + LSE) + (k - AVG - MAX)) * C
            b_pool = tl.load(p_pool + o_c[:, None], mask=m_cn, other=0, cache_modifier=".cg")
            b_dw1 += tl.dot(b_pool, b_dpre, input_precision="ieee", out_dtype=ACC)
        b_dw2 += tl.dot(b_dlogit, b_hidden, input_precision="ieee", out_dtype=ACC)
    m_ch = m_c[:, None] & m_h[None, :]
    tl.store(dw1_ptr + o_h[None, :] * C + o_c[:, None], unless(given_up, b_dw1), mask=m_ch)
    tl.store(dw2_ptr + o_c[:, None] * H + o_h[None, :], unless(given_up, b_dw2), mask=m_ch)
    tl.store(db1_ptr + o_h, unless(given_up, b_db1), mask=o_h < tl.where(i_c == 0, H, 0))
    tl.store(db2_ptr + o_c, unless(given_up, K * b_db2), mask=o_c < tl.where(i_h == 0, C, 0))


@triton.jit
def gates_kernel(
    pre_ptr,  # (N, K, H)
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    gate_ptr,  # (N, C), written
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
    """The gates again, of a group of samples and a block of channels."""
    J = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    excite(
        pre_ptr, w2_ptr, b2_ptr, gate_ptr, False, pid // J, pid % J * BLOCK_C, N, C, H,
        K, ACTIVATION, GATE, SAMPLES, BLOCK_C, BLOCK_H,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "stamp", "phase", "N", "groups", "lead"], do_not_specialize_on_alignment=["S"])
def gate_bwd_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    spatial_ptr,  # (N, 3, P): spatial gate, gradients of its maximum and mean; or None
    spatial_argmax_ptr,  # (N, P) or None
    w1_ptr,  # (H, C)
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    saved_ptr,  # pre (N, K, H), pool (N, L, C); None without a channel gate, when only dx is computed
    argmax_ptr,  # (N, C) or None
    scratch_ptr,  # gate (N, C), behind a spatial gate read, else written; all of scratch_pointers, and stats, written
    slots,  # where they begin in scratch
    stamp,
    phase,  # in a launch of one
    dx_ptr,  # (N, C, P), written
    dresidual_ptr,  # (N, C, P), written, or None
    dw1_ptr,  # (H, C), written
    db1_ptr,  # (H,), written
    dw2_ptr,  # (C, H), written
    db2_ptr,  # (C,), written
    N,
    groups,
    lead,
    C,
    P,
    H,
    S,  # parts of a plane, of CHUNK pixels
    CHUNK,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    SINGLE: tl.constexpr,
    DIVIDED: tl.constexpr,
    SAMPLES: tl.constexpr,
    PLANE_STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """dx = d(gated x) * gate + the pools' gradients, and the weights' gradients. Reads dy twice and x."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    K: tl.constexpr = AVG + MAX + LP + LSE
    X_EVICT: tl.constexpr = "" if LP or LSE else "evict_first"  # the second phase reads x for lp and lse
    J = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    first_items = J * S
    given_up = phase < 0  # no
    if saved_ptr is None:
        _, group, rest = work_item(pid, groups, 0, 0, first_items, 0)
    else:
        hidden_items = tl.cdiv(SAMPLES * H, BLOCK_E)
        second_items = hidden_items + first_items
        dlogit_ptr, dpre_ptr, pool_ptr, dpart_ptr = scratch_pointers(scratch_ptr, N, C, H, AVG, MAX, K)
        stats_ptr = dpart_ptr + tl.cast(N, tl.int64) * first_items * H  # (N, S, 1 + AVG, C), if planes are divided
        p_first = None
        given_up_ptr = None
        if SINGLE:
            # Behind the second phase of the last group come the weights, which wait for the hidden layer of all.
            weight_item = pid - groups * (first_items + second_items)
            second, group, item = work_item(pid, groups, lead, first_items, second_items, hidden_items)
            given_up_ptr = slots_pointer(scratch_ptr, slots)
            p_first = given_up_ptr + 1 + group * first_items
            p_hidden = given_up_ptr + 1 + groups * first_items
            p_join = p_hidden + groups * hidden_items
            p_all = p_join + (groups * J if DIVIDED else 0)  # one for all of them
        else:
            weight_item = tl.where(phase == WEIGHTS, pid, -1)
            second, group, item = phase_item(pid, phase, S, first_items, hidden_items, hidden_items, second_items)
        rest = tl.where((weight_item < 0) & second, item - hidden_items, -1)  # item of REST, or negative
        if weight_item >= 0:
            if SINGLE:
                given_up = wait(p_all, 1, given_up_ptr, stamp)
            _dweights(
                saved_ptr, dlogit_ptr, dpre_ptr, pool_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, given_up, weight_item,
                N, C, H, AVG, MAX, LP, LSE, ACTIVATION, BLOCK_W,
            )  # fmt: skip
        elif not second:
            sums = phase != JOIN
            if SINGLE:
                sums = True
            if sums:
                _dgate(
                    dy_ptr, mask_ptr, x_ptr, spatial_ptr, spatial_argmax_ptr, w2_ptr, b2_ptr, saved_ptr, argmax_ptr,
                    scratch_ptr, dlogit_ptr, pool_ptr, dpart_ptr, stats_ptr, group, item, N, C, P, H, S, CHUNK,
                    AVG, MAX, K, ACTIVATION, GATE, DIVIDED, SAMPLES, PLANE_STAGES, X_EVICT, CHANNELS_LAST, BLOCK_C,
                    BLOCK_P, BLOCK_H,
                )  # fmt: skip
            if SINGLE:
                mark(p_first + item, stamp)
            if DIVIDED:
                # Behind the mark: of the other items none waits for this, only the weights.
                joins = phase == JOIN
                if SINGLE:
                    joins = item % S == S - 1
                if joins:
                    if SINGLE:
                        given_up = wait(p_first + item - (S - 1), S, given_up_ptr, stamp)
                    _join(
                        x_ptr, argmax_ptr, dlogit_ptr, pool_ptr, stats_ptr, given_up, group, item // S, N, C, P, S,
                        AVG, MAX, ACC, CHANNELS_LAST, BLOCK_C,
                    )  # fmt: skip
                    if SINGLE:
                        mark(p_join + group * J + item // S, stamp)
        elif item < hidden_items:
            if SINGLE:
                given_up = wait(p_first, first_items, given_up_ptr, stamp)
            _hidden_grad(
                dpart_ptr,
                saved_ptr,
                dpre_ptr,
                given_up,
                group,
                item,
                N,
                H,
                first_items,
                K,
                ACTIVATION,
                SAMPLES,
                BLOCK_E,
            )
            if SINGLE:
                if not given_up:  # who waits for it reads what the first phase has left, too
                    mark(p_hidden + group * hidden_items + item, stamp)
                if (group == groups - 1) & (item == hidden_items - 1):
                    # The slots of the joins lie behind those of the hidden layers.
                    waits_for = groups * (hidden_items + (J if DIVIDED else 0))
                    given_up = wait(p_hidden, waits_for, given_up_ptr, stamp)
                    if not given_up:
                        mark(p_all, stamp)
        elif SINGLE:
            given_up = wait(p_hidden + group * hidden_items, hidden_items, given_up_ptr, stamp)
    if rest >= 0:
        i_s = rest % S
        c = rest // S * BLOCK_C
        o_c = c + tl.arange(0, BLOCK_C)
        if saved_ptr is not None:
            b_davgs = tl.zeros([1, BLOCK_C], ACC)
            b_dmaxs = b_davgs
            b_dlps = b_davgs
            b_dlses = b_davgs
            if AVG:
                b_davgs = _dpool(dpre_ptr, w1_ptr, given_up, group, 0, o_c, N, C, H, K, ACC, SAMPLES, BLOCK_H) / P
            if MAX:
                b_dmaxs = _dpool(dpre_ptr, w1_ptr, given_up, group, AVG, o_c, N, C, H, K, ACC, SAMPLES, BLOCK_H)
            if LP:
                b_dlps = _dpool(dpre_ptr, w1_ptr, given_up, group, AVG + MAX, o_c, N, C, H, K, ACC, SAMPLES, BLOCK_H)
            if LSE:
                b_dlses = _dpool(
                    dpre_ptr, w1_ptr, given_up, group, AVG + MAX + LP, o_c, N, C, H, K, ACC, SAMPLES, BLOCK_H
                )
            kept_ptr = pool_pointer(saved_ptr, N, H, K)
        # Tiles of one plane, or of one plane each.
        begin, end, STEP = i_s * CHUNK, tl.minimum(i_s * CHUNK + CHUNK, P), BLOCK_P
        if SAMPLES > 1:
            begin, end, STEP = 0, tl.minimum(SAMPLES, N - group * SAMPLES), 1
            b_gates = _load_gates(scratch_ptr, given_up, group, o_c, N, C, SAMPLES)
        else:
            i_n = tl.cast(group, tl.int64)
            if saved_ptr is not None:
                b_gate = _load_gates(scratch_ptr, given_up, group, o_c, N, C, SAMPLES)
                b_davg, b_dmax, b_argmax, b_dlp, b_dlse, b_lse = _pool_grads(
                    b_davgs, b_dmaxs, b_dlps, b_dlses, argmax_ptr, kept_ptr, 0, i_n, o_c, C, MAX, LP, LSE
                )
        for t in tl.range(begin, end, STEP, num_stages=PLANE_STAGES):
            p = t
            if SAMPLES > 1:
                p = 0
                i_n = tl.cast(group * SAMPLES + t, tl.int64)
                b_gate = get_row(b_gates, t)
                b_davg, b_dmax, b_argmax, b_dlp, b_dlse, b_lse = _pool_grads(
                    b_davgs, b_dmaxs, b_dlps, b_dlses, argmax_ptr, kept_ptr, t, i_n, o_c, C, MAX, LP, LSE
                )
            o_p = p + tl.arange(0, BLOCK_P)
            b_dx = load_tail_grad(
                dy_ptr, mask_ptr, dresidual_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first"
            )
            b_dx = _channel_grad(b_dx, spatial_ptr, spatial_argmax_ptr, i_n, o_c, o_p, P, ACC)
            if saved_ptr is not None:
                b_dx *= b_gate[:, None]
                if AVG:
                    b_dx += b_davg[:, None]
                if MAX:
                    b_dx += tl.where(o_p[None, :] == b_argmax[:, None], b_dmax[:, None], 0.0)
                if LP or LSE:
                    b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first")
                    if LP:
                        b_dx += b_dlp[:, None] * b_x
                    if LSE:
                        b_dx += b_dlse[:, None] * tl.exp(b_x - b_lse[:, None])
            store_tile(b_dx, dx_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first")


def gates(
    x: Tensor, w2: Tensor, b2: Tensor | None, saved: Tensor, pools: int, activation: str, gate_name: str
) -> tuple[Tensor, int]:
    """Launch the gates alone: the scratch memory, which begins with them, of a later :func:`backward`."""
    n, c, _, _ = x.shape
    hidden = w2.shape[1]
    plan = channel_plan(x, hidden, dspatial=True)
    scratch, slots = _empty_scratch(x, hidden, pools, plan)
    gates_kernel[(plan.groups * plan.blocks,)](
        saved,
        w2,
        b2,
        scratch,
        n,
        c,
        hidden,
        K=pool_count(pools),
        ACTIVATION=activation,
        GATE=gate_name,
        SAMPLES=plan.samples,
        BLOCK_C=plan.tile.block_c,
        BLOCK_H=plan.block_h,
        num_warps=plan.tile.num_warps,
    )
    return scratch, slots


def backward(
    dy: Tensor,
    mask: Tensor | None,
    x: Tensor,
    spatial: Tensor | None,
    spatial_argmax: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    saved: Tensor,
    argmax: Tensor,
    pools: int,
    activation: str,
    gate_name: str,
    need_dresidual: bool,
    scratch: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Launch the gate's backward: ``dx, dresidual, dw1, db1, dw2, db2``; behind a spatial gate with its scratch."""
    hidden = w1.shape[0]
    plan = _plan(x, hidden, spatial, pools)
    scratch = scratch or _empty_scratch(x, hidden, pools, plan)
    channel = w1, w2, b2, saved, argmax, *scratch
    dweights = empty_dweights(w1, w2)
    dx, dresidual = launch_dx(
        dy, mask, x, spatial, spatial_argmax, need_dresidual, channel, dweights, hidden, pools, activation, gate_name
    )
    return dx, dresidual, *dweights


def _plan(x: Tensor, hidden: int, spatial: Tensor | None, pools: int) -> config.ChannelPlan:
    return channel_plan(x, hidden, averages=spatial is None and pools == AVERAGE, dspatial=spatial is not None)


def _register_limit(plan: config.ChannelPlan, spatial: Tensor | None, pools: int) -> int:
    """For three programs of 8 warps a multiprocessor where that does not spill, else what the plan says."""
    # lp, lse, 64 bytes of x a thread, the maps of a spatial gate and the products of several samples take more.
    more = kept_count(pools) or pools == AVERAGE or spatial is not None or plan.samples > 1
    return plan.registers if more or plan.tile.num_warps != 8 else 80


def _programs(c: int, hidden: int, plan: config.ChannelPlan) -> dict[str, int]:
    """The programs of each phase."""
    parts = plan.groups * plan.items
    if not hidden:  # there is no channel gate
        return {"parts": parts, "join": 0}
    return {
        "parts": parts,
        "join": plan.groups * plan.joins,
        "hidden": plan.groups * plan.hidden_items(hidden),
        "rest": parts,
        "weights": plan.weight_items(c, hidden),
    }


def _empty_scratch(x: Tensor, hidden: int, pools: int, plan: config.ChannelPlan) -> tuple[Tensor, int]:
    """``gate``, all of ``scratch_pointers``, ``stats`` and slots; and where these begin."""
    n, c, _, _ = x.shape
    stats = plan.splits * (1 + (pools & 1)) * c if plan.splits > 1 else 0
    computed = 2 + pool_count(pools) - kept_count(pools)
    elements = n * (computed * c + (pool_count(pools) + plan.items) * hidden + stats)
    slots = 2 + plan.groups * (plan.items + plan.hidden_items(hidden) + plan.joins) if plan.single_launch else 0
    return empty_scratch(x, elements, slots)


def launch_dx(
    dy: Tensor,
    mask: Tensor | None,
    x: Tensor,
    spatial: Tensor | None,
    spatial_argmax: Tensor | None,
    need_dresidual: bool,
    channel: tuple[Tensor | None, ...] = (None,) * 7,
    dweights: tuple[Tensor | None, ...] = (None,) * 4,
    hidden: int = 0,
    pools: int = 0,
    activation: str = "relu",
    gate_name: str = "sigmoid",
) -> tuple[Tensor, Tensor | None]:
    """Launch what reads full-size tensors: ``dx, dresidual``; ``channel``: what concerns the gate, if any."""
    n, c, h, w = x.shape
    plan = _plan(x, hidden, spatial, pools)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else None
    stamp = new_stamp()
    for phase, programs in launches(plan.single_launch, **_programs(c, hidden, plan)):
        gate_bwd_kernel[(programs,)](
            dy,
            mask,
            x,
            spatial,
            spatial_argmax,
            *channel,
            stamp,
            phase,
            dx,
            dresidual,
            *dweights,
            n,
            plan.groups,
            plan.lead,
            c,
            h * w,
            hidden,
            plan.splits,
            plan.chunk,
            **pool_flags(pools),
            ACTIVATION=activation,
            GATE=gate_name,
            SINGLE=plan.single_launch,
            DIVIDED=plan.splits > 1,
            SAMPLES=plan.samples,
            PLANE_STAGES=plan.plane_stages,
            BLOCK_H=plan.bwd_block_h,
            BLOCK_E=plan.block_e(hidden),
            BLOCK_W=plan.weight_block,
            **tile_options(x, plan.tile),
            num_stages=1,  # prefetching the weights spills
            maxnreg=_register_limit(plan, spatial, pools),
        )
    return dx, dresidual
