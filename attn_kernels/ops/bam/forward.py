"""The forward pass of BAM: the squeeze, and the scale by both logits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common.epilogue import optional, store_epilogue
from attn_kernels.ops.common.layout import is_channels_last
from attn_kernels.ops.common.matmul import load_weight
from attn_kernels.ops.common.tile import Place, aligned, at_channel, load_tile, pixel_block, store_tile
from attn_kernels.ops.common.tiling import Geometry, Tile, cdiv, geometry, next_power_of_2, pixel_tile
from reference._common import accumulation_dtype

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# A default as Triton 3.6 compiles it.
ZERO = tl.constexpr(0)


@triton.jit
def attention(channel_ptr, b_spatial, i_n, o_c, C, OUTSIDE: tl.constexpr = ZERO):
    """The channel logits, OUTSIDE from C on, and the gate of a tile."""
    b_channel = tl.load(channel_ptr + i_n * C + o_c, mask=o_c < C, other=OUTSIDE).to(b_spatial.dtype)
    return b_channel, tl.sigmoid(b_channel[:, None] * b_spatial[None, :])


@triton.jit
def apply_fwd_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    channel_ptr,  # (N, C)
    spatial_ptr,  # (N, P)
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    C,
    P,
    RELU: tl.constexpr,
    TILE: tl.constexpr,
):
    """y of BLOCK_P pixels. Reads x (and residual), writes y."""
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    # Last pixels first: L2 may still hold what squeeze_kernel read last.
    at = pixel_block(tl.num_programs(0) - 1 - tl.program_id(0), C, P, TILE)
    o_p = at.pixel + tl.arange(0, TILE.block_p)
    b_spatial = tl.load(spatial_ptr + at.sample * P + o_p, mask=o_p < P, other=0).to(ACC)
    for c in range(0, C, TILE.block_c):
        _, b_gate = attention(channel_ptr, b_spatial, at.sample, c + tl.arange(0, TILE.block_c), C)
        b_y = load_tile(x_ptr, at_channel(at, c), TILE) * (1 + b_gate)
        store_epilogue(b_y, y_ptr, residual_ptr, mask_ptr, at_channel(at, c), RELU, TILE)


@triton.jit
def _product(b_weight, b_x, ACC: tl.constexpr):
    """The matrix product of operands in x's dtype, which tensor cores take as they are: 16-bit ones lose nothing."""
    if INTERPRETED:  # it would multiply the bits of bfloat16
        b_weight = b_weight.to(ACC)
        b_x = b_x.to(ACC)
    return tl.dot(b_weight, b_x, input_precision="ieee", out_dtype=ACC)


