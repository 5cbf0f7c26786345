"""SE and CBAM's channel gate: ``y = act(x * gate(sum over pools of fc2(act1(fc1(pool(x))))) + residual)``.

Hu et al., CVPR 2018, equations 2 to 4; Woo et al., ECCV 2018, equation 2. N = bytes of x.

Forward, 1 launch, 2N (+ N residual): x is read for the pools and, while it is still in L2 (see _phases.py), once more
for y.
Backward, 1 launch, 3N (+ N dresidual): dy and x are read for the gate's gradient, dy again from L2 for dx (x, too, for
lp and lse); the weights' gradients touch no full-size tensor.
Saved: x, and O(N * C): the hidden layer before its activation, the index of the maximum, lp and lse; one bit an element
with ReLU. Backward computes the gate and the other pools again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops._channel import (
    AVERAGE,
    empty_dweights,
    empty_saved,
    excite,
    forward_pointers,
    get_row,
    hidden_layer,
    is_joined,
    pool_bits,
    pool_count,
    pool_flags,
    pool_pointer,
    scratch_size,
    squeeze,
)
from attn_kernels.ops._channel_bwd import backward
from attn_kernels.ops._device import aligned, load_tile, store_tail
from attn_kernels.ops._launch import GATE_OPTIONS, channel_plan, tile_options
from attn_kernels.ops._library import (
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
from reference.cbam import POOLS
from reference.se import GATES, mlp


@triton.jit(do_not_specialize=["slots", "stamp", "phase", "N", "groups", "lead"], do_not_specialize_on_alignment=["S"])
def channel_gate_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    w1_ptr,  # (H, C)
    b1_ptr,  # (H,) or None
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    saved_ptr,  # pre (N, K, H), pool (N, L, C), written; or None
    argmax_ptr,  # (N, C), written if MAX, or None
    scratch_ptr,  # pre (N, K, H) if it is not saved, and all of forward_pointers, written
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
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    RELU: tl.constexpr,
    SINGLE: tl.constexpr,
    JOINED: tl.constexpr,
    SAMPLES: tl.constexpr,
    STAGES: tl.constexpr,
    PLANE_STAGES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """y = act(x * gate + residual). Reads x twice, the second time from L2 (and residual), writes y."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    K: tl.constexpr = AVG + MAX + LP + LSE
    J = tl.cdiv(C, BLOCK_C)
    hidden_items = tl.cdiv(SAMPLES * K * H, BLOCK_E)
    first_items = J * S
    second_items = hidden_items + first_items
    p_first = None
    given_up_ptr = None
    if SINGLE:
        second, group, item = work_item(tl.program_id(0), groups, lead, first_items, second_items, hidden_items)
        given_up_ptr = slots_pointer(scratch_ptr, slots)
        p_first = given_up_ptr + 1 + group * first_items
        p_hidden = given_up_ptr + 1 + groups * first_items + group * hidden_items
    else:
        second, group, item = phase_item(
            tl.program_id(0), phase, S, first_items, hidden_items, hidden_items, second_items
        )
    pool_ptr = None
    if saved_ptr is None:
        pre_ptr = scratch_ptr
        scratch_ptr = pool_pointer(scratch_ptr, N, H, K)
    else:
        pre_ptr = saved_ptr
        if LP or LSE:
            pool_ptr = pool_pointer(saved_ptr, N, H, K)
    parts = first_items
    if JOINED:
        parts = J
    part_ptr, stats_ptr, arg_ptr = forward_pointers(scratch_ptr, N, C, H, parts, S, K, MAX)
    given_up = phase < 0  # no
    if not second:
        squeeze(
            x_ptr, w1_ptr, stats_ptr, arg_ptr, pool_ptr, argmax_ptr, part_ptr, p_first, given_up_ptr, stamp, phase,
            group, item, N, C, P, H, S, CHUNK, AVG, MAX, LP, LSE, JOINED, SAMPLES, STAGES, CHANNELS_LAST, BLOCK_C,
            BLOCK_P, BLOCK_H,
        )  # fmt: skip
        if SINGLE:
            mark(p_first + item, stamp)
    elif item < hidden_items:
        if SINGLE:
            given_up = wait(p_first, first_items, given_up_ptr, stamp)
        hidden_layer(part_ptr, b1_ptr, pre_ptr, given_up, group, item, N, H, parts, K, SAMPLES, BLOCK_E)
        if SINGLE:
            mark(p_hidden + item, stamp)
    else:
        if SINGLE:
            given_up = wait(p_hidden, hidden_items, given_up_ptr, stamp)
        i_s = (item - hidden_items) % S
        c = (item - hidden_items) // S * BLOCK_C
        b_gates = excite(
            pre_ptr, w2_ptr, b2_ptr, None, given_up, group, c, N, C, H,
            K, ACTIVATION, GATE, SAMPLES, BLOCK_C, BLOCK_H,
        )  # fmt: skip
        # Tiles of one plane, or of one plane each.
        begin, end, STEP = i_s * CHUNK, tl.minimum(i_s * CHUNK + CHUNK, P), BLOCK_P
        if SAMPLES > 1:
            begin, end, STEP = 0, tl.minimum(SAMPLES, N - group * SAMPLES), 1
        else:
            i_n = tl.cast(group, tl.int64)
            b_gate = get_row(b_gates, 0)
        for t in tl.range(begin, end, STEP, num_stages=PLANE_STAGES):
            p = t
            if SAMPLES > 1:
                p = 0
                i_n = tl.cast(group * SAMPLES + t, tl.int64)
                b_gate = get_row(b_gates, t)
            b_x = load_tile(x_ptr, i_n, c, p, C, P, b_gate.dtype, CHANNELS_LAST, BLOCK_C, BLOCK_P, "evict_first")
            store_tail(
                b_x * b_gate[:, None], y_ptr, residual_ptr, mask_ptr, i_n, c, p, C, P, RELU, CHANNELS_LAST, BLOCK_C,
                BLOCK_P, "evict_first",
            )  # fmt: skip


