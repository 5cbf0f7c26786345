"""CBAM: ``y = act(u * sigmoid(BN(conv([max_c u, mean_c u]))) + residual)`` with u = x * channel gate; or u = x alone.

Woo et al., ECCV 2018, equations 1 to 3. N = bytes of x; maps of one value a pixel are small beside it.

Forward, 4 launches, 4N (+ N residual): the channel gates read x; the pools over the channels read it again; the
convolution and the batch's statistics on maps (see _conv.py); the scale reads x and writes y. u itself is never
written. Each walks over x in the other direction than the one before it, and finds in L2 what that read last. (Pools
that wait for the gates in one launch would read x from L2 alone: 3N. But programs that pool, wait and pool again are
few at a time, and took twice as long in the model, see benchmarks/NOTES.md.)
Backward, 5 launches, 5N (+ N dresidual): the channel gates again; the spatial gate's gradient, with its pools again,
reads dy and x; the convolution's backward, 2, on maps; the channel gate's, with the weights', reads dy and x, dy again
from L2, and writes dx.
Without the channel gate 3 launches, 3N and 4 launches, 4N.
Saved: x, O(N * C) of the channel gate, and two maps: the convolution's output and the index of the maximum; with ReLU
one bit an element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from attn_kernels.ops import _channel, _channel_bwd, _conv, _norm
from attn_kernels.ops import _config as config
from attn_kernels.ops._device import (
    aligned,
    load_elements,
    load_tail_grad,
    load_tile,
    number,
    store_tail,
    update_running,
)
from attn_kernels.ops._launch import (
    GATE_OPTIONS,
    channel_plan,
    number_bits,
    pixel_tile,
    pools_tile,
    scale_options,
    tile_options,
)
from attn_kernels.ops._library import (
    dense,
    empty_mask,
    factors,
    like,
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
    unmask,
)
from attn_kernels.ops._phases import (
    empty_scratch,
    launches,
    mark,
    new_stamp,
    phase_item,
    slots_pointer,
    wait,
    work_item,
)
from reference._common import accumulation_dtype
from reference.cbam import channel_gate, spatial_gate


@triton.jit(do_not_specialize=["slots", "stamp", "phase", "N", "groups", "lead"], do_not_specialize_on_alignment=["S"])
def channel_gates_kernel(
    x_ptr,  # (N, C, P)
    w1_ptr,  # (H, C)
    b1_ptr,  # (H,) or None
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    saved_ptr,  # pre (N, K, H), pool (N, L, C), written
    argmax_ptr,  # (N, C), written if MAX, or None
    scratch_ptr,  # gate (N, C) and all of forward_pointers, written
    slots,  # where they begin in scratch
    stamp,
    phase,  # in a launch of one
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
    SINGLE: tl.constexpr,
    JOINED: tl.constexpr,
    SAMPLES: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The channel gates. Reads x."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    K: tl.constexpr = AVG + MAX + LP + LSE
    J = tl.cdiv(C, BLOCK_C)
    pool_ptr = _channel.pool_pointer(saved_ptr, N, H, K)
    first_items = J * S
    parts = first_items
    if JOINED:
        parts = J
    part_ptr, stats_ptr, arg_ptr = _channel.forward_pointers(
        scratch_ptr + tl.cast(N, tl.int64) * C, N, C, H, parts, S, K, MAX
    )
    # In the second phase the hidden layer comes first, then the gates, a block of channels an item.
    hidden_items = tl.cdiv(SAMPLES * K * H, BLOCK_E)
    second_items = hidden_items + J
    p_first = None
    given_up_ptr = None
    if SINGLE:
        second, group, item = work_item(tl.program_id(0), groups, lead, first_items, second_items, second_items)
        given_up_ptr = slots_pointer(scratch_ptr, slots)
        p_first = given_up_ptr + 1 + group * first_items
        p_hidden = given_up_ptr + 1 + groups * first_items + group * hidden_items
    else:
        second, group, item = phase_item(
            tl.program_id(0), phase, S, first_items, hidden_items, second_items, second_items
        )  # fmt: skip
    given_up = phase < 0  # no
    if not second:
        _channel.squeeze(
            x_ptr, w1_ptr, stats_ptr, arg_ptr, pool_ptr, argmax_ptr, part_ptr, p_first, given_up_ptr, stamp, phase,
            group, item, N, C, P, H, S, CHUNK, AVG, MAX, LP, LSE, JOINED,
            SAMPLES, STAGES, CHANNELS_LAST, BLOCK_C, BLOCK_P, BLOCK_H,
        )  # fmt: skip
        if SINGLE:
            mark(p_first + item, stamp)
    elif item < hidden_items:
        if SINGLE:
            given_up = wait(p_first, first_items, given_up_ptr, stamp)
        _channel.hidden_layer(part_ptr, b1_ptr, saved_ptr, given_up, group, item, N, H, parts, K, SAMPLES, BLOCK_E)
        if SINGLE:
            mark(p_hidden + item, stamp)
    else:
        if SINGLE:
            given_up = wait(p_hidden, hidden_items, given_up_ptr, stamp)
        _channel.excite(
            saved_ptr, w2_ptr, b2_ptr, scratch_ptr, given_up, group, (item - hidden_items) * BLOCK_C, N, C, H,
            K, "relu", "sigmoid", SAMPLES, BLOCK_C, BLOCK_H,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def pools_kernel(
    x_ptr,  # (N, C, P)
    gate_ptr,  # (N, C), or None
    pools_ptr,  # (2, N, P), written: maximum, mean
    argmax_ptr,  # (N, P), written, or None
    N,
    C,
    P,
    STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Maximum, its lowest channel, and mean over the channels of x * gate, of BLOCK_P pixels. Reads x.

    From the last pixels back: L2 still holds what the gates read last. What reads x next begins with the first ones.
    """
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = pools_ptr.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(P, BLOCK_P)
    i_n = (pid // blocks).to(tl.int64)
    p = pid % blocks * BLOCK_P
    o_p = p + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_max = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
    b_arg = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + tl.arange(0, BLOCK_C)[:, None]
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        o_c = c + tl.arange(0, BLOCK_C)
        b_u = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if gate_ptr is not None:
            b_u *= tl.load(gate_ptr + i_n * C + o_c, mask=o_c < C, other=0)[:, None]
        b_sum += b_u
        b_u += _channel.nowhere(o_c < C, ACC)[:, None]
        b_max, b_arg = _channel.running_max(b_max, b_arg, b_u, o_c[:, None])
    b_top, b_first = _channel.first_max(b_max, b_arg, 0)
    p_map = pools_ptr + i_n * P + o_p
    tl.store(p_map, b_top, mask=m_p)
    tl.store(p_map + tl.cast(N, tl.int64) * P, tl.sum(b_sum, axis=0) / C, mask=m_p)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + i_n * P + o_p, b_first, mask=m_p)


