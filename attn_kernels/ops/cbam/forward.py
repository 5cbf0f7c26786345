"""The forward pass of CBAM: the channel gates, the pools over the channels, and the scale by both gates."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.cbam import convolution
from attn_kernels.ops.common import device, tiling
from attn_kernels.ops.common.batch_norm import Norm, NormOptions, norm_use
from attn_kernels.ops.common.epilogue import empty_mask, optional, store_epilogue
from attn_kernels.ops.common.excite import Mlp, Sizes, Weights, excite, hidden_layer
from attn_kernels.ops.common.gate_plan import forward_launch
from attn_kernels.ops.common.grid_sync import (
    empty_scratch,
    flags_pointer,
    group_flags,
    launches,
    signal,
    task_of,
    wait,
)
from attn_kernels.ops.common.moments import update_running
from attn_kernels.ops.common.pools import empty_argmax, empty_saved, index_dtype
from attn_kernels.ops.common.reduce import first_max, nowhere, running_max
from attn_kernels.ops.common.scalar import number, number_bits
from attn_kernels.ops.common.squeeze import scratch_pointers, squeeze, workspace
from attn_kernels.ops.common.tile import aligned, at_channel, load_tile, pixel_block
from attn_kernels.ops.common.tiling import Geometry, Tile, cdiv, geometry, pixel_tile
from reference._common import accumulation_dtype

# CBAM's MLP.
MLP = Mlp("relu", "sigmoid")


@triton.jit(do_not_specialize=["flags", "epoch", "N", "groups", "lookahead"], do_not_specialize_on_alignment=["S"])
def channel_gates_kernel(
    x_ptr,  # (N, C, P)
    weights,  # of the MLP
    saved_ptr,  # preactivation (N, K, R), lp and lse (N, L, C), written
    argmax_ptr,  # (N, C), written if there is a maximum
    scratch_ptr,  # gate (N, C) and the workspace, written
    flags,  # where they begin in scratch
    epoch,  # of a single launch, else its phase
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
    """The channel gates. Reads x."""
    BLOCK_C: tl.constexpr = TILE.block_c
    K: tl.constexpr = POOLS.K
    C, P = aligned(extent.C, extent.P, TILE)
    size = Sizes(N, C, P, extent.R, S, extent.chunk)
    J = tl.cdiv(C, BLOCK_C)
    first_tasks = J * S
    # In the second phase the hidden layer comes first, then the gates, a block of channels per task.
    hidden_tasks = tl.cdiv(WORK.samples * K * extent.R, WORK.block_e)
    second_tasks = hidden_tasks + J
    partials = first_tasks
    if WORK.joined:
        partials = J
    scratch = scratch_pointers(scratch_ptr + tl.cast(N, tl.int64) * C, size, partials, POOLS, WORK.joined)
    second, group, task = task_of(
        tl.program_id(0),
        epoch,
        groups,
        lookahead,
        S,
        first_tasks,
        hidden_tasks,
        second_tasks,
        second_tasks,
        WORK.single,
    )
    sync = group_flags(scratch_ptr, flags, epoch, groups, group, first_tasks, hidden_tasks)
    if not second:
        pool_ptr = saved_ptr + tl.cast(N, tl.int64) * K * extent.R
        squeeze(x_ptr, weights.w1, pool_ptr, argmax_ptr, scratch, sync, group, task, size, POOLS, WORK, TILE)
        signal(sync.first + task, sync, WORK.single)
    elif task < hidden_tasks:
        given_up = wait(sync.first, first_tasks, sync, WORK.single)
        hidden_layer(scratch.partial, weights.b1, saved_ptr, given_up, group, task, partials, size, POOLS, WORK)
        signal(sync.hidden + task, sync, WORK.single)
    else:
        given_up = wait(sync.hidden, hidden_tasks, sync, WORK.single)
        c = (task - hidden_tasks) * BLOCK_C
        excite(saved_ptr, weights.w2, weights.b2, scratch_ptr, given_up, group, c, size, K, MLP, WORK, BLOCK_C)


@triton.jit(do_not_specialize=["N"])
def pools_kernel(
    x_ptr,  # (N, C, P)
    gate_ptr,  # (N, C), or None
    pools_ptr,  # (2, N, P), written: maximum, mean
    argmax_ptr,  # (N, P), written, or None
    N,
    C,
    P,
    TILE: tl.constexpr,
):
    """Maximum, its lowest channel, and mean over the channels of x * gate, of BLOCK_P pixels. Reads x.

    From the last pixels back: L2 still holds what the gates read last. What reads x next begins with the first ones.
    """
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = pools_ptr.dtype.element_ty
    at = pixel_block(tl.num_programs(0) - 1 - tl.program_id(0), C, P, TILE)
    o_p = at.pixel + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_max = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
    b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + tl.arange(0, BLOCK_C)[:, None]
    for c in tl.range(0, C, BLOCK_C, num_stages=TILE.stages):
        o_c = c + tl.arange(0, BLOCK_C)
        b_u = load_tile(x_ptr, at_channel(at, c), TILE)
        if gate_ptr is not None:
            b_u *= tl.load(gate_ptr + at.sample * C + o_c, mask=o_c < C, other=0)[:, None]
        b_sum += b_u
        b_u += nowhere(o_c < C, ACC)[:, None]
        b_max, b_arg = running_max(b_max, b_arg, b_u, o_c[:, None])
    b_top, b_first = first_max(b_max, b_arg, 0)
    p_map = pools_ptr + at.sample * P + o_p
    tl.store(p_map, b_top, mask=m_p)
    tl.store(p_map + tl.cast(N, tl.int64) * P, tl.sum(b_sum, axis=0) / C, mask=m_p)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + at.sample * P + o_p, b_first, mask=m_p)


@triton.jit
def spatial_gate(b_z, mean, invstd, weight_ptr, bias_ptr):
    """z normalised, and its gate."""
    b_normal = (b_z - mean) * invstd
    b_logit = b_normal
    if weight_ptr is not None:
        b_logit = b_logit * tl.load(weight_ptr).to(b_z.dtype)
    if bias_ptr is not None:
        b_logit = b_logit + tl.load(bias_ptr).to(b_z.dtype)
    return b_normal, tl.sigmoid(b_logit)


@triton.jit(do_not_specialize=["flags", "epoch", "momentum", "eps"])
def scale_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    gate_ptr,  # (N, C), or None; the scratch memory of channel_gates_kernel
    flags,  # where its flags begin, or None where it had none
    epoch,  # of its launch
    z_ptr,  # (N, P) and, behind it, written: mean and 1 / standard deviation
    partial_ptr,  # (3, programs): counts, sums and sums of squared deviations
    norm,  # Norm, whose buffers are updated if NORM.update
    programs,
    COUNT,
    momentum,  # number_bits
    eps,  # number_bits
    C,
    P,
    NORM: tl.constexpr,  # batch_norm.NormUse
    RELU: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = act(x * channel gate * spatial gate + residual) for BLOCK_P pixels. Reads x (and residual), writes y."""
    BLOCK_C: tl.constexpr = TILE.block_c
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.program_id(0)
    if NORM.batch_statistics:
        o_q = tl.arange(0, NORM.block_q)
        m_q = o_q < programs
        b_count = tl.load(partial_ptr + o_q, mask=m_q, other=0)
        b_sum = tl.load(partial_ptr + programs + o_q, mask=m_q, other=0)
        b_m2 = tl.load(partial_ptr + 2 * programs + o_q, mask=m_q, other=0)
        mean = tl.sum(b_sum, axis=0) / COUNT
        b_delta = b_sum / tl.maximum(b_count, 1.0) - mean
        m2 = tl.sum(b_m2 + b_count * b_delta * b_delta, axis=0)
        variance = m2 / COUNT
    else:
        mean = tl.load(norm.running_mean).to(ACC)
        variance = tl.load(norm.running_var).to(ACC)
    invstd = 1 / tl.sqrt(variance + number(eps, ACC))
    if pid == 0:
        tl.store(z_ptr + COUNT, mean)
        tl.store(z_ptr + COUNT + 1, invstd)
        complete = True
        if flags is not None:
            complete = tl.load(flags_pointer(gate_ptr, flags)) != epoch
        if NORM.update and complete:
            factor = number(momentum, ACC)
            if norm.batches is not None:
                batches = tl.load(norm.batches) + 1
                tl.store(norm.batches, batches)
                if NORM.cumulative:
                    factor = 1 / batches.to(ACC)
            update_running(norm.running_mean, mean, factor, None)
            count = tl.cast(COUNT, ACC)
            update_running(norm.running_var, variance * (count / (count - 1)), factor, None)

    at = pixel_block(pid, C, P, TILE)
    o_p = at.pixel + tl.arange(0, TILE.block_p)
    b_z = tl.load(z_ptr + at.sample * P + o_p, mask=o_p < P, other=0)
    _, b_spatial = spatial_gate(b_z, mean, invstd, norm.weight, norm.bias)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_y = load_tile(x_ptr, at_channel(at, c), TILE)
        if gate_ptr is not None:
            b_y *= tl.load(gate_ptr + at.sample * C + o_c, mask=o_c < C, other=0)[:, None]
        b_y *= b_spatial[None, :]
        store_epilogue(b_y, y_ptr, residual_ptr, mask_ptr, at_channel(at, c), RELU, TILE)