def _launch_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    pools: int,
    activation: str,
    gate_name: str,
    relu: bool,
    saved: Tensor | None,
    argmax: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    n, c, h, w = x.shape
    hidden, k = w1.shape[0], pool_count(pools)
    plan = channel_plan(x, hidden, pools == AVERAGE)
    y = torch.empty_like(x)
    hidden_items = plan.groups * plan.hidden_items(k * hidden)
    parts = plan.groups * plan.items
    size = scratch_size(x, hidden, pools, plan) + (n * k * hidden if saved is None else 0)
    scratch, slots = empty_scratch(x, size, 1 + parts + hidden_items if plan.single_launch else 0)
    stamp = new_stamp()
    joined = is_joined(hidden, pools, plan)
    joins = plan.groups * plan.blocks if joined else 0
    for phase, programs in launches(plan.single_launch, parts, joins, hidden=hidden_items, rest=parts):
        channel_gate_kernel[(programs,)](
            x,
            residual,
            y,
            mask,
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
            **pool_flags(pools),
            ACTIVATION=activation,
            GATE=gate_name,
            RELU=relu,
            SINGLE=plan.single_launch,
            JOINED=joined,
            SAMPLES=plan.samples,
            STAGES=plan.stages,
            PLANE_STAGES=plan.plane_stages,
            BLOCK_H=plan.block_h,
            BLOCK_E=plan.block_e(k * hidden),
            **tile_options(x, plan.tile),
            maxnreg=plan.registers,
            **GATE_OPTIONS,
        )
    return y


def _inference(x, w1, b1, w2, b2, residual, pools, activation, gate_name, relu):
    return _launch_forward(x, w1, b1, w2, b2, residual, pools, activation, gate_name, relu, None, None, None)


def _inference_fake(x, *_):
    return torch.empty_like(x)


def _forward(x, w1, b1, w2, b2, residual, pools, activation, gate_name, relu):
    saved, argmax = empty_saved(x, w1.shape[0], pools)
    mask = empty_mask(x, relu)
    y = _launch_forward(
        x, w1, b1, w2, b2, residual, pools, activation, gate_name, relu, saved, argmax, mask if relu else None
    )
    return y, saved, argmax, mask


def _forward_fake(x, w1, b1, w2, b2, residual, pools, activation, gate_name, relu):
    return torch.empty_like(x), *empty_saved(x, w1.shape[0], pools), empty_mask(x, relu)


def _backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    saved: Tensor,
    argmax: Tensor,
    mask: Tensor,
    pools: int,
    activation: str,
    gate_name: str,
    relu: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = mask if relu else None
    dx, dresidual, *dweights = backward(
        like(dy, x), mask, x, None, None, w1, w2, b2, saved, argmax, pools, activation, gate_name, need_dresidual
    )
    return dx, x.new_empty(0) if dresidual is None else dresidual, *dweights


def _backward_fake(dy, x, w1, w2, b2, saved, argmax, mask, pools, activation, gate_name, relu, need_dresidual):
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    return torch.empty_like(x), dresidual, *empty_dweights(w1, w2)


_ARGUMENTS = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, int pools, str activation, str gate, "
    "bool relu)"
)
inference_op = register(f"channel_gate{_ARGUMENTS} -> Tensor", _inference, _inference_fake)
forward_op = register(f"channel_gate_forward{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake)
backward_op = register(
    "channel_gate_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? b2, Tensor saved, Tensor argmax, "
    "Tensor mask, int pools, str activation, str gate_name, bool relu, bool need_dresidual) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _ChannelGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, residual, pool_types, activation, gate_name, relu):
        options = pool_bits(pool_types), activation, gate_name, relu
        y, *kept = forward_op(x, w1, b1, w2, b2, residual, *options)
        save_tensors(ctx, x, w1, b1, w2, b2, *kept)
        ctx.pool_types, ctx.options = pool_types, options
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, *kept, mask = saved_tensors(ctx)
        _, activation, gate_name, relu = ctx.options
        need_dresidual = ctx.needs_input_grad[5]
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x) if relu else dy

            def formula(x, *parameters):
                logits = sum(mlp(POOLS[pool](x), *parameters, activation) for pool in ctx.pool_types)
                return x * GATES[gate_name](logits).to(x.dtype)[:, :, None, None]

            gradients = reference_gradients(formula, (x, w1, b1, w2, b2), (dy,))
            return *gradients, dy if need_dresidual else None, None, None, None, None
        dx, dresidual, dw1, db1, dw2, db2 = backward_op(
            dy, x, w1, w2, b2, *kept, mask, *ctx.options, relu and need_dresidual
        )
        return (
            dx,
            dw1,
            None if b1 is None else db1,
            dw2,
            None if b2 is None else db2,
            (dresidual if relu else dy) if need_dresidual else None,
            None,
            None,
            None,
            None,
        )


def channel_gate(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    pool_types: Sequence[str],
    mlp_activation: str,
    gate: str,
    relu: bool,
) -> Tensor:
    """The fused operator, differentiable; ``x`` and ``residual`` (N, C, H, W), dense in the same layout."""
    w1, b1, w2, b2 = factors(x, w1, b1, w2, b2)
    if needs_grad(x, w1, b1, w2, b2, residual):
        return _ChannelGate.apply(x, w1, b1, w2, b2, residual, tuple(pool_types), mlp_activation, gate, relu)
    pools = pool_bits(pool_types)
    return inference_op(x, w1, b1, w2, b2, residual, pools, mlp_activation, gate, relu)