@triton.jit
def _spatial_gate(b_z, mean, invstd, weight_ptr, bias_ptr):
    """z normalised, and its gate."""
    b_normal = (b_z - mean) * invstd
    b_logit = b_normal
    if weight_ptr is not None:
        b_logit = b_logit * tl.load(weight_ptr).to(b_z.dtype)
    if bias_ptr is not None:
        b_logit = b_logit + tl.load(bias_ptr).to(b_z.dtype)
    return b_normal, tl.sigmoid(b_logit)


@triton.jit(do_not_specialize=["slots", "stamp", "momentum", "eps"])
def scale_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    gate_ptr,  # (N, C), or None; the scratch memory of channel_gates_kernel
    slots,  # where its slots begin, or None where it had none
    stamp,  # of its launch
    z_ptr,  # (N, P) and, behind it, written: mean and 1 / standard deviation
    part_ptr,  # (3, programs): counts, sums and sums of squared deviations
    weight_ptr,  # (1,) or None
    bias_ptr,  # (1,) or None
    running_mean_ptr,  # (1,), updated if UPDATE, or None
    running_var_ptr,  # (1,), updated if UPDATE, or None
    batches_ptr,  # (), int64, updated if UPDATE, or None
    programs,
    COUNT,
    momentum,  # number_bits
    eps,  # number_bits
    C,
    P,
    BATCH_STATISTICS: tl.constexpr,
    UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    PARTS: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = act(x * channel gate * spatial gate + residual) for BLOCK_P pixels. Reads x (and residual), writes y."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.program_id(0)
    if BATCH_STATISTICS:
        o_part = tl.arange(0, PARTS)
        m_part = o_part < programs
        b_count = tl.load(part_ptr + o_part, mask=m_part, other=0)
        b_sum = tl.load(part_ptr + programs + o_part, mask=m_part, other=0)
        b_m2 = tl.load(part_ptr + 2 * programs + o_part, mask=m_part, other=0)
        mean = tl.sum(b_sum, axis=0) / COUNT
        b_delta = b_sum / tl.maximum(b_count, 1.0) - mean
        m2 = tl.sum(b_m2 + b_count * b_delta * b_delta, axis=0)
        variance = m2 / COUNT
    else:
        mean = tl.load(running_mean_ptr).to(ACC)
        variance = tl.load(running_var_ptr).to(ACC)
    invstd = 1 / tl.sqrt(variance + number(eps, ACC))
    if pid == 0:
        tl.store(z_ptr + COUNT, mean)
        tl.store(z_ptr + COUNT + 1, invstd)
        complete = True
        if slots is not None:
            complete = tl.load(slots_pointer(gate_ptr, slots)) != stamp
        if UPDATE and complete:
            factor = number(momentum, ACC)
            if batches_ptr is not None:
                batches = tl.load(batches_ptr) + 1
                tl.store(batches_ptr, batches)
                if CUMULATIVE:
                    factor = 1 / batches.to(ACC)
            update_running(running_mean_ptr, mean, factor, None)
            count = tl.cast(COUNT, ACC)
            update_running(running_var_ptr, variance * (count / (count - 1)), factor, None)

    blocks = tl.cdiv(P, BLOCK_P)
    i_n = (pid // blocks).to(tl.int64)
    p = pid % blocks * BLOCK_P
    o_p = p + tl.arange(0, BLOCK_P)
    b_z = tl.load(z_ptr + i_n * P + o_p, mask=o_p < P, other=0)
    _, b_spatial = _spatial_gate(b_z, mean, invstd, weight_ptr, bias_ptr)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_y = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if gate_ptr is not None:
            b_y *= tl.load(gate_ptr + i_n * C + o_c, mask=o_c < C, other=0)[:, None]
        b_y *= b_spatial[None, :]
        store_tail(b_y, y_ptr, residual_ptr, mask_ptr, i_n, c, p, C, P, RELU, CHANNELS_LAST, BLOCK_C, BLOCK_P)


@triton.jit
def dspatial_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    gate_ptr,  # (N, C), or None
    z_ptr,  # (N, P) and, behind it, its mean and 1 / standard deviation
    argmax_ptr,  # (N, P)
    weight_ptr,  # (1,) or None
    bias_ptr,  # (1,) or None
    spatial_ptr,  # (N, 3, P), its first map written: the spatial gate
    pools_ptr,  # (2, N, P), written: maximum, mean
    dlogit_ptr,  # (N, P), written
    part_ptr,  # (programs, 2), written: sums of dlogit and of dlogit * normalised z
    N,
    C,
    P,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dlogit[p] = gate' * sum_c dy * u of BLOCK_P pixels, its sums for BatchNorm, and the pools. Reads dy and x.

    From the last pixels back, so that the launch that reads dy and x next finds those of the first ones in L2.
    """
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(P, BLOCK_P)
    i_n = (pid // blocks).to(tl.int64)
    p = pid % blocks * BLOCK_P
    o_p = p + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_mean = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_dy = load_tail_grad(dy_ptr, mask_ptr, None, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        b_u = load_tile(x_ptr, i_n, c, p, C, P, ACC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if gate_ptr is not None:
            b_u *= tl.load(gate_ptr + i_n * C + o_c, mask=o_c < C, other=0)[:, None]
        b_sum += b_dy * b_u
        b_mean += b_u
    b_argmax = tl.load(argmax_ptr + i_n * P + o_p, mask=m_p, other=0).to(tl.int32)
    b_max = load_elements(x_ptr, i_n, b_argmax, o_p, m_p, C, P, ACC, CHANNELS_LAST)
    if gate_ptr is not None:
        b_max *= tl.load(gate_ptr + i_n * C + b_argmax, mask=m_p, other=0)
    p_pools = pools_ptr + i_n * P + o_p
    tl.store(p_pools, b_max, mask=m_p)
    tl.store(p_pools + tl.cast(N, tl.int64) * P, tl.sum(b_mean, axis=0) / C, mask=m_p)
    b_z = tl.load(z_ptr + i_n * P + o_p, mask=m_p, other=0)
    mean = tl.load(z_ptr + N * P)
    invstd = tl.load(z_ptr + N * P + 1)
    b_normal, b_gate = _spatial_gate(b_z, mean, invstd, weight_ptr, bias_ptr)
    b_dlogit = tl.where(m_p, tl.sum(b_sum, axis=0) * b_gate * (1 - b_gate), 0.0)
    tl.store(spatial_ptr + i_n * 3 * P + o_p, b_gate, mask=m_p)
    tl.store(dlogit_ptr + i_n * P + o_p, b_dlogit, mask=m_p)
    tl.store(part_ptr + pid * 2, tl.sum(b_dlogit, axis=0))
    tl.store(part_ptr + pid * 2 + 1, tl.sum(tl.where(m_p, b_dlogit * b_normal, 0.0), axis=0))


def _forward(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    residual: Tensor | None,
    pools: int,
    batch_statistics: bool,
    update: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    n, c, h, w = x.shape
    hidden = 0 if w1 is None else w1.shape[0]
    tile = pixel_tile(x)
    grid = (n * config.cdiv(h * w, tile.block_p),)
    z, spatial_argmax = _empty_maps(x)
    channel_pools, parts = z.new_empty((2, n, h, w)), z.new_empty((3, _conv.programs(x, conv_weight)))
    saved = argmax = scratch = slots = None
    stamp = new_stamp()
    if w1 is not None:
        saved, argmax = _channel.empty_saved(x, hidden, pools)
        # Half a tile: in half precision programs of 4 warps, of which a multiprocessor holds four.
        plan = channel_plan(x, hidden, tile_elements=config.TILE // 2)
        joined = _channel.is_joined(hidden, pools, plan)
        phases = {
            "parts": plan.groups * plan.items,
            "join": plan.groups * plan.blocks if joined else 0,
            "hidden": plan.groups * plan.hidden_items(_channel.pool_count(pools) * hidden),
            "gates": plan.groups * plan.blocks,
        }
        slot_count = 1 + phases["parts"] + phases["hidden"] if plan.single_launch else 0
        scratch, slots = empty_scratch(x, n * c + _channel.scratch_size(x, hidden, pools, plan), slot_count)
        for phase, programs in launches(plan.single_launch, **phases):
            channel_gates_kernel[(programs,)](
                x,
                w1,
                b1,
                w2,
                b2,
                saved,
                argmax,
                scratch,
                slots,
                stamp,
                phase,
                n,
                plan.groups,
                plan.lead,
                c,
                h * w,
                hidden,
                plan.splits,
                plan.chunk,
                **_channel.pool_flags(pools),
                SINGLE=plan.single_launch,
                JOINED=joined,
                SAMPLES=plan.samples,
                STAGES=plan.stages,
                BLOCK_H=plan.block_h,
                BLOCK_E=plan.block_e(_channel.pool_count(pools) * hidden),
                **tile_options(x, plan.tile),
                maxnreg=plan.registers,
                **GATE_OPTIONS,
            )
    pool_tile = pools_tile(x)
    pools_kernel[(n * config.cdiv(h * w, pool_tile.block_p),)](
        x,
        scratch,
        channel_pools,
        spatial_argmax if save else None,
        n,
        c,
        h * w,
        STAGES=config.STAGES[x.element_size()],
        **tile_options(x, pool_tile),
        # Four programs of 4 warps a multiprocessor, and three in float32, which spills with fewer or with no limit.
        maxnreg={2: 128, 4: 168}.get(x.element_size()),
    )
    _conv.forward(x, channel_pools, parts, conv_weight, z)
    y, mask = torch.empty_like(x), empty_mask(x, relu and save)
    scale_kernel[grid](
        x,
        residual,
        y,
        mask if relu and save else None,
        scratch,
        slots if w1 is not None and plan.single_launch else None,
        stamp,
        z,
        parts,
        weight,
        bias,
        running_mean,
        running_var,
        batches,
        parts.shape[1],
        n * h * w,
        number_bits(momentum or 0.0, x),
        number_bits(eps, x),
        c,
        h * w,
        BATCH_STATISTICS=batch_statistics,
        UPDATE=update,
        CUMULATIVE=momentum is None,
        PARTS=config.next_power_of_2(parts.shape[1]),
        RELU=relu,
        **tile_options(x, tile),
        **scale_options(x, relu),
    )
    if update:
        _norm.mark_updated(running_mean, running_var, batches)
    if saved is None:
        saved, argmax = _no_channel_gate(x)
    return y, saved, argmax, z, spatial_argmax, mask


def _no_channel_gate(x: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for ``saved`` and ``argmax``."""
    return x.new_empty(0, dtype=accumulation_dtype(x)), x.new_empty(0, dtype=torch.uint8)


def _empty_maps(x: Tensor) -> tuple[Tensor, Tensor]:
    """z, a map a sample, and its statistics, in one; and the argmax."""
    n, c, h, w = x.shape
    z = torch.empty(n * h * w + 2, dtype=accumulation_dtype(x), device=x.device)
    return z, torch.empty((n, h, w), dtype=_channel.index_dtype(c), device=x.device)


def _forward_fake(
    x,
    w1,
    b1,
    w2,
    b2,
    conv_weight,
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    residual,
    pools,
    batch_statistics,
    update,
    momentum,
    eps,
    relu,
    save,
):
    if w1 is None:
        channel = _no_channel_gate(x)
    else:
        channel = _channel.empty_saved(x, w1.shape[0], pools)
    return torch.empty_like(x), *channel, *_empty_maps(x), empty_mask(x, relu and save)


def _backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    argmax: Tensor,
    z: Tensor,
    spatial_argmax: Tensor,
    mask: Tensor,
    pools: int,
    batch_statistics: bool,
    relu: bool,
    need_dresidual: bool,
) -> tuple[Tensor, ...]:
    n, c, h, w = x.shape
    dy, mask = like(dy, x), mask if relu else None
    tile = pixel_tile(x)
    programs = n * config.cdiv(h * w, tile.block_p)
    spatial, channel_pools, dlogit = z.new_empty((n, 3, h, w)), z.new_empty((2, n, h, w)), z.new_empty((n, h, w))
    parts = z.new_empty((programs, 2))
    channel_gate = pools, "relu", "sigmoid"
    scratch = None, None
    if w1 is not None:
        scratch = _channel_bwd.gates(x, w2, b2, saved, *channel_gate)
    dspatial_kernel[(programs,)](
        dy,
        mask,
        x,
        scratch[0],
        z,
        spatial_argmax,
        weight,
        bias,
        spatial,
        channel_pools,
        dlogit,
        parts,
        n,
        c,
        h * w,
        **tile_options(x, tile),
        maxnreg=128 if tile.num_warps >= 8 else 168,  # two programs of 8 warps fit; three of 4, which spilled with 128
    )
    spatial_gate = _conv.backward(x, z, channel_pools, dlogit, parts, conv_weight, weight, spatial, batch_statistics)
    if w1 is None:
        dx, dresidual = _channel_bwd.launch_dx(dy, mask, x, spatial, spatial_argmax, need_dresidual)
        channel = [x.new_empty(0) for _ in range(4)]
    else:
        dx, dresidual, *channel = _channel_bwd.backward(
            dy,
            mask,
            x,
            spatial,
            spatial_argmax,
            w1,
            w2,
            b2,
            saved,
            argmax,
            *channel_gate,
            need_dresidual,
            scratch,
        )
    dresidual = x.new_empty(0) if dresidual is None else dresidual
    return dx, dresidual, *channel, *spatial_gate


