"""The backward pass of BAM: the gradients of both logits, then dx with the reducing convolution's."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.bam.forward import attention, reduced_tile
from attn_kernels.ops.common.epilogue import load_epilogue_grad, optional
from attn_kernels.ops.common.layout import like
from attn_kernels.ops.common.matmul import load_weight
from attn_kernels.ops.common.tile import (
    Place,
    aligned,
    at_channel,
    load_tile,
    pixel_block,
    store_tile,
    tile_of_all,
)
from attn_kernels.ops.common.tiling import Geometry, Tile, cdiv, geometry, next_power_of_2, pixel_tile


@triton.jit
def dlogits_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    channel_ptr,  # (N, C)
    spatial_ptr,  # (N, P)
    dresidual_ptr,  # (N, C, P), written, or None: dy behind the ReLU
    dchannel_ptr,  # (N, blocks, C), written: sums over the pixels of each block
    dspatial_ptr,  # (N, P), written
    C,
    P,
    WHOLE: tl.constexpr,  # BLOCK_C divides C
    TILE: tl.constexpr,
):
    """Both logits' gradients, of BLOCK_P pixels. Reads dy and x."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = dchannel_ptr.dtype.element_ty
    at = pixel_block(tl.program_id(0), C, P, TILE)
    o_p = at.pixel + tl.arange(0, BLOCK_P)
    # Logits are 1 outside the map: 0 times an infinite one would be NaN, and so would the sums.
    b_spatial = tl.load(spatial_ptr + at.sample * P + o_p, mask=o_p < P, other=1).to(ACC)
    p_dchannel = dchannel_ptr + (at.sample * tl.cdiv(P, BLOCK_P) + tl.program_id(0) % tl.cdiv(P, BLOCK_P)) * C
    b_dspatial = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for c in tl.range(0, C, BLOCK_C, num_stages=2):
        o_c = c + tl.arange(0, BLOCK_C)
        b_dy = load_epilogue_grad(dy_ptr, mask_ptr, dresidual_ptr, at_channel(at, c), TILE)
        b_x = load_tile(x_ptr, at_channel(at, c), TILE)
        b_channel, b_gate = attention(channel_ptr, b_spatial, at.sample, o_c, C, 0 if WHOLE else 1)
        b_dlogit = b_dy * b_x * b_gate * (1 - b_gate)
        b_dspatial += b_dlogit * b_channel[:, None]
        tl.store(p_dchannel + o_c, tl.sum(b_dlogit * b_spatial[None, :], axis=1), mask=o_c < C)
    tl.store(dspatial_ptr + at.sample * P + o_p, tl.sum(b_dspatial, axis=0), mask=o_p < P)


@triton.jit
def dx_kernel(
    dy_ptr,  # (N, C, P), behind the ReLU
    x_ptr,  # (N, C, P)
    channel_ptr,  # (N, C)
    spatial_ptr,  # (N, P)
    dreduced_ptr,  # (N, R, P), in x's layout
    weight_ptr,  # (R, C)
    dmean_ptr,  # (N, C)
    dx_ptr,  # (N, C, P), written
    dparameters_ptr,  # (programs, R * C + R), written: sums of both gradients over the tiles of each program
    N,
    C,
    P,
    R,
    TILE: tl.constexpr,
    REDUCED: tl.constexpr,  # the tile of dreduced
):
    """dx = dy * (1 + gate) + dmean / P + weight^T @ dreduced, and the weight's gradient, for BLOCK_C channels.

    Reads dy and x, writes dx (again for each BLOCK_R units, of which there is one block as a rule).
    """
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_R: tl.constexpr = REDUCED.block_c
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = dmean_ptr.dtype.element_ty
    # Products of 16-bit operands are exact in tf32. In 16 bits Triton 3.6 fails to compile this loop on sm_90.
    PRECISION: tl.constexpr = "tf32" if x_ptr.dtype.element_ty.primitive_bitwidth == 16 else "ieee"
    i_q = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C
    o_c = c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    for r in range(0, R, BLOCK_R):
        if r > 0:
            tl.debug_barrier()  # other threads of this program stored the dx that is read below
        o_r = r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        # Rounded to x's dtype, in which the reference convolves.
        b_weight = load_weight(weight_ptr, o_r, o_c, R, C, x_ptr.dtype.element_ty).to(ACC)
        b_dweight = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        b_dbias = tl.zeros([BLOCK_R], ACC)
        for t in range(i_q, N * tl.cdiv(P, TILE.block_p), tl.num_programs(1)):
            at = tile_of_all(t, c, C, P, TILE)
            o_p = at.pixel + tl.arange(0, TILE.block_p)
            b_dreduced = load_tile(dreduced_ptr, Place(at.sample, r, at.pixel, R, P), REDUCED)
            b_dbias += tl.sum(b_dreduced, axis=1)
            b_x = load_tile(x_ptr, at, TILE)
            b_dweight += tl.dot(b_dreduced, tl.trans(b_x), input_precision=PRECISION, out_dtype=ACC)
            b_dx = tl.dot(tl.trans(b_weight), b_dreduced, input_precision=PRECISION, out_dtype=ACC)
            if r == 0:
                b_spatial = tl.load(spatial_ptr + at.sample * P + o_p, mask=o_p < P, other=0).to(ACC)
                _, b_gate = attention(channel_ptr, b_spatial, at.sample, o_c, C)
                b_dy = load_tile(dy_ptr, at, TILE)
                b_dmean = tl.load(dmean_ptr + at.sample * C + o_c, mask=m_c, other=0) / P
                b_dx += b_dy * (1 + b_gate) + b_dmean[:, None]
            else:
                b_dx += load_tile(dx_ptr, at, TILE)
            store_tile(b_dx, dx_ptr, at, TILE)
        p_dweight = dparameters_ptr + tl.cast(i_q, tl.int64) * R * (C + 1)
        tl.store(p_dweight + o_r[:, None] * C + o_c[None, :], b_dweight, mask=m_r[:, None] & m_c[None, :])
        tl.store(p_dweight + R * C + o_r, b_dbias, mask=o_r < tl.where(c == 0, R, 0))


