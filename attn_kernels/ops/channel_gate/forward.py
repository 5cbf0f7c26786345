"""The forward pass of a channel gate: one kernel, in one launch or in one for each phase."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common import device
from attn_kernels.ops.common.epilogue import optional, store_epilogue
from attn_kernels.ops.common.excite import Mlp, Sizes, Weights, excite, hidden_layer
from attn_kernels.ops.common.gate_plan import forward_launch
from attn_kernels.ops.common.grid_sync import (
    empty_scratch,
    group_flags,
    launches,
    signal,
    task_of,
    wait,
)
from attn_kernels.ops.common.matmul import get_row
from attn_kernels.ops.common.squeeze import scratch_pointers, squeeze, workspace
from attn_kernels.ops.common.tile import Place, aligned, load_tile
from attn_kernels.ops.common.tiling import geometry


@triton.jit(do_not_specialize=["flags", "epoch", "N", "groups", "lookahead"], do_not_specialize_on_alignment=["S"])
def channel_gate_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    weights,  # of the MLP
    saved_ptr,  # preactivation (N, K, R), lp and lse (N, L, C), written; or None
    argmax_ptr,  # (N, C), written if there is a maximum, or None
    scratch_ptr,  # preactivation (N, K, R) if it is not saved, and the workspace, written
    flags,  # where they begin in scratch
    epoch,  # of a single launch, else its phase
    N,
    groups,
    lookahead,
    S,  # parts of a plane
    extent,  # C, P, R and pixels of a part
    RELU: tl.constexpr,
    POOLS: tl.constexpr,
    MLP: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = act(x * gate + residual). Reads x twice, the second time from L2 (and residual), writes y."""
    BLOCK_C: tl.constexpr = TILE.block_c
    K: tl.constexpr = POOLS.K
    SAMPLES: tl.constexpr = WORK.samples
    C, P = aligned(extent.C, extent.P, TILE)
    size = Sizes(N, C, P, extent.R, S, extent.chunk)
    J = tl.cdiv(C, BLOCK_C)
    hidden_tasks = tl.cdiv(SAMPLES * K * extent.R, WORK.block_e)
    first_tasks = J * S
    second_tasks = hidden_tasks + first_tasks
    second, group, task = task_of(
        tl.program_id(0),
        epoch,
        groups,
        lookahead,
        S,
        first_tasks,
        hidden_tasks,
        hidden_tasks,
        second_tasks,
        WORK.single,
    )
    sync = group_flags(scratch_ptr, flags, epoch, groups, group, first_tasks, hidden_tasks)
    pool_ptr = None
    if saved_ptr is None:
        preactivation_ptr = scratch_ptr
        scratch_ptr = scratch_ptr + tl.cast(N, tl.int64) * K * extent.R
    else:
        preactivation_ptr = saved_ptr
        if POOLS.lp or POOLS.lse:
            pool_ptr = saved_ptr + tl.cast(N, tl.int64) * K * extent.R
    partials = first_tasks
    if WORK.joined:
        partials = J
    scratch = scratch_pointers(scratch_ptr, size, partials, POOLS, WORK.joined)
    if not second:
        squeeze(x_ptr, weights.w1, pool_ptr, argmax_ptr, scratch, sync, group, task, size, POOLS, WORK, TILE)
        signal(sync.first + task, sync, WORK.single)
    elif task < hidden_tasks:
        given_up = wait(sync.first, first_tasks, sync, WORK.single)
        hidden_layer(scratch.partial, weights.b1, preactivation_ptr, given_up, group, task, partials, size, POOLS, WORK)
        signal(sync.hidden + task, sync, WORK.single)
    else:
        given_up = wait(sync.hidden, hidden_tasks, sync, WORK.single)
        i_s = (task - hidden_tasks) % S
        c = (task - hidden_tasks) // S * BLOCK_C
        b_gates = excite(
            preactivation_ptr, weights.w2, weights.b2, None, given_up, group, c, size, K, MLP, WORK, BLOCK_C
        )
        # Tiles of one plane, or of one plane each.
        begin, end, STEP = i_s * extent.chunk, tl.minimum(i_s * extent.chunk + extent.chunk, P), TILE.block_p
        if SAMPLES > 1:
            begin, end, STEP = 0, tl.minimum(SAMPLES, N - group * SAMPLES), 1
        else:
            i_n = tl.cast(group, tl.int64)
            b_gate = get_row(b_gates, 0)
        for t in tl.range(begin, end, STEP, num_stages=WORK.plane_stages):
            p = t
            if SAMPLES > 1:
                p = 0
                i_n = tl.cast(group * SAMPLES + t, tl.int64)
                b_gate = get_row(b_gates, t)
            at = Place(i_n, c, p, C, P)
            b_y = load_tile(x_ptr, at, TILE, "evict_first") * b_gate[:, None]
            store_epilogue(b_y, y_ptr, residual_ptr, mask_ptr, at, RELU, TILE, "evict_first")


class Outputs(NamedTuple):
    """y like x; preactivation (N, K, R), lp and lse (N, L, C) in one; argmax (N, C), or empty; the ReLU's bits."""

    y: Tensor
    saved: Tensor | None = None
    argmax: Tensor | None = None
    mask: Tensor | None = None


def launch_forward(
    outputs: Outputs, x: Tensor, weights: Weights, residual: Tensor | None, pools: int, mlp: Mlp, relu: bool
) -> None:
    y, saved, argmax, mask = outputs
    hidden = weights.w1.shape[0]
    g = geometry(x)
    found = forward_launch(g, hidden, pools, device.SINGLE_LAUNCH, True)
    pool_set, plan = found.arguments["POOLS"], found.plan
    elements = workspace.fn(g.n, g.c, hidden, plan.splits, found.partials, pool_set, found.joined).size
    elements += g.n * pool_set.K * hidden if saved is None else 0
    scratch, flags = empty_scratch(x, elements, found.flags)
    for epoch, programs in launches(plan.single_launch, **found.programs):
        channel_gate_kernel[(programs,)](
            x_ptr=x,
            residual_ptr=residual,
            y_ptr=y,
            mask_ptr=optional(mask),
            weights=weights,
            saved_ptr=saved,
            argmax_ptr=argmax,
            scratch_ptr=scratch,
            flags=flags,
            epoch=epoch,
            RELU=relu,
            MLP=mlp,
            **found.arguments,
        )