def _backward_fake(
    dy,
    x,
    w1,
    w2,
    b2,
    conv_weight,
    weight,
    bias,
    saved,
    argmax,
    z,
    spatial_argmax,
    mask,
    pools,
    batch_statistics,
    relu,
    need_dresidual,
):
    if w1 is None:
        channel = [x.new_empty(0) for _ in range(4)]
    else:
        channel = _channel.empty_dweights(w1, w2)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    dconv = z.new_empty(conv_weight.shape)
    return torch.empty_like(x), dresidual, *channel, dconv, z.new_empty(1), z.new_empty(1)


forward_op = register(
    "cbam(Tensor x, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor conv_weight, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, Tensor? residual, int pools, "
    "bool batch_statistics, bool update, float? momentum, float eps, bool relu, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = register(
    "cbam_backward(Tensor dy, Tensor x, Tensor? w1, Tensor? w2, Tensor? b2, Tensor conv_weight, Tensor? weight, "
    "Tensor? bias, Tensor saved, Tensor argmax, Tensor z, Tensor spatial_argmax, Tensor mask, int pools, "
    "bool batch_statistics, bool relu, bool need_dresidual) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _CBAM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, w1, b1, w2, b2, conv_weight, weight, bias, residual, running_mean, running_var, batches,
        pool_types, batch_statistics, update, momentum, eps, relu,
    ):  # fmt: skip
        parameters = w1, b1, w2, b2, conv_weight, weight, bias
        y, *kept = forward_op(
            x, *parameters, running_mean, running_var, batches, residual,
            _channel.pool_bits(pool_types), batch_statistics, update, momentum, eps, relu, True,
        )  # fmt: skip
        save_tensors(ctx, x, *parameters, *kept)
        ctx.pool_types, ctx.batch_statistics, ctx.eps, ctx.relu = pool_types, batch_statistics, eps, relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, conv_weight, weight, bias, *kept = saved_tensors(ctx)
        no_options = (None,) * 9
        need_dresidual = ctx.needs_input_grad[8]
        if torch.is_grad_enabled():
            dy = unmask(dy, kept[-1], x) if ctx.relu else dy
            formula = _formula(ctx.pool_types, ctx.batch_statistics, ctx.eps, kept[2][-2:])
            inputs = (x, w1, b1, w2, b2, conv_weight, weight, bias)
            return *reference_gradients(formula, inputs, (dy,)), dy if need_dresidual else None, *no_options
        dx, dresidual, dw1, db1, dw2, db2, dconv, dweight, dbias = backward_op(
            dy, x, w1, w2, b2, conv_weight, weight, bias, *kept,
            _channel.pool_bits(ctx.pool_types), ctx.batch_statistics, ctx.relu, ctx.relu and need_dresidual,
        )  # fmt: skip
        return (
            dx,
            None if w1 is None else dw1,
            None if b1 is None else db1,
            None if w2 is None else dw2,
            None if b2 is None else db2,
            dconv,
            None if weight is None else dweight,
            None if bias is None else dbias,
            (dresidual if ctx.relu else dy) if need_dresidual else None,
            *no_options,
        )


