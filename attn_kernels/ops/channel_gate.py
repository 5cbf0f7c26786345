"""SE and CBAM's channel gate: ``y = act(x * gate(sum over pools of fc2(act1(fc1(pool(x))))) + residual)``.

Hu et al., CVPR 2018, equations 2 to 4; Woo et al., ECCV 2018, equation 2. N = bytes of x.

Forward, 1 launch, 2N (+ N residual): x is read for the pools and, while it is still in L2 (see _tickets.py), once more
for y.
Backward, 2 launches, 3N (+ N dresidual): dy and x are read for the gate's gradient, dy again from L2 for dx (x, too,
for lp and lse); the weights' gradients touch no full-size tensor.
Saved: x, and O(N * C): the pools, the hidden layer before its activation, the gate; one bit an element with ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._channel import (
    empty_dweights,
    empty_saved,
    empty_stats,
    excite,
    get_row,
    hidden_layer,
    pool_bits,
    pool_flags,
    squeeze,
)
from attn_kernels.ops._channel_bwd import backward
from attn_kernels.ops._device import aligned, load_tile, store_tail
from attn_kernels.ops._launch import channel_plan, tile_options
from attn_kernels.ops._library import (
    contiguous,
    empty_mask,
    like,
    needs_grad,
    reference_gradients,
    register,
    unmask,
)
from attn_kernels.ops._tickets import counters, flag, signal, take_ticket, wait, work_item
from reference.cbam import POOLS
from reference.se import GATES, mlp


@triton.jit(do_not_specialize=["N", "groups", "lead"])
def channel_gate_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    w1_ptr,  # (H, C)
    b1_ptr,  # (H,) or None
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    stats_ptr,  # (N, S, Q, C), written, or None if S = 1
    arg_ptr,  # (N, S, C), written, or None
    pool_ptr,  # (N, K, C), written, or None
    argmax_ptr,  # (N, C), written if MAX, or None
    part_ptr,  # (N, J, K, H), written
    pre_ptr,  # (N, K, H), written
    gate_ptr,  # (N, C), written, or None
    counters_ptr,
    N,
    groups,
    lead,
    C,
    P,
    H,
    CHUNK,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    RELU: tl.constexpr,
    SAMPLES: tl.constexpr,
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
    S = tl.cdiv(P, CHUNK)
    hidden_items = tl.cdiv(SAMPLES * K * H, BLOCK_E)
    ticket = take_ticket(counters_ptr)
    second, group, item = work_item(ticket, groups, lead, J * S, hidden_items + J * S, hidden_items)
    if not second:
        squeeze(
            x_ptr, w1_ptr, stats_ptr, arg_ptr, pool_ptr, argmax_ptr, part_ptr, counters_ptr,
            groups, group, item, N, C, P, H, CHUNK,
            AVG, MAX, LP, LSE, part_ptr.dtype.element_ty, SAMPLES, CHANNELS_LAST, BLOCK_C, BLOCK_P, BLOCK_H,
        )  # fmt: skip
        signal(flag(counters_ptr, groups, 0, group))
    elif item < hidden_items:
        wait(flag(counters_ptr, groups, 0, group), J * S)
        hidden_layer(part_ptr, b1_ptr, pre_ptr, group, item, N, H, J, K, SAMPLES, BLOCK_E)
        signal(flag(counters_ptr, groups, 1, group))
    else:
        item -= hidden_items
        i_s = item % S
        c = item // S * BLOCK_C
        wait(flag(counters_ptr, groups, 1, group), hidden_items)
        b_gates = excite(
            pre_ptr, w2_ptr, b2_ptr, gate_ptr, group, c, i_s == 0, N, C, H,
            K, ACTIVATION, GATE, SAMPLES, BLOCK_C, BLOCK_H,
        )  # fmt: skip
        for row in range(0, tl.minimum(SAMPLES, N - group * SAMPLES)):
            i_n = tl.cast(group * SAMPLES + row, tl.int64)
            b_gate = get_row(b_gates, row)
            for p in range(i_s * CHUNK, tl.minimum(i_s * CHUNK + CHUNK, P), BLOCK_P):
                b_x = load_tile(x_ptr, i_n, c, p, C, P, b_gate.dtype, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                b_y = b_x * b_gate[:, None]
                store_tail(b_y, y_ptr, residual_ptr, mask_ptr, i_n, c, p, C, P, RELU, CHANNELS_LAST, BLOCK_C, BLOCK_P)


def _forward(
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    hidden = w1.shape[0]
    plan = channel_plan(x, hidden)
    y, mask = torch.empty_like(x), empty_mask(x, relu and save)
    pool, argmax, pre, gate = empty_saved(x, w1, pools)
    middle = plan.hidden_items(pool.shape[1] * hidden)
    channel_gate_kernel[(plan.groups * (2 * plan.items + middle),)](
        x,
        residual,
        y,
        mask if relu and save else None,
        w1,
        b1,
        w2,
        b2,
        *empty_stats(x, plan, pools),
        pool if save else None,
        argmax if save else None,
        pool.new_empty((n, plan.blocks, pool.shape[1], hidden)),
        pre,
        gate if save else None,
        counters(x, plan),
        n,
        plan.groups,
        plan.lead,
        c,
        h * w,
        hidden,
        plan.chunk,
        **pool_flags(pools),
        ACTIVATION=activation,
        GATE=gate_name,
        RELU=relu,
        SAMPLES=plan.samples,
        BLOCK_H=plan.block_h,
        BLOCK_E=config.HIDDEN_ELEMENTS,
        **tile_options(x, plan.tile),
        maxnreg=128,
    )
    return y, pool, argmax, pre, gate, mask


def _forward_fake(x, w1, b1, w2, b2, residual, pools, activation, gate_name, relu, save):
    return torch.empty_like(x), *empty_saved(x, w1, pools), empty_mask(x, relu and save)


def _backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pool: Tensor,
    argmax: Tensor,
    pre: Tensor,
    gate: Tensor,
    mask: Tensor,
    pools: int,
    activation: str,
    gate_name: str,
    relu: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual, *dweights = backward(
        like(dy, x),
        mask if relu else None,
        x,
        None,
        None,
        w1,
        w2,
        pool,
        argmax,
        pre,
        gate,
        pools,
        activation,
        gate_name,
        need_dresidual,
    )
    return dx, x.new_empty(0) if dresidual is None else dresidual, *dweights


def _backward_fake(dy, x, w1, w2, pool, argmax, pre, gate, mask, pools, activation, gate_name, relu, need_dresidual):
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    return torch.empty_like(x), dresidual, *empty_dweights(w1, w2)


forward_op = register(
    "channel_gate(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, int pools, str activation, "
    "str gate, bool relu, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = register(
    "channel_gate_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor pool, Tensor argmax, Tensor pre, "
    "Tensor gate, Tensor mask, int pools, str activation, str gate_name, bool relu, bool need_dresidual) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _ChannelGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, residual, pool_types, activation, gate_name, relu):
        options = pool_bits(pool_types), activation, gate_name, relu
        y, *saved = forward_op(x, w1, b1, w2, b2, residual, *options, True)
        ctx.save_for_backward(x, w1, b1, w2, b2, *saved)
        ctx.pool_types, ctx.options = pool_types, options
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, pool, argmax, pre, gate, mask = ctx.saved_tensors
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
            dy, x, w1, w2, pool, argmax, pre, gate, mask, *ctx.options, relu and need_dresidual
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
    w1, b1, w2, b2 = contiguous(w1, b1, w2, b2)
    if needs_grad(x, w1, b1, w2, b2, residual):
        return _ChannelGate.apply(x, w1, b1, w2, b2, residual, tuple(pool_types), mlp_activation, gate, relu)
    pools = pool_bits(pool_types)
    return forward_op(x, w1, b1, w2, b2, residual, pools, mlp_activation, gate, relu, False)[0]
