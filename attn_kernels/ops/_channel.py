"""Squeeze and excitation of channels, forward and backward: the part that SE and CBAM's channel gate share.

A gate ``g[n, c] = gate(sum over pools k of fc2(act(fc1(pool_k(x)))))`` in two kernels, neither of which walks all the
weights of a layer in one program: the programs that pool x also multiply the channels that they own by their columns
of fc1 (partial sums over channels, ``part``), and those that use the gate add the partial sums up and multiply by
their rows of fc2. Backward mirrors it: ``dpart`` are partial sums of fc2's transposed product.

Shapes: x (N, C, P) in either layout; pool (N, K, C); part (N, J, K, H) of J blocks of channels; pre (N, K, H); gate
(N, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._device import (
    activate,
    activate_bwd,
    aligned,
    gate_bwd,
    gate_value,
    load_tail_grad,
    load_tile,
    store_tile,
)
from attn_kernels.ops._launch import plane_chunk, plane_tile, tile_options
from reference._common import accumulation_dtype

POOLS = (
    "avg",
    "max",
    "lp",
    "lse",
)  # a set of pools is an integer of these bits; the k-th pool is the k-th bit that is set


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
def squeeze_kernel(
    x_ptr,  # (N, C, P)
    w1_ptr,  # (H, C), or None to pool only
    pool_ptr,  # (N, K, C), written
    argmax_ptr,  # (N, C), written if POOLS has the maximum
    part_ptr,  # (N, J, K, H), written, or None
    C,
    P,
    H,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """pool_k[c] and fc1[:, c] @ pool_k[c] of BLOCK_C planes. Reads x once (twice with lse: its maximum comes first)."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = pool_ptr.dtype.element_ty
    K: tl.constexpr = AVG + MAX + LP + LSE
    J = tl.cdiv(C, BLOCK_C)
    i_n = (tl.program_id(0) // J).to(tl.int64)
    i_j = tl.program_id(0) % J
    o_c = i_j * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_pool = pool_ptr + i_n * K * C + o_c
    first_part = (i_n * J + i_j) * K * H

    # Lane by lane along the plane; lanes meet once, at the end.
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_square = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_max = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
    b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + tl.arange(0, BLOCK_P)[None, :]
    for p in range(0, P, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, i_j * BLOCK_C, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if AVG:
            b_sum += b_x
        if LP:
            b_square += b_x * b_x
        if MAX or LSE:
            b_x = tl.where((o_p < P)[None, :], b_x, float("-inf"))
            b_max, b_arg = running_max(b_max, b_arg, b_x, o_p[None, :])

    b_top = tl.zeros([BLOCK_C], ACC)
    if MAX or LSE:
        b_top, b_first = first_max(b_max, b_arg, 1)
        if MAX:
            tl.store(argmax_ptr + i_n * C + o_c, b_first, mask=m_c)

    if AVG:
        b_pool = tl.sum(b_sum, axis=1) / P
        _pool_done(b_pool, p_pool, part_ptr, first_part, w1_ptr, o_c, m_c, 0, C, H, BLOCK_H)
    if MAX:
        _pool_done(b_top, p_pool, part_ptr, first_part, w1_ptr, o_c, m_c, AVG, C, H, BLOCK_H)
    if LP:
        b_pool = tl.sqrt(tl.sum(b_square, axis=1))
        _pool_done(b_pool, p_pool, part_ptr, first_part, w1_ptr, o_c, m_c, AVG + MAX, C, H, BLOCK_H)
    if LSE:
        shift = tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)
        b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        for p in range(0, P, BLOCK_P):
            o_p = p + tl.arange(0, BLOCK_P)
            b_x = load_tile(x_ptr, i_n, i_j * BLOCK_C, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            b_sum += tl.where((o_p < P)[None, :], tl.exp(b_x - shift[:, None]), 0.0)
        b_pool = tl.log(tl.sum(b_sum, axis=1)) + shift
        _pool_done(b_pool, p_pool, part_ptr, first_part, w1_ptr, o_c, m_c, AVG + MAX + LP, C, H, BLOCK_H)


@triton.jit
def _pool_done(b_pool, p_pool, part_ptr, first_part, w1_ptr, o_c, m_c, k, C, H, BLOCK_H: tl.constexpr):
    tl.store(p_pool + k * C, b_pool, mask=m_c)
    if w1_ptr is not None:
        b_pool = tl.where(m_c, b_pool, 0.0)
        for h in range(0, H, BLOCK_H):
            o_h = h + tl.arange(0, BLOCK_H)
            m_h = o_h < H
            p_w1 = w1_ptr + o_h[:, None].to(tl.int64) * C + o_c[None, :]
            b_w1 = tl.load(p_w1, mask=m_h[:, None] & m_c[None, :], other=0).to(b_pool.dtype)
            tl.store(part_ptr + first_part + k * H + o_h, tl.sum(b_w1 * b_pool[None, :], axis=1), mask=m_h)


@triton.jit
def sum_parts(p_part, o_h, m_h, J, STRIDE, ACC: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_H] sum of J rows that lie STRIDE apart, in a fixed order."""
    b_sum = tl.zeros([BLOCK_H], ACC)
    for j in range(0, J, 16):
        o_j = j + tl.arange(0, 16)
        pointers = p_part + o_j[:, None].to(tl.int64) * STRIDE + o_h[None, :]
        b_sum += tl.sum(tl.load(pointers, mask=(o_j < J)[:, None] & m_h[None, :], other=0), axis=0)
    return b_sum


@triton.jit
def excite(
    part_ptr,  # (N, J, K, H)
    b1_ptr,  # (H,) or None
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    pre_ptr,  # (N, K, H), written by the program whose ``first`` is true, or None
    gate_ptr,  # (N, C), written if ``store_gate``, or None
    i_n,
    c,
    first,
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
                tl.store(pre_ptr + (i_n * K + k) * H + o_h, b_pre, mask=m_h & first)
            b_hidden += activate(b_pre, ACTIVATION)
        p_w2 = w2_ptr + o_c[:, None].to(tl.int64) * H + o_h[None, :]
        b_w2 = tl.load(p_w2, mask=m_c[:, None] & m_h[None, :], other=0).to(ACC)
        b_logit += tl.sum(b_w2 * b_hidden[None, :], axis=1)
    if b2_ptr is not None:
        b_logit += K * tl.load(b2_ptr + o_c, mask=m_c, other=0).to(ACC)
    b_gate = gate_value(b_logit, GATE)
    if gate_ptr is not None:
        tl.store(gate_ptr + i_n * C + o_c, b_gate, mask=m_c & store_gate)
    return b_gate


@triton.jit
def excite_kernel(
    part_ptr,  # (N, J, K, H)
    b1_ptr,  # (H,) or None
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    pre_ptr,  # (N, K, H), written
    gate_ptr,  # (N, C), written
    C,
    H,
    J,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The gate itself, where another kernel than the scale comes next."""
    blocks = tl.cdiv(C, BLOCK_C)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C
    excite(
        part_ptr, b1_ptr, w2_ptr, b2_ptr, pre_ptr, gate_ptr, i_n, c, c == 0, True, C, H, J,
        K, "relu", "sigmoid", BLOCK_C, BLOCK_H,
    )  # fmt: skip


@triton.jit
def _channel_grad(b_dy, spatial_ptr, argmax_ptr, i_n, o_c, o_p, P, ACC: tl.constexpr):
    """The gradient of the channel-gated x: dy itself, or behind a spatial gate dy * gate plus that gate's pools."""
    if spatial_ptr is not None:
        m_p = o_p < P
        p_map = spatial_ptr + i_n * 3 * P + o_p
        b_gate = tl.load(p_map, mask=m_p, other=0)
        b_dmax = tl.load(p_map + P, mask=m_p, other=0)
        b_dmean = tl.load(p_map + 2 * P, mask=m_p, other=0)
        b_argmax = tl.load(argmax_ptr + i_n * P + o_p, mask=m_p, other=-1)
        b_dy = b_dy * b_gate[None, :] + b_dmean[None, :]
        b_dy += tl.where(o_c[:, None] == b_argmax[None, :], b_dmax[None, :], 0.0)
    return b_dy


@triton.jit
def dgate_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    spatial_ptr,  # (N, 3, P): spatial gate, gradients of its maximum and mean; or None
    spatial_argmax_ptr,  # (N, P) or None
    w2_ptr,  # (C, H)
    gate_ptr,  # (N, C)
    dlogit_ptr,  # (N, C), written
    dpart_ptr,  # (N, J, H), written
    C,
    P,
    H,
    GATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dlogit[c] = gate' * sum_p dy * x and fc2[c, :]^T @ dlogit[c] of BLOCK_C planes. Reads dy and x."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = gate_ptr.dtype.element_ty
    J = tl.cdiv(C, BLOCK_C)
    i_n = (tl.program_id(0) // J).to(tl.int64)
    i_j = tl.program_id(0) % J
    c = i_j * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p in range(0, P, BLOCK_P):
        b_dy = load_tail_grad(dy_ptr, mask_ptr, None, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        o_p = p + tl.arange(0, BLOCK_P)
        b_sum += _channel_grad(b_dy, spatial_ptr, spatial_argmax_ptr, i_n, o_c, o_p, P, ACC) * b_x
    b_gate = tl.load(gate_ptr + i_n * C + o_c, mask=m_c, other=0)
    b_dlogit = tl.where(m_c, gate_bwd(tl.sum(b_sum, axis=1), b_gate, GATE), 0.0)
    tl.store(dlogit_ptr + i_n * C + o_c, b_dlogit, mask=m_c)
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        m_h = o_h < H
        p_w2 = w2_ptr + o_c[:, None].to(tl.int64) * H + o_h[None, :]
        b_w2 = tl.load(p_w2, mask=m_c[:, None] & m_h[None, :], other=0).to(ACC)
        tl.store(dpart_ptr + (i_n * J + i_j) * H + o_h, tl.sum(b_w2 * b_dlogit[:, None], axis=0), mask=m_h)


@triton.jit
def _dpool(b_dhidden, b_w1, pre_ptr, dpre_ptr, first, o_h, m_h, store, ACTIVATION: tl.constexpr):
    """[BLOCK_C] gradient of a pool from BLOCK_H hidden units; stores dpre, the gradient before their activation."""
    b_pre = tl.load(pre_ptr + first + o_h, mask=m_h, other=0)
    b_dpre = activate_bwd(b_dhidden, b_pre, ACTIVATION)
    tl.store(dpre_ptr + first + o_h, b_dpre, mask=m_h & store)
    return tl.sum(b_w1 * b_dpre[:, None], axis=0)


@triton.jit
def dx_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P), read for lp and lse only
    spatial_ptr,  # (N, 3, P) or None
    spatial_argmax_ptr,  # (N, P) or None
    w1_ptr,  # (H, C)
    pool_ptr,  # (N, K, C)
    argmax_ptr,  # (N, C) or None
    pre_ptr,  # (N, K, H)
    gate_ptr,  # (N, C), or None where there is no channel gate
    dpart_ptr,  # (N, J, H)
    dpre_ptr,  # (N, K, H), written
    dx_ptr,  # (N, C, P), written
    dresidual_ptr,  # (N, C, P), written, or None
    C,
    P,
    H,
    J,
    CHUNK,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dx = d(gated x) * gate + the pools' gradients, for BLOCK_C planes and CHUNK pixels. Reads dy, writes dx."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    K: tl.constexpr = AVG + MAX + LP + LSE
    blocks = tl.cdiv(C, BLOCK_C)
    splits = tl.cdiv(P, CHUNK)
    pid = tl.program_id(0)
    i_n = (pid // (blocks * splits)).to(tl.int64)
    i_c = pid // splits % blocks
    i_s = pid % splits
    c = i_c * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if gate_ptr is not None:
        b_gate = tl.load(gate_ptr + i_n * C + o_c, mask=m_c, other=0)
        store = (i_c == 0) & (i_s == 0)
        b_davg = tl.zeros([BLOCK_C], ACC)
        b_dmax = tl.zeros([BLOCK_C], ACC)
        b_dlp = tl.zeros([BLOCK_C], ACC)
        b_dlse = tl.zeros([BLOCK_C], ACC)
        for h in range(0, H, BLOCK_H):
            o_h = h + tl.arange(0, BLOCK_H)
            m_h = o_h < H
            b_dhidden = sum_parts(dpart_ptr + i_n * J * H, o_h, m_h, J, H, ACC, BLOCK_H)
            p_w1 = w1_ptr + o_h[:, None].to(tl.int64) * C + o_c[None, :]
            b_w1 = tl.load(p_w1, mask=m_h[:, None] & m_c[None, :], other=0).to(ACC)
            first = i_n * K * H
            if AVG:
                b_davg += _dpool(b_dhidden, b_w1, pre_ptr, dpre_ptr, first, o_h, m_h, store, ACTIVATION)
                first += H
            if MAX:
                b_dmax += _dpool(b_dhidden, b_w1, pre_ptr, dpre_ptr, first, o_h, m_h, store, ACTIVATION)
                first += H
            if LP:
                b_dlp += _dpool(b_dhidden, b_w1, pre_ptr, dpre_ptr, first, o_h, m_h, store, ACTIVATION)
                first += H
            if LSE:
                b_dlse += _dpool(b_dhidden, b_w1, pre_ptr, dpre_ptr, first, o_h, m_h, store, ACTIVATION)
        b_davg /= P
        p_pool = pool_ptr + i_n * K * C + o_c
        if MAX:
            b_argmax = tl.load(argmax_ptr + i_n * C + o_c, mask=m_c, other=-1)
        if LP:
            b_lp = tl.load(p_pool + (AVG + MAX) * C, mask=m_c, other=0)
            b_dlp = tl.where(b_lp == 0, 0.0, b_dlp / tl.where(b_lp == 0, 1.0, b_lp))
        if LSE:
            b_lse = tl.load(p_pool + (AVG + MAX + LP) * C, mask=m_c, other=0)
    for p in range(i_s * CHUNK, min(i_s * CHUNK + CHUNK, P), BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        b_dx = load_tail_grad(dy_ptr, mask_ptr, dresidual_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_dx = _channel_grad(b_dx, spatial_ptr, spatial_argmax_ptr, i_n, o_c, o_p, P, ACC)
        if gate_ptr is not None:
            b_dx *= b_gate[:, None]
            if AVG:
                b_dx += b_davg[:, None]
            if MAX:
                b_dx += tl.where(o_p[None, :] == b_argmax[:, None], b_dmax[:, None], 0.0)
            if LP or LSE:
                b_x = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                if LP:
                    b_dx += b_dlp[:, None] * b_x
                if LSE:
                    b_dx += b_dlse[:, None] * tl.exp(b_x - b_lse[:, None])
        store_tile(b_dx, dx_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)


@triton.jit
def dweights_kernel(
    dlogit_ptr,  # (N, C)
    pre_ptr,  # (N, K, H)
    dpre_ptr,  # (N, K, H)
    pool_ptr,  # (N, K, C)
    dw1_ptr,  # (H, C), written
    db1_ptr,  # (H,), written
    dw2_ptr,  # (C, H), written
    db2_ptr,  # (C,), written
    N,
    C,
    H,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dw2 = dlogit^T @ hidden, dw1 = dpre^T @ pool, and the biases' sums, for a block of C x H; samples in order."""
    ACC: tl.constexpr = dlogit_ptr.dtype.element_ty
    i_c = tl.program_id(0)
    i_h = tl.program_id(1)
    o_c = (i_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    o_h = (i_h * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    m_c = o_c < C
    m_h = o_h < H
    b_dw1 = tl.zeros([BLOCK_C, BLOCK_H], ACC)
    b_dw2 = tl.zeros([BLOCK_C, BLOCK_H], ACC)
    b_db1 = tl.zeros([BLOCK_H], ACC)
    b_db2 = tl.zeros([BLOCK_C], ACC)
    for n in range(0, N, BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < N
        m_cn = m_c[:, None] & m_n[None, :]
        m_nh = m_n[:, None] & m_h[None, :]
        b_dlogit = tl.load(dlogit_ptr + o_n[None, :] * C + o_c[:, None], mask=m_cn, other=0)
        b_db2 += tl.sum(b_dlogit, axis=1)
        b_hidden = tl.zeros([BLOCK_N, BLOCK_H], ACC)
        for k in tl.static_range(K):
            p_hidden = (o_n[:, None] * K + k) * H + o_h[None, :]
            b_hidden += activate(tl.load(pre_ptr + p_hidden, mask=m_nh, other=0), ACTIVATION)
            b_dpre = tl.load(dpre_ptr + p_hidden, mask=m_nh, other=0)
            b_db1 += tl.sum(b_dpre, axis=0)
            b_pool = tl.load(pool_ptr + (o_n[None, :] * K + k) * C + o_c[:, None], mask=m_cn, other=0)
            b_dw1 += tl.dot(b_pool, b_dpre, input_precision="ieee", out_dtype=ACC)
        b_dw2 += tl.dot(b_dlogit, b_hidden, input_precision="ieee", out_dtype=ACC)
    m_ch = m_c[:, None] & m_h[None, :]
    tl.store(dw1_ptr + o_h[None, :] * C + o_c[:, None], b_dw1, mask=m_ch)
    tl.store(dw2_ptr + o_c[:, None] * H + o_h[None, :], b_dw2, mask=m_ch)
    tl.store(db1_ptr + o_h, b_db1, mask=m_h & (i_c == 0))
    tl.store(db2_ptr + o_c, K * b_db2, mask=m_c & (i_h == 0))


def pool_bits(pool_types: Sequence[str]) -> int:
    return sum(1 << POOLS.index(pool) for pool in pool_types)


def pool_flags(pools: int) -> dict[str, int]:
    """The kernels' constexpr 0 or 1 of each pool."""
    return {name.upper(): pools >> i & 1 for i, name in enumerate(POOLS)}


def pool_count(pools: int) -> int:
    return pools.bit_count()


def squeeze(x: Tensor, w1: Tensor | None, pools: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the pools and fc1: ``pool, argmax, part`` (the last None without ``w1``)."""
    n, c, h, w = x.shape
    tile, k, dtype = plane_tile(x), pool_count(pools), accumulation_dtype(x)
    blocks = config.cdiv(c, tile.block_c)
    hidden = 1 if w1 is None else w1.shape[0]
    pool = x.new_empty((n, k, c), dtype=dtype)
    argmax = x.new_empty((n, c) if pools & 2 else 0, dtype=torch.int32)
    part = None if w1 is None else x.new_empty((n, blocks, k, hidden), dtype=dtype)
    squeeze_kernel[(n * blocks,)](
        x,
        w1,
        pool,
        argmax,
        part,
        c,
        h * w,
        hidden,
        **pool_flags(pools),
        BLOCK_H=config.hidden_block(hidden, tile.block_c),
        **tile_options(x, tile),
    )
    return pool, argmax, part


def launch_excite(x: Tensor, part: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the excitation alone: ``pre, gate``."""
    n, c, _, _ = x.shape
    _, blocks, k, hidden = part.shape
    pre, gate = part.new_empty((n, k, hidden)), part.new_empty((n, c))
    block_c = min(config.next_power_of_2(c), 128)
    excite_kernel[(n * config.cdiv(c, block_c),)](
        part,
        b1,
        w2,
        b2,
        pre,
        gate,
        c,
        hidden,
        blocks,
        K=k,
        BLOCK_C=block_c,
        BLOCK_H=config.hidden_block(hidden, block_c),
        num_warps=4,
    )
    return pre, gate


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


def backward(
    dy: Tensor,
    mask: Tensor | None,
    x: Tensor,
    spatial: Tensor | None,
    spatial_argmax: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    pool: Tensor,
    argmax: Tensor,
    pre: Tensor,
    gate: Tensor,
    pools: int,
    activation: str,
    gate_name: str,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Launch the gate's backward, alone or behind a spatial gate: ``dx, dresidual, dw1, db1, dw2, db2``."""
    n, c, h, w = x.shape
    hidden, k = w1.shape[0], pool_count(pools)
    tile = plane_tile(x)
    blocks, block_h = config.cdiv(c, tile.block_c), config.hidden_block(hidden, tile.block_c)
    dlogit, dpart, dpre = torch.empty_like(gate), gate.new_empty((n, blocks, hidden)), torch.empty_like(pre)
    dgate_kernel[(n * blocks,)](
        dy,
        mask,
        x,
        spatial,
        spatial_argmax,
        w2,
        gate,
        dlogit,
        dpart,
        c,
        h * w,
        hidden,
        GATE=gate_name,
        BLOCK_H=block_h,
        **tile_options(x, tile),
    )
    dx, dresidual = launch_dx(
        dy,
        mask,
        x,
        spatial,
        spatial_argmax,
        need_dresidual,
        (w1, pool, argmax, pre, gate, dpart, dpre),
        pools,
        activation,
    )
    dw1, db1, dw2, db2 = empty_dweights(w1, w2)
    # fp64 operands of tl.dot take twice the shared memory.
    block_c, block_h = (32, block_h) if gate.dtype == torch.float32 else (16, 16)
    dweights_kernel[(config.cdiv(c, block_c), config.cdiv(hidden, block_h))](
        dlogit,
        pre,
        dpre,
        pool,
        dw1,
        db1,
        dw2,
        db2,
        n,
        c,
        hidden,
        K=k,
        ACTIVATION=activation,
        BLOCK_N=16,
        BLOCK_C=block_c,
        BLOCK_H=block_h,
        num_warps=4,
    )
    return dx, dresidual, dw1, db1, dw2, db2


def launch_dx(
    dy: Tensor,
    mask: Tensor | None,
    x: Tensor,
    spatial: Tensor | None,
    spatial_argmax: Tensor | None,
    need_dresidual: bool,
    channel: tuple[Tensor, ...] | None = None,
    pools: int = 0,
    activation: str = "relu",
) -> tuple[Tensor, Tensor | None]:
    """Launch the last phase: ``dx, dresidual``; ``channel`` is what the channel gate left, if there is one."""
    n, c, h, w = x.shape
    tile = plane_tile(x)
    chunk, splits = plane_chunk(x, tile)
    w1, pool, argmax, pre, gate, dpart, dpre = channel or (None,) * 7
    hidden, blocks = (pre.shape[2], dpart.shape[1]) if channel else (1, 1)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if need_dresidual else None
    dx_kernel[(n * config.cdiv(c, tile.block_c) * splits,)](
        dy,
        mask,
        x,
        spatial,
        spatial_argmax,
        w1,
        pool,
        argmax,
        pre,
        gate,
        dpart,
        dpre,
        dx,
        dresidual,
        c,
        h * w,
        hidden,
        blocks,
        chunk,
        **pool_flags(pools),
        ACTIVATION=activation,
        BLOCK_H=config.hidden_block(hidden, tile.block_c),
        **tile_options(x, tile),
    )
    return dx, dresidual
