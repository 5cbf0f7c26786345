"""SE and CBAM's channel gate: ``y = act(x * gate(sum over pools of fc2(act1(fc1(pool(x))))) + residual)``.

Hu et al., CVPR 2018, equations 2 to 4; Woo et al., ECCV 2018, equation 2. |x| is the bytes of x.

Forward, 1 launch, 2|x| (+ |x| residual): x is read for the pools and, while it is still in L2 (see grid_sync.py), once
more for y.
Backward, 1 launch, 3|x| (+ |x| dresidual): dy and x are read for the gate's gradient, dy again from L2 for dx (x, too,
for lp and lse); the weights' gradients touch no full-size tensor.
Saved: x, and O(N * C): the hidden layer's preactivation, the index of the maximum, lp and lse; one bit per element with
ReLU. Backward computes the gate and the other pools again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_kernels.ops.channel_gate.backward import Gradients, launch_backward
from attn_kernels.ops.channel_gate.forward import Outputs, launch_forward
from attn_kernels.ops.common.epilogue import empty_dresidual, empty_mask, residual_grad, unmask
from attn_kernels.ops.common.excite import Mlp, Weights, empty_dweights
from attn_kernels.ops.common.layout import factors, like
from attn_kernels.ops.common.operator import (
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from attn_kernels.ops.common.pools import empty_argmax, empty_saved, pool_bits
from attn_kernels.ops.common.spatial_grad import SpatialGrad
from attn_kernels.ops.common.tiling import geometry
from reference.cbam import POOLS
from reference.se import GATES
from reference.se import mlp as mlp_formula


def _allocate(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    pools: int,
    activation: str,
    gate: str,
    relu: bool,
) -> Outputs:
    saved = empty_saved(x, w1.shape[0], pools)
    return Outputs(torch.empty_like(x), saved, empty_argmax(x, pools), empty_mask(x, relu))


def _launch(outputs: Outputs, x, w1, b1, w2, b2, residual, pools, activation, gate, relu) -> None:
    launch_forward(outputs, x, Weights(w1, b1, w2, b2), residual, pools, Mlp(activation, gate), relu)


def _allocate_inference(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x)


def _launch_inference(y: Tensor, *args) -> None:
    _launch(Outputs(y), *args)


def _allocate_backward(
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
    gate: str,
    need_dresidual: bool,
) -> Gradients:
    return Gradients(torch.empty_like(x), empty_dresidual(x, need_dresidual), *empty_dweights(w1, w2))


def _launch_backward(
    gradients: Gradients, dy, x, w1, w2, b2, saved, argmax, mask, pools, activation, gate, need_dresidual
) -> None:
    weights, mlp = Weights(w1, None, w2, b2), Mlp(activation, gate)
    launch_backward(gradients, like(dy, x), mask, x, geometry(x), SpatialGrad(), weights, saved, argmax, pools, mlp)


_ARGUMENTS = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, int pools, str activation, str gate, "
    "bool relu)"
)
inference_op = register(f"channel_gate{_ARGUMENTS} -> Tensor", _allocate_inference, _launch_inference)
forward_op = register(f"channel_gate_forward{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)", _allocate, _launch)
backward_op = register(
    "channel_gate_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? b2, Tensor saved, Tensor argmax, "
    "Tensor mask, int pools, str activation, str gate, bool need_dresidual) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


class _ChannelGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, residual, pool_types, activation, gate, relu):
        options = pool_bits(pool_types), activation, gate
        y, *saved = forward_op(x, w1, b1, w2, b2, residual, *options, relu)
        save_tensors(ctx, x, w1, b1, w2, b2, *saved)
        ctx.pool_types, ctx.options, ctx.relu = pool_types, options, relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, *saved, mask = saved_tensors(ctx)
        _, activation, gate = ctx.options
        need_dresidual, no_options = ctx.needs_input_grad[5], (None,) * 4
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x)

            def formula(x, *parameters):
                logits = sum(mlp_formula(POOLS[pool](x), *parameters, activation) for pool in ctx.pool_types)
                return x * GATES[gate](logits).to(x.dtype)[:, :, None, None]

            gradients = reference_gradients(formula, (x, w1, b1, w2, b2), (dy,))
            return *gradients, dy if need_dresidual else None, *no_options
        dx, dresidual, dw1, db1, dw2, db2 = backward_op(
            dy, x, w1, w2, b2, *saved, mask, *ctx.options, ctx.relu and need_dresidual
        )
        dresidual = residual_grad(need_dresidual, dy, dresidual)
        db1, db2 = None if b1 is None else db1, None if b2 is None else db2
        return dx, dw1, db1, dw2, db2, dresidual, *no_options


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
    return inference_op(x, w1, b1, w2, b2, residual, pool_bits(pool_types), mlp_activation, gate, relu)