def _formula(pool_types: Sequence[str], batch_statistics: bool, eps: float, statistics: Tensor):
    """The reference formula without the tail, by the statistics that the forward pass used."""

    def formula(x, w1, b1, w2, b2, conv_weight, weight, bias):
        def norm(z):
            affine = [t if t is None else t.to(z.dtype) for t in (weight, bias)]
            if batch_statistics:
                return F.batch_norm(z, None, None, *affine, training=True, eps=eps)
            z = (z - statistics[0]) * statistics[1]
            z = z if affine[0] is None else z * affine[0]
            return z if affine[1] is None else z + affine[1]

        u = x if w1 is None else channel_gate(x, w1, b1, w2, b2, pool_types=pool_types)
        return spatial_gate(u, conv_weight, norm)

    return formula


def is_fusable(norm: object) -> bool:
    """Whether the kernels can stand for this norm: a plain BatchNorm2d of one channel with its usual buffers."""
    return _norm.is_fusable(norm) and norm.num_features == 1


def cbam(
    x: Tensor,
    mlp: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    conv_weight: Tensor,
    norm: nn.BatchNorm2d,
    residual: Tensor | None,
    pool_types: Sequence[str],
    relu: bool,
) -> Tensor:
    """The fused operator, differentiable; ``mlp`` is four times None for the spatial gate alone.

    ``x`` and ``residual`` (N, C, H, W), dense in the same layout; ``norm`` as :func:`is_fusable` wants it. Its buffers
    are updated inside the kernels, once.
    """
    parameters = (*factors(x, *mlp), dense(conv_weight), norm.weight, norm.bias)
    buffers, options = _norm.buffers(norm), (*_norm.options(norm), relu)
    if needs_grad(x, *parameters, residual):
        return _CBAM.apply(x, *parameters, residual, *buffers, tuple(pool_types), *options)
    pools = _channel.pool_bits(pool_types)
    return forward_op(x, *parameters, *buffers, residual, pools, *options, False)[0]
