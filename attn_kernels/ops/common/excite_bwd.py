"""The backward pass of a channel gate's MLP on the device, from the logits' gradients to those of pools and weights.

The first phase leaves ``dpartial`` (N, J * S, R), the products of fc2 transposed with the logits' gradients of each
task's channels; here tasks add them up and go back to the pools and to the weights.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from attn_kernels.ops.common.activations import activate, activate_bwd
from attn_kernels.ops.common.excite import hidden_elements
from attn_kernels.ops.common.grid_sync import unless
from attn_kernels.ops.common.matmul import load_weight, matmul_nt
from attn_kernels.ops.common.reduce import sum_partials


class BwdScratch(NamedTuple):
    """Pointers to what the programs of a backward pass leave each other.

    gate and dlogit (N, C), dpreactivation (N, K, R), pool (N, avg + max, C), dpartial (N, J * S, R), and of split
    planes stats (N, S, 1 + avg, C).
    """

    gate: tl.tensor
    dlogit: tl.tensor
    dpreactivation: tl.tensor
    pool: tl.tensor
    dpartial: tl.tensor
    stats: tl.tensor


class BwdWorkspace(NamedTuple):
    """Offsets of the scratch memory's parts, of which the first is at 0, and its size in elements without flags."""

    dlogit: int
    dpreactivation: int
    pool: int
    dpartial: int
    stats: int
    size: int


@triton.jit
def bwd_workspace(N, C, R, S, tasks, POOLS: tl.constexpr, SPLIT: tl.constexpr):
    """Also called by the host, as ``bwd_workspace.fn``; a kernel gives N as an int64."""
    dlogit = N * C
    dpreactivation = dlogit + N * C
    pool = dpreactivation + N * POOLS.K * R
    dpartial = pool + N * (POOLS.avg + POOLS.max) * C
    stats = dpartial + N * tasks * R
    size = stats + N * S * (1 + POOLS.avg) * C * (1 if SPLIT else 0)
    return BwdWorkspace(dlogit, dpreactivation, pool, dpartial, stats, size)


@triton.jit
def bwd_scratch_pointers(scratch_ptr, size, tasks, POOLS: tl.constexpr):
    begin = bwd_workspace(tl.cast(size.N, tl.int64), size.C, size.R, size.S, tasks, POOLS, True)
    return BwdScratch(
        scratch_ptr,
        scratch_ptr + begin.dlogit,
        scratch_ptr + begin.dpreactivation,
        scratch_ptr + begin.pool,
        scratch_ptr + begin.dpartial,
        scratch_ptr + begin.stats,
    )


@triton.jit
def hidden_grad(
    scratch,
    preactivation_ptr,
    given_up,
    group,
    task,
    J,
    size,
    K: tl.constexpr,
    MLP: tl.constexpr,
    WORK: tl.constexpr,
):
    """dpreactivation = act' * fc2^T @ dlogit for every pool, BLOCK_E elements of a group of samples."""
    R = size.R
    ACTIVATION: tl.constexpr = MLP.activation
    ACC: tl.constexpr = scratch.dpartial.dtype.element_ty
    i_n, o_r, m = hidden_elements(group, task, size.N, R, WORK)
    b_dhidden = unless(given_up, sum_partials(scratch.dpartial, i_n, o_r, m, J, R, ACC, WORK.block_e))
    for k in tl.static_range(K):
        o_pre = (i_n * K + k) * R + o_r
        b_pre = tl.load(preactivation_ptr + o_pre, mask=m, other=0)
        tl.store(scratch.dpreactivation + o_pre, activate_bwd(b_dhidden, b_pre, ACTIVATION), mask=m)


