"""The backward pass of a channel gate, also of one with a spatial gate behind it: one kernel.

Two phases (see grid_sync.py). The first reads dy and x: the gradient of the gate, the pools again, and partial sums of
fc2's transposed product (``dpartial``) over channels and parts of planes. Tasks between the two add those up and go
back to the hidden layer. The second goes through fc1 to the pools, reads dy again and writes dx. Tasks behind all
others compute the weights' gradients from the results of the first phases. The parts of a split plane are added up by
the task of the last part; only the weights' tasks wait for it.

Shapes: dlogit (N, C); dpartial (N, J * S, R); dpreactivation (N, K, R). The pools are in two places: average and
maximum, computed here, in scratch, lp and lse among the saved tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common import device
from attn_kernels.ops.common.activations import gate_bwd
from attn_kernels.ops.common.epilogue import load_epilogue_grad, optional
from attn_kernels.ops.common.excite import Mlp, Sizes, Weights, excite
from attn_kernels.ops.common.excite_bwd import (
    bwd_scratch_pointers,
    bwd_workspace,
    dpool,
    dweights,
    hidden_grad,
    load_gates,
)
from attn_kernels.ops.common.gate_plan import GateLaunch, backward_launch
from attn_kernels.ops.common.grid_sync import (
    JOIN,
    WEIGHTS,
    empty_scratch,
    group_flags,
    launches,
    signal,
    task_of,
    unless,
    wait,
)
from attn_kernels.ops.common.matmul import get_row, load_weight, matmul_nt, put_row
from attn_kernels.ops.common.spatial_grad import SpatialGrad, gated_grad
from attn_kernels.ops.common.tile import Place, aligned, at_pixel, load_elements, load_tile, pixels, store_tile
from attn_kernels.ops.common.tiling import Geometry


class Gradients(NamedTuple):
    """dx, and dy behind the ReLU or None; of the weights w1 (R, C), b1 (R,), w2 (C, R), b2 (C,)."""

    dx: Tensor
    dresidual: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


@triton.jit
def _sum_planes(dy_ptr, mask_ptr, x_ptr, spatial, at, end, AVG: tl.constexpr, EVICT: tl.constexpr, TILE: tl.constexpr):
    """sum_p dy * x and sum_p x of a part of a sample, from the place on."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    o_c = at.channel + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_avg = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p in range(at.pixel, end, BLOCK_P):
        b_dy = load_epilogue_grad(dy_ptr, mask_ptr, None, at_pixel(at, p), TILE)
        b_x = load_tile(x_ptr, at_pixel(at, p), TILE, EVICT)
        b_sum += gated_grad(b_dy, spatial, at_pixel(at, p), o_c, TILE) * b_x
        if AVG:
            b_avg += b_x
    return tl.sum(b_sum, axis=1), tl.sum(b_avg, axis=1)