@triton.jit
def squeeze_kernel(
    x_ptr,  # (N, C, P)
    weight_ptr,  # (R, C)
    bias_ptr,  # (R,) or None
    reduced_ptr,  # (N, R, P), in x's layout, written
    mean_ptr,  # (N, blocks, C), written: sums over the pixels of each block, divided by P
    C,
    P,
    R,
    TILE: tl.constexpr,
    REDUCED: tl.constexpr,  # the tile of reduced
):
    """The reducing convolution and the channels' means of BLOCK_P pixels. Reads x (again for each BLOCK_R units)."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    BLOCK_R: tl.constexpr = REDUCED.block_c
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    X: tl.constexpr = x_ptr.dtype.element_ty
    at = pixel_block(tl.program_id(0), C, P, TILE)
    p_mean = mean_ptr + (at.sample * tl.cdiv(P, BLOCK_P) + tl.program_id(0) % tl.cdiv(P, BLOCK_P)) * C
    for r in range(0, R, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        b_reduced = tl.zeros([BLOCK_R, BLOCK_P], ACC)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            b_x = load_tile(x_ptr, at_channel(at, c), TILE)
            b_reduced += _product(load_weight(weight_ptr, o_r, o_c, R, C, X), b_x.to(X), ACC)
            if r == 0:
                tl.store(p_mean + o_c, tl.sum(b_x, axis=1) / P, mask=o_c < C)
        if bias_ptr is not None:
            b_bias = tl.load(bias_ptr + o_r, mask=o_r < R, other=0).to(X)  # as the reference does
            b_reduced += b_bias.to(ACC)[:, None]
        # A reduced map is a sample of R channels in x's layout.
        store_tile(b_reduced, reduced_ptr, Place(at.sample, r, at.pixel, R, P), REDUCED)


def reduced_tile(tile: Tile, block_r: int) -> Tile:
    """For the same pixels of the reduced map as a tile of x, ``block_r`` units of it."""
    return tile._replace(block_c=block_r)


@functools.lru_cache
def squeeze_tile(g: Geometry, hidden: int) -> tuple[Tile, int]:
    """For the reducing convolution: a program owns ``block_p`` pixels; and the units that it computes at once."""
    if g.itemsize == 8:
        return Tile.of(g, 16, 16, num_warps=4)._replace(num_stages=2, maxnreg=168), 16
    # More units or pixels at once spill: 128 registers are what two programs of 8 warps leave each other.
    block_r = min(max(next_power_of_2(hidden), 16), 64)
    # The sums of a block of pixels, for the means, are 1/64 of what it reads and less.
    block_p = min(max(next_power_of_2(g.p), 16), 8192 // (block_r * g.itemsize), 128)
    while block_p > 8 * g.itemsize and g.n * cdiv(g.p, block_p) < g.multiprocessors:
        block_p //= 2
    # 128 bytes of consecutive channels; in half precision 256 where blocks of pixels are small: fewer steps. 8 warps
    # where each thread still has a vector of x.
    row = 256 if g.itemsize == 2 and block_p <= 32 else 128
    num_warps = 8 if block_r * block_p >= 2048 and block_p >= 32 else 4
    tile = Tile.of(g, row // g.itemsize, block_p, num_warps)
    stages = 3 if g.itemsize == 2 and block_r * block_p <= 2048 else 2  # more spill
    return tile._replace(num_stages=stages, maxnreg=168 if num_warps == 4 else 128), block_r


class Squeezed(NamedTuple):
    """The channels' means (N, C), in x's accumulation dtype, and the reduced map (N, R, H, W) like x."""

    mean: Tensor
    reduced: Tensor


def empty_squeezed(x: Tensor, weight: Tensor) -> Squeezed:
    n, c, h, w = x.shape
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    reduced = torch.empty((n, weight.shape[0], h, w), dtype=x.dtype, device=x.device, memory_format=layout)
    return Squeezed(x.new_empty((n, c), dtype=accumulation_dtype(x)), reduced)


def launch_squeeze(outputs: Squeezed, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    n, c, h, w = x.shape
    hidden = weight.shape[0]
    tile, block_r = squeeze_tile(geometry(x), hidden)
    blocks = cdiv(h * w, tile.block_p)
    means = outputs.mean.new_empty((n, blocks, c))
    squeeze_kernel[(n * blocks,)](
        x_ptr=x,
        weight_ptr=weight.to(x.dtype),  # in the kernel, that costs registers that it has not
        bias_ptr=bias,
        reduced_ptr=outputs.reduced,
        mean_ptr=means,
        C=c,
        P=h * w,
        R=hidden,
        TILE=tile,
        REDUCED=reduced_tile(tile, block_r),
        **tile.options,
    )
    torch.sum(means, 1, out=outputs.mean)


def launch_apply(
    outputs: tuple[Tensor, Tensor], x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, relu: bool
) -> None:
    """Fill y and the ReLU's bits."""
    n, c, h, w = x.shape
    y, mask = outputs
    tile = pixel_tile(geometry(x))
    apply_fwd_kernel[(n * cdiv(h * w, tile.block_p),)](
        x_ptr=x,
        residual_ptr=residual,
        channel_ptr=channel,
        spatial_ptr=spatial,
        y_ptr=y,
        mask_ptr=optional(mask),
        C=c,
        P=h * w,
        RELU=relu,
        TILE=tile,
        **tile.options,
    )