@triton.jit
def dpool(dpreactivation_ptr, w1_ptr, given_up, group, k, o_c, size, K: tl.constexpr, WORK: tl.constexpr):
    """[SAMPLES, BLOCK_C] gradients of the k-th pool of a group of samples: fc1^T @ dpreactivation_k."""
    SAMPLES: tl.constexpr = WORK.samples
    ACC: tl.constexpr = dpreactivation_ptr.dtype.element_ty
    R = size.R
    o_n = (group * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
    m_n = o_n < size.N
    b_dpool = tl.zeros([SAMPLES, o_c.shape[0]], ACC)
    for r in range(0, R, WORK.block_r):
        o_r = r + tl.arange(0, WORK.block_r)
        pointers = dpreactivation_ptr + (o_n * K + k) * R + o_r[None, :]
        b_dpre = tl.load(pointers, mask=m_n & (o_r < R)[None, :], other=0, cache_modifier=".cg")
        b_dpool += matmul_nt(b_dpre, tl.trans(load_weight(w1_ptr, o_r, o_c, R, size.C, ACC)))
    return unless(given_up, b_dpool)


@triton.jit
def load_gates(gate_ptr, given_up, group, o_c, N, C, SAMPLES: tl.constexpr):
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
def dweights(
    saved_ptr,
    scratch,
    gradients,
    given_up,
    task,
    size,
    POOLS: tl.constexpr,
    MLP: tl.constexpr,
    WORK: tl.constexpr,
):
    """dw2 = dlogit^T @ hidden, dw1 = dpreactivation^T @ pool, and the biases' sums, of a block of C x R.

    16 samples at a time.
    """
    ACTIVATION: tl.constexpr = MLP.activation
    BLOCK: tl.constexpr = WORK.block_w
    ACC: tl.constexpr = saved_ptr.dtype.element_ty
    K: tl.constexpr = POOLS.K
    COMPUTED: tl.constexpr = POOLS.avg + POOLS.max
    N, C, R = size.N, size.C, size.R
    saved_pools_ptr = saved_ptr + tl.cast(N, tl.int64) * K * R
    i_c = task // tl.cdiv(R, BLOCK)
    i_r = task % tl.cdiv(R, BLOCK)
    o_c = (i_c * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_r = (i_r * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_c = o_c < C
    m_r = o_r < R
    b_dw1 = tl.zeros([BLOCK, BLOCK], ACC)
    b_dw2 = tl.zeros([BLOCK, BLOCK], ACC)
    b_db1 = tl.zeros([BLOCK], ACC)
    b_db2 = tl.zeros([BLOCK], ACC)
    for n in range(0, N, 16):
        o_n = (n + tl.arange(0, 16)).to(tl.int64)
        m_n = o_n < N
        m_cn = m_c[:, None] & m_n[None, :]
        m_nr = m_n[:, None] & m_r[None, :]
        p_dlogit = scratch.dlogit + o_n[None, :] * C + o_c[:, None]
        b_dlogit = tl.load(p_dlogit, mask=m_cn, other=0, cache_modifier=".cg")
        b_db2 += tl.sum(b_dlogit, axis=1)
        b_hidden = tl.zeros([16, BLOCK], ACC)
        for k in tl.static_range(K):
            o_hidden = (o_n[:, None] * K + k) * R + o_r[None, :]
            b_hidden += activate(tl.load(saved_ptr + o_hidden, mask=m_nr, other=0), ACTIVATION)
            b_dpre = tl.load(scratch.dpreactivation + o_hidden, mask=m_nr, other=0, cache_modifier=".cg")
            b_db1 += tl.sum(b_dpre, axis=0)
            if k < COMPUTED:
                p_pool = scratch.pool + (o_n[None, :] * COMPUTED + k) * C
            else:
                p_pool = saved_pools_ptr + (o_n[None, :] * (POOLS.lp + POOLS.lse) + (k - COMPUTED)) * C
            b_pool = tl.load(p_pool + o_c[:, None], mask=m_cn, other=0, cache_modifier=".cg")
            b_dw1 += tl.dot(b_pool, b_dpre, input_precision="ieee", out_dtype=ACC)
        b_dw2 += tl.dot(b_dlogit, b_hidden, input_precision="ieee", out_dtype=ACC)
    m_cr = m_c[:, None] & m_r[None, :]
    tl.store(gradients.w1 + o_r[None, :] * C + o_c[:, None], unless(given_up, b_dw1), mask=m_cr)
    tl.store(gradients.w2 + o_c[:, None] * R + o_r[None, :], unless(given_up, b_dw2), mask=m_cr)
    tl.store(gradients.b1 + o_r, unless(given_up, b_db1), mask=o_r < tl.where(i_c == 0, R, 0))
    tl.store(gradients.b2 + o_c, unless(given_up, K * b_db2), mask=o_c < tl.where(i_r == 0, C, 0))