@triton.jit
def _sum_samples(
    dy_ptr,
    mask_ptr,
    x_ptr,
    spatial,
    group,
    c,
    size,
    AVG: tl.constexpr,
    EVICT: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """[SAMPLES, BLOCK_C] sums of dy * x and of x over the planes of several samples, a tile each."""
    BLOCK_C: tl.constexpr = TILE.block_c
    SAMPLES: tl.constexpr = WORK.samples
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    o_c = c + tl.arange(0, BLOCK_C)
    b_sums = tl.zeros([SAMPLES, BLOCK_C], ACC)
    b_avgs = tl.zeros([SAMPLES, BLOCK_C], ACC)
    for row in tl.range(0, tl.minimum(SAMPLES, size.N - group * SAMPLES), num_stages=WORK.plane_stages):
        at = Place(tl.cast(group * SAMPLES + row, tl.int64), c, 0, size.C, size.P)
        b_dy = load_epilogue_grad(dy_ptr, mask_ptr, None, at, TILE)
        b_x = load_tile(x_ptr, at, TILE, EVICT)
        b_dy = gated_grad(b_dy, spatial, at, o_c, TILE)
        b_sums = put_row(b_sums, row, tl.sum(b_dy * b_x, axis=1))
        if AVG:
            b_avgs = put_row(b_avgs, row, tl.sum(b_x, axis=1))
    return b_sums, b_avgs


@triton.jit
def _store_pools(pool_ptr, argmax_ptr, x_ptr, b_sums, group, o_c, size, POOLS: tl.constexpr, TILE: tl.constexpr):
    """The averages and the maxima of x, of a group of samples, from [SAMPLES, BLOCK_C] sums."""
    C, P = size.C, size.P
    o_n = (group * b_sums.shape[0] + tl.arange(0, b_sums.shape[0])).to(tl.int64)[:, None]
    o_c = o_c[None, :]
    m = (o_n < size.N) & (o_c < C)
    p_pool = pool_ptr + o_n * (POOLS.avg + POOLS.max) * C + o_c
    if POOLS.avg:
        tl.store(p_pool, b_sums / P, mask=m)
    if POOLS.max:
        b_argmax = tl.load(argmax_ptr + o_n * C + o_c, mask=m, other=0).to(tl.int32)
        tl.store(p_pool + POOLS.avg * C, load_elements(x_ptr, o_n, o_c, b_argmax, m, C, P, TILE), mask=m)


@triton.jit
def _dgate(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    spatial,
    weights,
    saved_ptr,
    argmax_ptr,
    scratch,
    group,
    task,
    size,
    POOLS: tl.constexpr,
    MLP: tl.constexpr,
    EVICT: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """dlogit[c] = gate' * sum_p dy * x, fc2[c, :]^T @ dlogit[c] and the pools of a task. Reads dy and x.

    All are sums over a plane. Those of its parts are partial sums, of ``dlogit`` and the average in ``stats``.
    """
    BLOCK_C: tl.constexpr = TILE.block_c
    K: tl.constexpr = POOLS.K
    GATE: tl.constexpr = MLP.gate
    SAMPLES: tl.constexpr = WORK.samples
    N, C, P, R, S, chunk = size
    i_s = task % S
    c = task // S * BLOCK_C
    begin = i_s * chunk
    end = tl.minimum(begin + chunk, P)
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if SAMPLES == 1:
        at = Place(tl.cast(group, tl.int64), c, begin, C, P)
        b_dgate, b_sum = _sum_planes(dy_ptr, mask_ptr, x_ptr, spatial, at, end, POOLS.avg, EVICT, TILE)
        b_dgates = tl.expand_dims(b_dgate, 0)
        b_sums = tl.expand_dims(b_sum, 0)
    else:
        b_dgates, b_sums = _sum_samples(dy_ptr, mask_ptr, x_ptr, spatial, group, c, size, POOLS.avg, EVICT, WORK, TILE)
    if not WORK.joined:
        _store_pools(scratch.pool, argmax_ptr, x_ptr, b_sums, group, o_c, size, POOLS, TILE)
    o_n = group * SAMPLES + tl.arange(0, SAMPLES)
    m_n = o_n < N
    o_gate = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
    m = m_n[:, None] & m_c[None, :]
    if spatial.maps is None:
        b_gates = excite(saved_ptr, weights.w2, weights.b2, None, False, group, c, size, K, MLP, WORK, BLOCK_C)
        if i_s == 0:
            tl.store(scratch.gate + o_gate, b_gates, mask=m)
    else:  # needed earlier, by the spatial gate's backward, and therefore there already
        b_gates = tl.load(scratch.gate + o_gate, mask=m, other=0)
    b_dlogits = tl.where(m, gate_bwd(b_dgates, b_gates, GATE), 0.0)
    if WORK.joined:
        p_stats = scratch.stats + (o_n.to(tl.int64)[:, None] * S + i_s) * (1 + POOLS.avg) * C + o_c[None, :]
        tl.store(p_stats, b_dlogits, mask=m)
        if POOLS.avg:
            tl.store(p_stats + C, b_sums, mask=m)
    else:
        tl.store(scratch.dlogit + o_gate, b_dlogits, mask=m)
    p_dpartial = scratch.dpartial + (o_n.to(tl.int64)[:, None] * (tl.cdiv(C, BLOCK_C) * S) + task) * R
    for r in range(0, R, WORK.block_r):
        o_r = r + tl.arange(0, WORK.block_r)
        b_dpartial = matmul_nt(b_dlogits, tl.trans(load_weight(weights.w2, o_c, o_r, C, R, b_dlogits.dtype)))
        tl.store(p_dpartial + o_r[None, :], b_dpartial, mask=m_n[:, None] & (o_r < R)[None, :])


@triton.jit
def _join(x_ptr, argmax_ptr, scratch, given_up, group, i_j, size, POOLS: tl.constexpr, TILE: tl.constexpr):
    """``dlogit`` and the pools of a split plane, from what its parts have left: for the weights' gradients alone."""
    BLOCK_C: tl.constexpr = TILE.block_c
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, S = size.C, size.S
    i_n = tl.cast(group, tl.int64)
    o_c = i_j * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_dlogit = tl.zeros([BLOCK_C], ACC)
    b_sum = tl.zeros([BLOCK_C], ACC)
    for s in range(0, S):
        p_stats = scratch.stats + (i_n * S + s) * (1 + POOLS.avg) * C + o_c
        b_dlogit += tl.load(p_stats, mask=m_c, other=0, cache_modifier=".cg")
        if POOLS.avg:
            b_sum += tl.load(p_stats + C, mask=m_c, other=0, cache_modifier=".cg")
    tl.store(scratch.dlogit + i_n * C + o_c, unless(given_up, b_dlogit), mask=m_c)
    b_sums = tl.expand_dims(unless(given_up, b_sum), 0)
    _store_pools(scratch.pool, argmax_ptr, x_ptr, b_sums, group, o_c, size, POOLS, TILE)


@triton.jit
def _pool_grads(b_davgs, b_dmaxs, b_dlps, b_dlses, argmax_ptr, saved_pools_ptr, row, i_n, o_c, C, POOLS: tl.constexpr):
    """Of a sample: gradients of average and maximum, the maximum's pixel, factors of x and exp(x - lse), and lse."""
    m_c = o_c < C
    b_davg = get_row(b_davgs, row)
    b_dmax = b_davg
    b_argmax = o_c
    b_dlp = b_davg
    b_dlse = b_davg
    b_lse = b_davg
    p_saved = saved_pools_ptr + i_n * (POOLS.lp + POOLS.lse) * C + o_c
    if POOLS.max:
        b_dmax = get_row(b_dmaxs, row)
        b_argmax = tl.load(argmax_ptr + i_n * C + o_c, mask=m_c, other=0).to(tl.int32)
    if POOLS.lp:
        b_lp = tl.load(p_saved, mask=m_c, other=0)
        b_dlp = tl.where(b_lp == 0, 0.0, get_row(b_dlps, row) / tl.where(b_lp == 0, 1.0, b_lp))
    if POOLS.lse:
        b_dlse = get_row(b_dlses, row)
        b_lse = tl.load(p_saved + POOLS.lp * C, mask=m_c, other=0)
    return b_davg, b_dmax, b_argmax, b_dlp, b_dlse, b_lse


@triton.jit
def gates_kernel(
    preactivation_ptr,  # (N, K, R)
    w2_ptr,  # (C, R)
    b2_ptr,  # (C,) or None
    gate_ptr,  # (N, C), written
    N,
    C,
    R,
    K: tl.constexpr,
    MLP: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gates again, of a group of samples and a block of channels."""
    BLOCK_C: tl.constexpr = TILE.block_c
    J = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    size = Sizes(N, C, 1, R, 1, 1)
    c = pid % J * BLOCK_C
    excite(preactivation_ptr, w2_ptr, b2_ptr, gate_ptr, False, pid // J, c, size, K, MLP, WORK, BLOCK_C)


@triton.jit(do_not_specialize=["flags", "epoch", "N", "groups", "lookahead"], do_not_specialize_on_alignment=["S"])
def gate_bwd_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    spatial,  # SpatialGrad
    weights,  # of the MLP
    saved_ptr,  # preactivation (N, K, R), lp and lse (N, L, C)
    argmax_ptr,  # (N, C) or None
    scratch_ptr,  # BwdScratch, written, but the gates behind a spatial gate, which are read
    flags,  # where they begin in scratch
    epoch,  # of a single launch, else its phase
    gradients,  # Gradients, written
    N,
    groups,
    lookahead,
    S,  # parts of a plane
    extent,  # C, P, R and pixels of a part
    POOLS: tl.constexpr,
    MLP: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx = d(gated x) * gate + the pools' gradients, and the weights' gradients. Reads dy twice and x."""
    BLOCK_C: tl.constexpr = TILE.block_c
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    K: tl.constexpr = POOLS.K
    SAMPLES: tl.constexpr = WORK.samples
    # The second phase reads x for lp and lse.
    X_EVICT: tl.constexpr = "" if POOLS.lp or POOLS.lse else "evict_first"
    C, P = aligned(extent.C, extent.P, TILE)
    size = Sizes(N, C, P, extent.R, S, extent.chunk)
    J = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    first_tasks = J * S
    hidden_tasks = tl.cdiv(SAMPLES * extent.R, WORK.block_e)
    second_tasks = hidden_tasks + first_tasks
    scratch = bwd_scratch_pointers(scratch_ptr, size, first_tasks, POOLS)
    # Behind the second phase of the last group come the weights, which wait for the hidden layers of all.
    if WORK.single:
        weight_task = pid - groups * (first_tasks + second_tasks)
    else:
        weight_task = tl.where(epoch == WEIGHTS, pid, -1)
    second, group, task = task_of(
        pid, epoch, groups, lookahead, S, first_tasks, hidden_tasks, hidden_tasks, second_tasks, WORK.single
    )
    sync = group_flags(scratch_ptr, flags, epoch, groups, group, first_tasks, hidden_tasks)
    # Behind the flags of all hidden layers are those of the joins, and one for all of them.
    p_hidden = sync.given_up + 1 + groups * first_tasks
    p_join = p_hidden + groups * hidden_tasks
    p_all = p_join + (groups * J if WORK.joined else 0)
    given_up = epoch < 0  # no
    rest = tl.where((weight_task < 0) & second, task - hidden_tasks, -1)  # task of REST, or negative
    if weight_task >= 0:
        given_up = wait(p_all, 1, sync, WORK.single)
        dweights(saved_ptr, scratch, gradients, given_up, weight_task, size, POOLS, MLP, WORK)
    elif not second:
        if WORK.single or epoch != JOIN:
            _dgate(
                dy_ptr,
                mask_ptr,
                x_ptr,
                spatial,
                weights,
                saved_ptr,
                argmax_ptr,
                scratch,
                group,
                task,
                size,
                POOLS,
                MLP,
                X_EVICT,
                WORK,
                TILE,
            )
        signal(sync.first + task, sync, WORK.single)
        if WORK.joined:
            # Behind the signal: of the other tasks none waits for this, only the weights.
            joins = epoch == JOIN
            if WORK.single:
                joins = task % S == S - 1
            if joins:
                given_up = wait(sync.first + task - (S - 1), S, sync, WORK.single)
                _join(x_ptr, argmax_ptr, scratch, given_up, group, task // S, size, POOLS, TILE)
                signal(p_join + group * J + task // S, sync, WORK.single)
    elif task < hidden_tasks:
        given_up = wait(sync.first, first_tasks, sync, WORK.single)
        hidden_grad(scratch, saved_ptr, given_up, group, task, first_tasks, size, K, MLP, WORK)
        if WORK.single:
            if not given_up:  # tasks that wait for this flag also read data of the first phase
                signal(sync.hidden + task, sync, True)
            if (group == groups - 1) & (task == hidden_tasks - 1):
                given_up = wait(p_hidden, groups * (hidden_tasks + (J if WORK.joined else 0)), sync, True)
                if not given_up:
                    signal(p_all, sync, True)
    else:
        given_up = wait(sync.hidden, hidden_tasks, sync, WORK.single)
    if rest >= 0:
        i_s = rest % S
        c = rest // S * BLOCK_C
        o_c = c + tl.arange(0, BLOCK_C)
        dpre_ptr = scratch.dpreactivation
        saved_pools_ptr = saved_ptr + tl.cast(N, tl.int64) * K * extent.R
        b_davgs = tl.zeros([1, BLOCK_C], ACC)
        b_dmaxs = b_davgs
        b_dlps = b_davgs
        b_dlses = b_davgs
        if POOLS.avg:
            b_davgs = dpool(dpre_ptr, weights.w1, given_up, group, 0, o_c, size, K, WORK) / P
        if POOLS.max:
            b_dmaxs = dpool(dpre_ptr, weights.w1, given_up, group, POOLS.avg, o_c, size, K, WORK)
        if POOLS.lp:
            b_dlps = dpool(dpre_ptr, weights.w1, given_up, group, POOLS.avg + POOLS.max, o_c, size, K, WORK)
        if POOLS.lse:
            b_dlses = dpool(dpre_ptr, weights.w1, given_up, group, K - 1, o_c, size, K, WORK)
        # Tiles of one plane, or of one plane each.
        begin, end, STEP = i_s * extent.chunk, tl.minimum(i_s * extent.chunk + extent.chunk, P), TILE.block_p
        if SAMPLES > 1:
            begin, end, STEP = 0, tl.minimum(SAMPLES, N - group * SAMPLES), 1
            b_gates = load_gates(scratch.gate, given_up, group, o_c, N, C, SAMPLES)
        else:
            i_n = tl.cast(group, tl.int64)
            b_gate = load_gates(scratch.gate, given_up, group, o_c, N, C, SAMPLES)
            b_davg, b_dmax, b_argmax, b_dlp, b_dlse, b_lse = _pool_grads(
                b_davgs, b_dmaxs, b_dlps, b_dlses, argmax_ptr, saved_pools_ptr, 0, i_n, o_c, C, POOLS
            )
        for t in tl.range(begin, end, STEP, num_stages=WORK.plane_stages):
            p = t
            if SAMPLES > 1:
                p = 0
                i_n = tl.cast(group * SAMPLES + t, tl.int64)
                b_gate = get_row(b_gates, t)
                b_davg, b_dmax, b_argmax, b_dlp, b_dlse, b_lse = _pool_grads(
                    b_davgs, b_dmaxs, b_dlps, b_dlses, argmax_ptr, saved_pools_ptr, t, i_n, o_c, C, POOLS
                )
            at = Place(i_n, c, p, C, P)
            b_dx = load_epilogue_grad(dy_ptr, mask_ptr, gradients.dresidual, at, TILE, "evict_first")
            b_dx = gated_grad(b_dx, spatial, at, o_c, TILE) * b_gate[:, None]
            if POOLS.avg:
                b_dx += b_davg[:, None]
            if POOLS.max:
                b_dx += tl.where(pixels(at, TILE)[None, :] == b_argmax[:, None], b_dmax[:, None], 0.0)
            if POOLS.lp or POOLS.lse:
                b_x = load_tile(x_ptr, at, TILE, "evict_first")
                if POOLS.lp:
                    b_dx += b_dlp[:, None] * b_x
                if POOLS.lse:
                    b_dx += b_dlse[:, None] * tl.exp(b_x - b_lse[:, None])
            store_tile(b_dx, gradients.dx, at, TILE, "evict_first")


def launch_gates(x: Tensor, g: Geometry, weights: Weights, saved: Tensor, pools: int, mlp: Mlp) -> tuple[Tensor, int]:
    """Launch the gates alone: the scratch memory, which begins with them, of a later :func:`launch_backward`.

    For a channel gate with a spatial gate behind it.
    """
    hidden = weights.w2.shape[1]
    found = backward_launch(g, hidden, pools, device.SINGLE_LAUNCH, True)
    scratch, flags = _empty_scratch(x, found)
    gates_kernel[(found.plan.groups * found.plan.blocks,)](
        preactivation_ptr=saved,
        w2_ptr=weights.w2,
        b2_ptr=weights.b2,
        gate_ptr=scratch,
        MLP=mlp,
        **found.gates,
    )
    return scratch, flags


def launch_backward(
    gradients: Gradients,
    dy: Tensor,
    mask: Tensor,
    x: Tensor,
    g: Geometry,
    spatial: SpatialGrad,
    weights: Weights,
    saved: Tensor,
    argmax: Tensor,
    pools: int,
    mlp: Mlp,
    scratch: tuple[Tensor, int] | None = None,
) -> None:
    """Fill ``gradients``; behind a spatial gate with the scratch memory of :func:`launch_gates`."""
    dspatial = spatial.maps is not None
    found = backward_launch(g, weights.w1.shape[0], pools, device.SINGLE_LAUNCH, dspatial)
    scratch, flags = scratch or _empty_scratch(x, found)
    gradients = gradients._replace(dresidual=optional(gradients.dresidual))
    for epoch, programs in launches(found.plan.single_launch, **found.programs):
        gate_bwd_kernel[(programs,)](
            dy_ptr=dy,
            mask_ptr=optional(mask),
            x_ptr=x,
            spatial=spatial,
            weights=weights,
            saved_ptr=saved,
            argmax_ptr=argmax,
            scratch_ptr=scratch,
            flags=flags,
            epoch=epoch,
            gradients=gradients,
            MLP=mlp,
            **found.arguments,
        )


def _empty_scratch(x: Tensor, found: GateLaunch) -> tuple[Tensor, int]:
    """The workspace and flags; and where these begin."""
    n, c, _, _ = x.shape
    pools, hidden = found.arguments["POOLS"], found.arguments["extent"].R
    size = bwd_workspace.fn(n, c, hidden, found.plan.splits, found.partials, pools, found.joined).size
    return empty_scratch(x, size, found.flags)
