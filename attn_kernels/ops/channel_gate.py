"""SE and CBAM's channel gate: ``y = act(x * gate(sum over pools of fc2(act1(fc1(pool(x))))) + residual)``.

Hu et al., CVPR 2018, equations 2 to 4; Woo et al., ECCV 2018, equation 2. N = bytes of x.

Forward, 2 launches, 3N (+ N residual): the squeeze reads x; the scale reads x and writes y.
Backward, 3 launches, 4N (+ N dresidual): the gate's gradient reads dy and x; dx reads dy and writes dx (lp and lse
read x again); the weights' gradients touch no full-size tensor.
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
    backward,
    empty_dweights,
    empty_saved,
    excite,
    pool_bits,
    pool_count,
    squeeze,
)
from attn_kernels.ops._device import aligned, load_tile, store_tail
from attn_kernels.ops._launch import plane_chunk, plane_tile, tile_options
from attn_kernels.ops._library import (
    contiguous,
    empty_mask,
    like,
    needs_grad,
    reference_gradients,
    register,
    unmask,
)
from reference.cbam import POOLS
from reference.se import GATES, mlp


@triton.jit
def scale_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    part_ptr,  # (N, J, K, H)
    b1_ptr,  # (H,) or None
    w2_ptr,  # (C, H)
    b2_ptr,  # (C,) or None
    pre_ptr,  # (N, K, H), written, or None
    gate_ptr,  # (N, C), written, or None
    C,
    P,
    H,
    J,
    CHUNK,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y = act(x * gate + residual) for BLOCK_C planes and CHUNK pixels. Reads x (and residual), writes y."""
    C, P = aligned(C, P, UNIT, CHANNELS_LAST)
    blocks = tl.cdiv(C, BLOCK_C)
    splits = tl.cdiv(P, CHUNK)
    pid = tl.program_id(0)
    i_n = (pid // (blocks * splits)).to(tl.int64)
    i_c = pid // splits % blocks
    i_s = pid % splits
    c = i_c * BLOCK_C
    first = (i_c == 0) & (i_s == 0)
    b_gate = excite(
        part_ptr, b1_ptr, w2_ptr, b2_ptr, pre_ptr, gate_ptr, i_n, c, first, i_s == 0, C, H, J,
        K, ACTIVATION, GATE, BLOCK_C, BLOCK_H,
    )  # fmt: skip
    for p in range(i_s * CHUNK, min(i_s * CHUNK + CHUNK, P), BLOCK_P):
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
    hidden, k = w1.shape[0], pool_count(pools)
    pool, argmax, part = squeeze(x, w1, pools)
    y, pre, gate = torch.empty_like(x), pool.new_empty((n, k, hidden)), pool.new_empty((n, c))
    mask = empty_mask(x, relu and save)
    tile = plane_tile(x)
    chunk, splits = plane_chunk(x, tile)
    scale_kernel[(n * config.cdiv(c, tile.block_c) * splits,)](
        x,
        residual,
        y,
        mask if relu and save else None,
        part,
        b1,
        w2,
        b2,
        pre if save else None,
        gate if save else None,
        c,
        h * w,
        hidden,
        part.shape[1],
        chunk,
        K=k,
        ACTIVATION=activation,
        GATE=gate_name,
        RELU=relu,
        BLOCK_H=config.hidden_block(hidden, tile.block_c),
        **tile_options(x, tile),
        # It needs 112: left to itself, ptxas spills 8 or 16 bytes for the sake of a higher occupancy.
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
