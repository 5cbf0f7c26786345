"""Tiles on the device: where one is, its loads and stores.

A tile is [BLOCK_C, BLOCK_P], channels by pixels of one sample, in both layouts. ``TILE``, a ``tiling.Tile``, says which
axis has the unit stride, and the sizes. The offset of a sample is 64 bits wide, within a sample 32 (see
``functional.why_not``), which saves a register per element. A pointer may be None: the kernel is compiled without it.
``EVICT`` is a tile's eviction policy in L2: "evict_first" for data that the launch does not need again.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# The default of EVICT. Triton 3.6 compiles no plain string as a default.
NORMAL = tl.constexpr("")


class Place(NamedTuple):
    """Where a tile is in a tensor (N, C, P): its sample, of 64 bits, its first channel and its first pixel."""

    sample: tl.tensor
    channel: tl.tensor
    pixel: tl.tensor
    C: tl.tensor
    P: tl.tensor


@triton.jit
def aligned(C, P, TILE: tl.constexpr):
    """C and P, of which the compiler learns that rows along the unit stride are multiples of TILE.unit.

    Of multiples of 16 it knows by itself.
    """
    if TILE.unit > 1:
        if TILE.channels_last:
            C = C // TILE.unit * TILE.unit
        else:
            P = P // TILE.unit * TILE.unit
    return C, P


@triton.jit
def channel_block(pid, C, P, TILE: tl.constexpr):
    """The place of program pid, if a program owns BLOCK_C planes of a sample, of which blocks follow one another."""
    blocks = tl.cdiv(C, TILE.block_c)
    i_n = (pid // blocks).to(tl.int64)
    return Place(i_n, pid % blocks * TILE.block_c, 0, C, P)


@triton.jit
def pixel_block(pid, C, P, TILE: tl.constexpr):
    """The place of program pid, if a program owns BLOCK_P pixels of a sample, of which blocks follow one another."""
    blocks = tl.cdiv(P, TILE.block_p)
    i_n = (pid // blocks).to(tl.int64)
    return Place(i_n, 0, pid % blocks * TILE.block_p, C, P)


@triton.jit
def tile_of_all(t, c, C, P, TILE: tl.constexpr):
    """The place of the t-th tile of all samples, one after another, from channel c on."""
    blocks = tl.cdiv(P, TILE.block_p)
    return Place(tl.cast(t // blocks, tl.int64), c, t % blocks * TILE.block_p, C, P)


@triton.jit
def at_pixel(at, p):
    return Place(at.sample, at.channel, p, at.C, at.P)


@triton.jit
def at_channel(at, c):
    return Place(at.sample, c, at.pixel, at.C, at.P)


@triton.jit
def channels(at, TILE: tl.constexpr):
    """[BLOCK_C] channels of a tile."""
    return at.channel + tl.arange(0, TILE.block_c)


@triton.jit
def pixels(at, TILE: tl.constexpr):
    """[BLOCK_P] pixels of a tile."""
    return at.pixel + tl.arange(0, TILE.block_p)


@triton.jit
def tile_mask(at, TILE: tl.constexpr):
    """Whether the tensor has these elements, [BLOCK_C, BLOCK_P]."""
    o_c = channels(at, TILE)
    o_p = pixels(at, TILE)
    return (o_c < at.C)[:, None] & (o_p < at.P)[None, :]


@triton.jit
def tile_offsets(at, TILE: tl.constexpr):
    """Offsets within a sample, [BLOCK_C, BLOCK_P]."""
    o_c = channels(at, TILE)
    o_p = pixels(at, TILE)
    if TILE.channels_last:
        return o_p[None, :] * at.C + o_c[:, None]
    else:
        return o_c[:, None] * at.P + o_p[None, :]


@triton.jit
def load_tile(x_ptr, at, TILE: tl.constexpr, EVICT: tl.constexpr = NORMAL):
    """The tile of x in float32, or in float64 where x is; 0 outside."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    m = tile_mask(at, TILE)
    # The sample before the offsets: in another order ptxas takes up to 4 registers more.
    pointers = x_ptr + at.sample * at.C * at.P + tile_offsets(at, TILE)
    return tl.load(pointers, mask=m, other=0, eviction_policy=EVICT).to(ACC)


@triton.jit
def store_tile(b_x, x_ptr, at, TILE: tl.constexpr, EVICT: tl.constexpr = NORMAL):
    m = tile_mask(at, TILE)
    tl.store(x_ptr + at.sample * at.C * at.P + tile_offsets(at, TILE), b_x, mask=m, eviction_policy=EVICT)


@triton.jit
def load_elements(x_ptr, i_n, o_c, o_p, m, C, P, TILE: tl.constexpr):
    """x of sample i_n, one element at each channel o_c and pixel o_p where m, 0 elsewhere."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    offsets = o_p * C + o_c if TILE.channels_last else o_c * P + o_p
    return tl.load(x_ptr + i_n * C * P + offsets, mask=m, other=0).to(ACC)
