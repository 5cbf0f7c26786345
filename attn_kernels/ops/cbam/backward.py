"""The backward pass of CBAM: the spatial gate's gradient, then that of the channel gate, or of x alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.cbam import convolution
from attn_kernels.ops.cbam.forward import MLP, spatial_gate
from attn_kernels.ops.channel_gate.backward import Gradients, launch_backward, launch_gates
from attn_kernels.ops.common.epilogue import empty_dresidual, load_epilogue_grad, optional
from attn_kernels.ops.common.excite import Weights, empty_dweights
from attn_kernels.ops.common.gate_plan import channel_plan
from attn_kernels.ops.common.layout import like
from attn_kernels.ops.common.spatial_grad import SpatialGrad, gated_grad
from attn_kernels.ops.common.tile import (
    Place,
    aligned,
    at_channel,
    channels,
    load_elements,
    load_tile,
    pixel_block,
    store_tile,
)
from attn_kernels.ops.common.tiling import Geometry, Tile, cdiv, geometry, pixel_tile


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
    partial_ptr,  # (programs, 2), written: sums of dlogit and of dlogit * normalised z
    N,
    C,
    P,
    TILE: tl.constexpr,
):
    """dlogit[p] = gate' * sum_c dy * u of BLOCK_P pixels, its sums for BatchNorm, and the pools. Reads dy and x.

    From the last pixels back, so that the launch that reads dy and x next finds those of the first ones in L2.
    """
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    at = pixel_block(pid, C, P, TILE)
    i_n = at.sample
    o_p = at.pixel + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    b_mean = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_dy = load_epilogue_grad(dy_ptr, mask_ptr, None, at_channel(at, c), TILE)
        b_u = load_tile(x_ptr, at_channel(at, c), TILE)
        if gate_ptr is not None:
            b_u *= tl.load(gate_ptr + i_n * C + o_c, mask=o_c < C, other=0)[:, None]
        b_sum += b_dy * b_u
        b_mean += b_u
    b_argmax = tl.load(argmax_ptr + i_n * P + o_p, mask=m_p, other=0).to(tl.int32)
    b_max = load_elements(x_ptr, i_n, b_argmax, o_p, m_p, C, P, TILE)
    if gate_ptr is not None:
        b_max *= tl.load(gate_ptr + i_n * C + b_argmax, mask=m_p, other=0)
    p_pools = pools_ptr + i_n * P + o_p
    tl.store(p_pools, b_max, mask=m_p)
    tl.store(p_pools + tl.cast(N, tl.int64) * P, tl.sum(b_mean, axis=0) / C, mask=m_p)
    b_z = tl.load(z_ptr + i_n * P + o_p, mask=m_p, other=0)
    mean = tl.load(z_ptr + N * P)
    invstd = tl.load(z_ptr + N * P + 1)
    b_normal, b_gate = spatial_gate(b_z, mean, invstd, weight_ptr, bias_ptr)
    b_dlogit = tl.where(m_p, tl.sum(b_sum, axis=0) * b_gate * (1 - b_gate), 0.0)
    tl.store(spatial_ptr + i_n * 3 * P + o_p, b_gate, mask=m_p)
    tl.store(dlogit_ptr + i_n * P + o_p, b_dlogit, mask=m_p)
    tl.store(partial_ptr + pid * 2, tl.sum(b_dlogit, axis=0))
    tl.store(partial_ptr + pid * 2 + 1, tl.sum(tl.where(m_p, b_dlogit * b_normal, 0.0), axis=0))


@triton.jit(do_not_specialize_on_alignment=["S"])
def spatial_dx_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    spatial,  # SpatialGrad
    dx_ptr,  # (N, C, P), written
    dresidual_ptr,  # (N, C, P), written, or None
    C,
    P,
    S,  # parts of a plane
    chunk,  # pixels of a part
    TILE: tl.constexpr,
):
    """dx of a part of BLOCK_C planes, without a channel gate. Reads dy."""
    C, P = aligned(C, P, TILE)
    J = tl.cdiv(C, TILE.block_c)
    group = tl.program_id(0) // (J * S)
    task = tl.program_id(0) % (J * S)
    begin = task % S * chunk
    for p in range(begin, tl.minimum(begin + chunk, P), TILE.block_p):
        at = Place(tl.cast(group, tl.int64), task // S * TILE.block_c, p, C, P)
        b_dy = load_epilogue_grad(dy_ptr, mask_ptr, dresidual_ptr, at, TILE, "evict_first")
        b_dx = gated_grad(b_dy, spatial, at, channels(at, TILE), TILE)
        store_tile(b_dx, dx_ptr, at, TILE, "evict_first")


@functools.lru_cache
def dspatial_tile(g: Geometry) -> Tile:
    """For the spatial gate's gradient."""
    tile = pixel_tile(g)
    # Two programs of 8 warps fit; three of 4, which spilled with 128.
    return tile._replace(maxnreg=128 if tile.num_warps >= 8 else 168)


