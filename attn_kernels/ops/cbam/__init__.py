"""CBAM: ``y = act(u * sigmoid(BN(conv([max_c u, mean_c u]))) + residual)`` with u = x * channel gate; or u = x alone.

Woo et al., ECCV 2018, equations 1 to 3. |x| is the bytes of x; maps of one value per pixel are small beside it.

Forward, 4 launches, 4|x| (+ |x| residual): the channel gates read x; the pools over the channels read it again; the
convolution and the batch's statistics on maps (see convolution.py); the scale reads x and writes y. u itself is never
written. Each walks over x in the other direction than the one before it, and finds in L2 what that read last. (Pools
that wait for the gates in one launch would read x from L2 alone: 3|x|. But programs that pool, wait and pool again are
few at a time, and took twice as long in the model, see benchmarks/NOTES.md.)
Backward, 5 launches, 5|x| (+ |x| dresidual): the channel gates again; the spatial gate's gradient, with its pools
again, reads dy and x; the convolution's backward, 2, on maps; the channel gate's, with the weights', reads dy and x, dy
again from L2, and writes dx.
Without the channel gate 3 launches, 3|x| and 4 launches, 4|x|.
Saved: x, O(N * C) of the channel gate, and two maps: the convolution's output and the index of the maximum; with ReLU
one bit per element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kernels.ops.cbam import backward
from attn_kernels.ops.cbam.backward import CbamGradients
from attn_kernels.ops.cbam.forward import Outputs, empty_outputs, launch_forward
from attn_kernels.ops.common import batch_norm
from attn_kernels.ops.common.batch_norm import Norm, NormOptions
from attn_kernels.ops.common.epilogue import residual_grad, unmask
from attn_kernels.ops.common.excite import Weights
from attn_kernels.ops.common.layout import dense, factors
from attn_kernels.ops.common.operator import (
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from attn_kernels.ops.common.pools import pool_bits
from reference.cbam import channel_gate, spatial_gate


def _allocate(
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
) -> Outputs:
    return empty_outputs(x, w1, pools, masked=relu and save)


def _launch(outputs: Outputs, x, w1, b1, w2, b2, conv_weight, *args) -> None:
    weight, bias, running_mean, running_var, batches, residual, pools, *options, relu, save = args
    norm, options = Norm(weight, bias, running_mean, running_var, batches), NormOptions(*options)
    weights = None if w1 is None else Weights(w1, b1, w2, b2)
    launch_forward(outputs, x, weights, conv_weight, norm, residual, pools, options, relu, save)
    if options.update:
        batch_norm.mark_updated(running_mean, running_var, batches)


def _allocate_backward(
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
    need_dresidual: bool,
) -> CbamGradients:
    return backward.empty_gradients(x, w1, w2, conv_weight, z, need_dresidual)


def _launch_backward(gradients: CbamGradients, dy, x, w1, w2, b2, *args) -> None:
    weights = None if w1 is None else Weights(w1, None, w2, b2)
    backward.launch(gradients, dy, x, weights, *args[:-1])


forward_op = register(
    "cbam(Tensor x, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor conv_weight, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, Tensor? residual, int pools, "
    "bool batch_statistics, bool update, float? momentum, float eps, bool relu, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate,
    _launch,
)
backward_op = register(
    "cbam_backward(Tensor dy, Tensor x, Tensor? w1, Tensor? w2, Tensor? b2, Tensor conv_weight, Tensor? weight, "
    "Tensor? bias, Tensor saved, Tensor argmax, Tensor z, Tensor spatial_argmax, Tensor mask, int pools, "
    "bool batch_statistics, bool need_dresidual) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


class _CBAM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        w1,
        b1,
        w2,
        b2,
        conv_weight,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        batches,
        pool_types,
        batch_statistics,
        update,
        momentum,
        eps,
        relu,
    ):
        parameters = w1, b1, w2, b2, conv_weight, weight, bias
        y, *saved = forward_op(
            x,
            *parameters,
            running_mean,
            running_var,
            batches,
            residual,
            pool_bits(pool_types),
            batch_statistics,
            update,
            momentum,
            eps,
            relu,
            True,
        )
        save_tensors(ctx, x, *parameters, *saved)
        ctx.pool_types, ctx.batch_statistics, ctx.eps, ctx.relu = pool_types, batch_statistics, eps, relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, conv_weight, weight, bias, *saved = saved_tensors(ctx)
        no_options = (None,) * 9
        need_dresidual = ctx.needs_input_grad[8]
        if torch.is_grad_enabled():
            dy = unmask(dy, saved[-1], x)
            formula = _formula(ctx.pool_types, ctx.batch_statistics, ctx.eps, saved[2][-2:])
            inputs = (x, w1, b1, w2, b2, conv_weight, weight, bias)
            return *reference_gradients(formula, inputs, (dy,)), dy if need_dresidual else None, *no_options
        dx, dresidual, dw1, db1, dw2, db2, dconv, dweight, dbias = backward_op(
            dy,
            x,
            w1,
            w2,
            b2,
            conv_weight,
            weight,
            bias,
            *saved,
            pool_bits(ctx.pool_types),
            ctx.batch_statistics,
            ctx.relu and need_dresidual,
        )
        return (
            dx,
            None if w1 is None else dw1,
            None if b1 is None else db1,
            None if w2 is None else dw2,
            None if b2 is None else db2,
            dconv,
            None if weight is None else dweight,
            None if bias is None else dbias,
            residual_grad(need_dresidual, dy, dresidual),
            *no_options,
        )


def _formula(pool_types: Sequence[str], batch_statistics: bool, eps: float, statistics: Tensor):
    """The reference formula without the epilogue, by the statistics that the forward pass used."""

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
    return batch_norm.is_fusable(norm) and norm.num_features == 1


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
    buffers, options = batch_norm.buffers(norm), (*batch_norm.options(norm), relu)
    if needs_grad(x, *parameters, residual):
        return _CBAM.apply(x, *parameters, residual, *buffers, tuple(pool_types), *options)
    pools = pool_bits(pool_types)
    return forward_op(x, *parameters, *buffers, residual, pools, *options, False)[0]