@functools.lru_cache
def pools_tile(g: Geometry) -> Tile:
    """For the pools over channels: as ``pixel_tile``, but 16 elements per thread, each with three accumulators."""
    tile = pixel_tile(g)
    block_c = max(min(tile.block_c, tiling.TILE // 2 // tile.block_p), 1)
    return tile._replace(
        block_c=block_c,
        num_warps=max(block_c * tile.block_p // (32 * 16), 1),
        stages=tiling.STAGES[g.itemsize],
        # Four programs of 4 warps per multiprocessor, and three in float32, which spills with fewer or with no limit.
        maxnreg={2: 128, 4: 168}.get(g.itemsize),
    )


@functools.lru_cache
def scale_tile(g: Geometry, relu: bool) -> Tile:
    """For the scale by both gates.

    With the ReLU's bits, Triton 3.6 and no limit ptxas settles on 64 registers in float32 on sm_90, and on 80 in
    half precision and channels_last on sm_100, where it then spills 8 bytes. With 80 float32 spills on sm_100.
    """
    limits = {4: 88, 2: 96 if g.channels_last else None}
    return pixel_tile(g)._replace(maxnreg=limits.get(g.itemsize) if relu else None)


class Outputs(NamedTuple):
    """y like x; the channel gate's saved tensors, or empty; z, a map per sample, with its mean and 1 / standard
    deviation behind it, and the argmax over channels (N, H, W); the ReLU's bits, or empty."""

    y: Tensor
    saved: Tensor
    argmax: Tensor
    z: Tensor
    spatial_argmax: Tensor
    mask: Tensor


def empty_outputs(x: Tensor, w1: Tensor | None, pools: int, masked: bool) -> Outputs:
    n, c, h, w = x.shape
    dtype = accumulation_dtype(x)
    if w1 is None:
        saved, argmax = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.uint8)
    else:
        saved, argmax = empty_saved(x, w1.shape[0], pools), empty_argmax(x, pools)
    z = torch.empty(n * h * w + 2, dtype=dtype, device=x.device)
    spatial_argmax = torch.empty((n, h, w), dtype=index_dtype(c), device=x.device)
    return Outputs(torch.empty_like(x), saved, argmax, z, spatial_argmax, empty_mask(x, masked))


def _launch_channel_gates(
    x: Tensor, g: Geometry, weights: Weights, saved: Tensor, argmax: Tensor, pools: int
) -> tuple[Tensor, int | None, int]:
    """Scratch memory, which begins with the gates (N, C); where its flags begin, if there are any; and their epoch."""
    hidden = weights.w1.shape[0]
    found = forward_launch(g, hidden, pools, device.SINGLE_LAUNCH, False)
    n, c = g.n, g.c
    pool_set, plan = found.arguments["POOLS"], found.plan
    elements = workspace.fn(n, c, hidden, plan.splits, found.partials, pool_set, found.joined).size
    scratch, flags = empty_scratch(x, n * c + elements, found.flags)
    for epoch, programs in launches(plan.single_launch, **found.programs):
        channel_gates_kernel[(programs,)](
            x_ptr=x,
            weights=weights,
            saved_ptr=saved,
            argmax_ptr=argmax,
            scratch_ptr=scratch,
            flags=flags,
            epoch=epoch,
            MLP=MLP,
            **found.arguments,
        )
    return scratch, flags if plan.single_launch else None, epoch


def launch_forward(
    outputs: Outputs,
    x: Tensor,
    weights: Weights | None,
    conv_weight: Tensor,
    norm: Norm,
    residual: Tensor | None,
    pools: int,
    options: NormOptions,
    relu: bool,
    save: bool,
) -> None:
    """Fill ``outputs``, and update the norm's buffers; without weights there is no channel gate."""
    n, c, h, w = x.shape
    y, saved, argmax, z, spatial_argmax, mask = outputs
    g = geometry(x)
    gates, flags, epoch = None, None, 0
    if weights is not None:
        gates, flags, epoch = _launch_channel_gates(x, g, weights, saved, argmax, pools)
    channel_pools = z.new_empty((2, n, h, w))
    tile = pools_tile(g)
    pools_kernel[(n * cdiv(h * w, tile.block_p),)](
        x_ptr=x,
        gate_ptr=gates,
        pools_ptr=channel_pools,
        argmax_ptr=spatial_argmax if save else None,
        N=n,
        C=c,
        P=h * w,
        TILE=tile,
        **tile.options,
    )
    partial = convolution.launch_forward(z, x, channel_pools, conv_weight)
    programs = partial.shape[1]
    tile = scale_tile(g, relu)
    scale_kernel[(n * cdiv(h * w, tile.block_p),)](
        x_ptr=x,
        residual_ptr=residual,
        y_ptr=y,
        mask_ptr=optional(mask),
        gate_ptr=gates,
        flags=flags,
        epoch=epoch,
        z_ptr=z,
        partial_ptr=partial,
        norm=norm,
        programs=programs,
        COUNT=n * h * w,
        momentum=number_bits(options.momentum or 0.0, x),
        eps=number_bits(options.eps, x),
        C=c,
        P=h * w,
        NORM=norm_use(options, programs),
        RELU=relu,
        TILE=tile,
        **tile.options,
    )