class CbamGradients(NamedTuple):
    """dx, and dy behind the ReLU or empty; of the MLP's weights, of the convolution's and of BatchNorm's."""

    dx: Tensor
    dresidual: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    conv_weight: Tensor
    weight: Tensor
    bias: Tensor


def empty_gradients(
    x: Tensor, w1: Tensor | None, w2: Tensor | None, conv_weight: Tensor, z: Tensor, need_dresidual: bool
) -> CbamGradients:
    dweights = [x.new_empty(0) for _ in range(4)] if w1 is None else empty_dweights(w1, w2)
    norm = z.new_empty(conv_weight.shape), z.new_empty(1), z.new_empty(1)
    return CbamGradients(torch.empty_like(x), empty_dresidual(x, need_dresidual), *dweights, *norm)


def launch(
    gradients: CbamGradients,
    dy: Tensor,
    x: Tensor,
    weights: Weights | None,
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
) -> None:
    """Fill ``gradients``; without weights there is no channel gate."""
    n, c, h, w = x.shape
    dy = like(dy, x)
    g = geometry(x)
    tile = dspatial_tile(g)
    programs = n * cdiv(h * w, tile.block_p)
    spatial, channel_pools, dlogit = z.new_empty((n, 3, h, w)), z.new_empty((2, n, h, w)), z.new_empty((n, h, w))
    partial = z.new_empty((programs, 2))
    scratch = None if weights is None else launch_gates(x, g, weights, saved, pools, MLP)
    dspatial_kernel[(programs,)](
        dy_ptr=dy,
        mask_ptr=optional(mask),
        x_ptr=x,
        gate_ptr=scratch and scratch[0],
        z_ptr=z,
        argmax_ptr=spatial_argmax,
        weight_ptr=weight,
        bias_ptr=bias,
        spatial_ptr=spatial,
        pools_ptr=channel_pools,
        dlogit_ptr=dlogit,
        partial_ptr=partial,
        N=n,
        C=c,
        P=h * w,
        TILE=tile,
        **tile.options,
    )
    convolution.launch_backward(
        gradients[6:], x, z, channel_pools, dlogit, partial, conv_weight, weight, spatial, batch_statistics
    )
    behind = SpatialGrad(spatial, spatial_argmax)
    if weights is None:
        _launch_dx(gradients, dy, mask, g, behind)
    else:
        channel = Gradients(*gradients[:6])
        launch_backward(channel, dy, mask, x, g, behind, weights, saved, argmax, pools, MLP, scratch)


def _launch_dx(gradients: CbamGradients, dy: Tensor, mask: Tensor, g: Geometry, spatial: SpatialGrad) -> None:
    plan = channel_plan(g, 0, dspatial=True)
    tile = plan.tile._replace(stages=1)
    spatial_dx_kernel[(g.n * plan.tasks,)](
        dy_ptr=dy,
        mask_ptr=optional(mask),
        spatial=spatial,
        dx_ptr=gradients.dx,
        dresidual_ptr=optional(gradients.dresidual),
        C=g.c,
        P=g.p,
        S=plan.splits,
        chunk=plan.chunk,
        TILE=tile,
        **tile.options,
    )