@functools.lru_cache
def dx_tile(g: Geometry, hidden: int) -> tuple[Tile, int, int]:
    """A program owns ``block_c`` channels; units at once; and programs that share the pixels."""
    if g.itemsize == 8:
        tile = Tile.of(g, 16, 16, num_warps=4)._replace(num_stages=2, maxnreg=168)
        return tile, 16, min(g.n * cdiv(g.p, 16), 4)
    block_r = min(max(next_power_of_2(hidden), 16), 64)
    # Three programs of 4 warps run at once, in 168 registers per thread, which larger tiles spill on sm_80. No program
    # more than that: it would begin when all others end. Beside many units rows of 128 bytes, for each block of
    # channels reads all of dreduced.
    block_c, block_p = (128 // g.itemsize, 16) if block_r == 64 else (64 // g.itemsize, 32)
    block_p = min(max(next_power_of_2(g.p), 16), block_p)
    programs = min(g.n * cdiv(g.p, block_p), max(3 * g.multiprocessors // cdiv(g.c, block_c), 1))
    return Tile.of(g, block_c, block_p, num_warps=4)._replace(num_stages=2, maxnreg=168), block_r, programs


def launch_dlogits(
    gradients: tuple[Tensor, Tensor, Tensor], dy: Tensor, x: Tensor, channel: Tensor, spatial: Tensor, mask: Tensor
) -> None:
    """Fill the gradients of both logits, the channels' in x's accumulation dtype, and dy behind the ReLU."""
    n, c, h, w = x.shape
    dchannel, dspatial, dresidual = gradients
    tile = pixel_tile(geometry(x))
    tile = tile._replace(maxnreg={2: 128}.get(x.element_size()))  # programs of 4 warps fit four times
    blocks = cdiv(h * w, tile.block_p)
    dchannels = dchannel.new_empty((n, blocks, c))
    dlogits_kernel[(n * blocks,)](
        dy_ptr=like(dy, x),
        mask_ptr=optional(mask),
        x_ptr=x,
        channel_ptr=channel,
        spatial_ptr=spatial,
        dresidual_ptr=optional(dresidual),
        dchannel_ptr=dchannels,
        dspatial_ptr=dspatial,
        C=c,
        P=h * w,
        WHOLE=c % tile.block_c == 0,
        TILE=tile,
        **tile.options,
    )
    torch.sum(dchannels, 1, out=dchannel)


def launch_dx(
    gradients: tuple[Tensor, Tensor],
    dy: Tensor,
    x: Tensor,
    channel: Tensor,
    spatial: Tensor,
    dmean: Tensor,
    dreduced: Tensor,
    weight: Tensor,
) -> None:
    """Fill dx, and the gradients of the weight and of the bias behind it, in x's accumulation dtype."""
    n, c, h, w = x.shape
    dx, dparameters = gradients
    hidden = weight.shape[0]
    tile, block_r, programs = dx_tile(geometry(x), hidden)
    partial = dparameters.new_empty((programs, hidden * (c + 1)))
    dx_kernel[(cdiv(c, tile.block_c), programs)](
        dy_ptr=dy,
        x_ptr=x,
        channel_ptr=channel,
        spatial_ptr=spatial,
        dreduced_ptr=dreduced,
        weight_ptr=weight,
        dmean_ptr=dmean,
        dx_ptr=dx,
        dparameters_ptr=partial,
        N=n,
        C=c,
        P=h * w,
        R=hidden,
        TILE=tile,
        REDUCED=reduced_tile(tile, block_r),
        **tile.options,
    )
    torch.sum(partial, 0, out=dparameters)
