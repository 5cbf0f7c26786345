"""The MLP of a channel gate on the device: ``gate[n, c] = gate(sum over pools k of fc2(act(fc1(pool_k(x)))))``.

No task walks all the weights of a layer. Those that pool x also multiply the channels that they own by their columns
of fc1: partial sums over channels (:func:`fc1`). Tasks of their own add the partial sums up (:func:`hidden_layer`).
Those that use the gate multiply by their rows of fc2 (:func:`excite`). The samples of a task share one
matrix product.

Shapes: partial (N, J, K, R) of J blocks of channels, or blocks and parts of planes; preactivation (N, K, R);
gate (N, C). Saved for backward are the preactivation, from which the gate follows, and behind it lp and lse (N, L, C).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common.activations import activate, gate_value
from attn_kernels.ops.common.grid_sync import unless
from attn_kernels.ops.common.matmul import load_weight, matmul_nt
from attn_kernels.ops.common.reduce import sum_partials


class Mlp(NamedTuple):
    """The options of a gate's MLP, by PyTorch's names."""

    activation: str
    gate: str


class Weights(NamedTuple):
    """The MLP's parameters: w1 (R, C), b1 (R,) or None, w2 (C, R), b2 (C,) or None."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


class Sizes(NamedTuple):
    """N samples, C channels, P pixels, R hidden units, S parts of a plane, of ``chunk`` pixels each."""

    N: tl.tensor
    C: tl.tensor
    P: tl.tensor
    R: tl.tensor
    S: tl.tensor  # an argument of kernels: computed there it takes a register throughout, which may spill
    chunk: tl.tensor


class Rows(NamedTuple):
    """[SAMPLES, BLOCK_C] of each pool, some of which are not computed."""

    avg: tl.tensor
    max: tl.tensor
    lp: tl.tensor
    lse: tl.tensor


@triton.jit
def fc1(rows, w1_ptr, partial_ptr, group, i_j, o_c, J, size, POOLS: tl.constexpr, BLOCK: tl.constexpr):
    """The i_j-th of J partial sums of fc1: the products of the channels o_c."""
    SAMPLES: tl.constexpr = rows.avg.shape[0]
    R = size.R
    o_n = group * SAMPLES + tl.arange(0, SAMPLES)
    m_n = o_n < size.N
    p_partial = partial_ptr + (o_n.to(tl.int64)[:, None] * J + i_j) * POOLS.K * R
    for r in range(0, R, BLOCK):
        o_r = r + tl.arange(0, BLOCK)
        m = m_n[:, None] & (o_r < R)[None, :]
        b_w = load_weight(w1_ptr, o_r, o_c, R, size.C, rows.avg.dtype)
        pointers = p_partial + o_r[None, :]
        if POOLS.avg:
            tl.store(pointers, matmul_nt(rows.avg, b_w), mask=m)
        if POOLS.max:
            tl.store(pointers + POOLS.avg * R, matmul_nt(rows.max, b_w), mask=m)
        if POOLS.lp:
            tl.store(pointers + (POOLS.avg + POOLS.max) * R, matmul_nt(rows.lp, b_w), mask=m)
        if POOLS.lse:
            tl.store(pointers + (POOLS.avg + POOLS.max + POOLS.lp) * R, matmul_nt(rows.lse, b_w), mask=m)


@triton.jit
def hidden_elements(group, task, N, SIZE, WORK: tl.constexpr):
    """Sample, element of SIZE, and validity of BLOCK_E elements of a group of samples."""
    o_e = task * WORK.block_e + tl.arange(0, WORK.block_e)
    i_n = (group * WORK.samples + o_e // SIZE).to(tl.int64)
    return i_n, o_e % SIZE, (o_e < WORK.samples * SIZE) & (i_n < N)


@triton.jit
def hidden_layer(
    partial_ptr,  # (N, J, K, R)
    b1_ptr,  # (R,) or None
    preactivation_ptr,  # (N, K, R), written
    given_up,
    group,
    task,
    J,
    size,
    POOLS: tl.constexpr,
    WORK: tl.constexpr,
):
    """fc1 of the pools, BLOCK_E of its elements in a group of samples; NaN where the pools were given up."""
    K: tl.constexpr = POOLS.K
    R = size.R
    i_n, o_e, m = hidden_elements(group, task, size.N, K * R, WORK)
    b_sum = sum_partials(partial_ptr, i_n, o_e, m, J, K * R, partial_ptr.dtype.element_ty, WORK.block_e)
    if b1_ptr is not None:
        b_sum += tl.load(b1_ptr + o_e % R, mask=m, other=0).to(b_sum.dtype)
    tl.store(preactivation_ptr + i_n * K * R + o_e, unless(given_up, b_sum), mask=m)


@triton.jit
def excite(
    preactivation_ptr,  # (N, K, R)
    w2_ptr,  # (C, R)
    b2_ptr,  # (C,) or None
    gate_ptr,  # (N, C), written, or None
    given_up,
    group,
    c,
    size,
    K: tl.constexpr,
    MLP: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[SAMPLES, BLOCK_C] gates of the channels from c on of a group; NaN where the preactivation was given up."""
    SAMPLES: tl.constexpr = WORK.samples
    BLOCK: tl.constexpr = WORK.block_r
    ACTIVATION: tl.constexpr = MLP.activation
    GATE: tl.constexpr = MLP.gate
    ACC: tl.constexpr = preactivation_ptr.dtype.element_ty
    C, R = size.C, size.R
    o_c = c + tl.arange(0, BLOCK_C)
    o_n = (group * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
    m_n = o_n < size.N
    b_logit = tl.zeros([SAMPLES, BLOCK_C], ACC)
    for r in range(0, R, BLOCK):
        o_r = r + tl.arange(0, BLOCK)
        m = m_n & (o_r < R)[None, :]
        b_hidden = tl.zeros([SAMPLES, BLOCK], ACC)
        for k in tl.static_range(K):
            p_pre = preactivation_ptr + (o_n * K + k) * R + o_r[None, :]
            b_hidden += activate(tl.load(p_pre, mask=m, other=0, cache_modifier=".cg"), ACTIVATION)
        b_logit += matmul_nt(b_hidden, load_weight(w2_ptr, o_c, o_r, C, R, ACC))
    if b2_ptr is not None:
        b_logit += K * tl.load(b2_ptr + o_c, mask=o_c < C, other=0).to(ACC)[None, :]
    b_gate = unless(given_up, gate_value(b_logit, GATE))
    if gate_ptr is not None:
        tl.store(gate_ptr + o_n * C + o_c[None, :], b_gate, mask=m_n & (o_c < C)[None, :])
    return b_gate


def empty_dweights(w1: Tensor, w2: Tensor) -> Weights:
    """The gradients of the MLP's parameters, empty."""
    return Weights(torch.empty_like(w1), w1.new_empty(w1.shape[0]), torch.empty_like(w2), w2.new_empty(w2.shape[0]))
