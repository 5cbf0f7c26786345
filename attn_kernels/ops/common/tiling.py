"""Launch configuration: tiles as pure functions of a tensor's ``Geometry``. No Triton here.

What one operator alone needs is in its own room. Thresholds are reasoned from bytes and machine code and not yet
measured on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from attn_kernels.ops.common import device
from attn_kernels.ops.common.layout import is_channels_last

# Elements of x that a program holds at once; each is a register for every accumulator that is kept lane by lane.
TILE = 4096
# Bytes of consecutive channels that a channels_last tile reads at least: one 32-byte DRAM sector.
SECTOR = 32
# Elements along the unit stride that a tile holds at least: one byte of the bits that a ReLU leaves.
BYTE = 8
# Stages of the loops that pool x, and of BatchNorm's, by bytes per element: one more than the tiles that are loaded
# ahead.
STAGES = {2: 4, 4: 3, 8: 1}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def vector_length(row: int, itemsize: int) -> int:
    """Elements of the widest load, of 16 bytes at most, that divides a row of ``row`` elements."""
    return min(row & -row, 16 // itemsize)


class Geometry(NamedTuple):
    """All that tiles depend on: a tensor (n, c, p) of ``itemsize`` bytes per element, and the GPU."""

    n: int
    c: int
    p: int
    itemsize: int
    channels_last: bool
    multiprocessors: int

    @property
    def row(self) -> int:
        """Elements along the unit stride."""
        return self.c if self.channels_last else self.p


def geometry(x: Tensor) -> Geometry:
    n, c, h, w = x.shape
    return Geometry(n, c, h * w, x.element_size(), is_channels_last(x), device.multiprocessors(x))


class Tile(NamedTuple):
    """``block_c`` channels by ``block_p`` pixels of one sample, and how a kernel handles them: its constexpr TILE.

    Attributes:
        unit: rows along the unit stride are a multiple of so many elements.
        stages: of the kernel's own loop over tiles, where it is pipelined.
        num_warps, num_stages, maxnreg: Triton's options of the launch.
    """

    channels_last: bool
    unit: int
    block_c: int
    block_p: int
    num_warps: int
    stages: int = 1
    num_stages: int = 3
    maxnreg: int | None = None

    @classmethod
    def of(cls, g: Geometry, block_c: int, block_p: int, num_warps: int = 0, thread_bytes: int = 64) -> Tile:
        """Unless ``num_warps`` is given: as many warps as leave each thread ``thread_bytes`` of x.

        Half of that where rows are not whole vectors. 64 bytes are four vectors.
        """
        thread_elements = max(thread_bytes // (1 if g.row * g.itemsize % 16 == 0 else 2), 16) // g.itemsize
        num_warps = num_warps or min(max(block_c * block_p // (32 * thread_elements), 1), 16)
        return cls(g.channels_last, vector_length(g.row, g.itemsize), block_c, block_p, num_warps)

    @property
    def options(self) -> dict[str, int | None]:
        """Triton's options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


@functools.lru_cache
def plane_tile(g: Geometry, split: bool = False) -> Tile:
    """For kernels that reduce or scale planes: a program owns ``block_c`` planes and walks along their pixels.

    Where planes are ``split`` among programs, fewer of them make enough programs.
    """
    if g.channels_last:
        # Rows of 256 bytes; of 64 where there would be too few programs, and of a sector where still too few.
        block_c, least = min(next_power_of_2(g.c), 256 // g.itemsize), max(SECTOR // g.itemsize, BYTE)
        least = max(least, next_power_of_2(cdiv(g.c, 128)))
    else:
        # Rows of 128 pixels, since every program reads CBAM's spatial maps along them; 32 channels. At most 64 blocks
        # of channels, since each leaves partials of fc1.
        least = next_power_of_2(cdiv(g.c, 64))
        block_c = min(max(TILE // min(next_power_of_2(g.p), 128), least), next_power_of_2(g.c))
    while block_c > least:
        enough = g.multiprocessors if g.channels_last and block_c * g.itemsize <= 64 else 3 * g.multiprocessors
        tiles = cdiv(g.p, max(TILE // block_c, 1)) if split else 1
        if g.n * cdiv(g.c, block_c) * tiles >= enough:
            break
        block_c //= 2
    block_c = max(block_c, BYTE) if g.channels_last else min(block_c, TILE // BYTE)
    block_p = min(max(next_power_of_2(g.p), BYTE), max(TILE // block_c, 1))
    return Tile.of(g, block_c, block_p)


@functools.lru_cache
def pixel_tile(g: Geometry) -> Tile:
    """For kernels that reduce or scale over channels: a program owns ``block_p`` pixels, walks along channels."""
    most_c = max(next_power_of_2(g.c), BYTE)
    # At least 8 pixels: the partial sums of a block of pixels, one per channel, are then an eighth of x.
    block_p, least = (32, 8) if g.channels_last else (128, max(SECTOR // g.itemsize, BYTE))
    block_p = max(min(max(block_p, TILE // most_c), next_power_of_2(g.p)), 1 if g.channels_last else BYTE)
    while block_p > least and g.n * cdiv(g.p, block_p) < 2 * g.multiprocessors:
        block_p //= 2
    return Tile.of(g, min(most_c, TILE // block_p), block_p)
