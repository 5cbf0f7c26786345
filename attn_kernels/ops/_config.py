"""Launch configuration: pure functions of shape, layout, element size and number of multiprocessors. No Triton here.

Thresholds are reasoned from bytes and machine code and not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elements of x that a program holds at once: 32 a thread in 4 warps, that is four 16-byte loads of a 16-bit dtype in
# flight, and 32 registers for each fp32 accumulator that is kept lane by lane.
TILE = 4096
# Bytes of consecutive channels that a channels_last tile reads at least: one 32-byte DRAM sector.
SECTOR = 32


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Tile:
    """``block_c`` channels by ``block_p`` pixels of one sample, in ``num_warps`` warps."""

    block_c: int
    block_p: int
    num_warps: int

    @classmethod
    def of(cls, block_c: int, block_p: int, vector: bool = True) -> Tile:
        """32 elements a thread; 16 where rows are not whole 16-byte vectors and each load has registers of its own."""
        return cls(block_c, block_p, min(max(block_c * block_p // (1024 if vector else 512), 1), 16))


def is_vector(c: int, p: int, itemsize: int, channels_last: bool) -> bool:
    """Whether the rows along the unit stride consist of whole 16-byte vectors."""
    return (c if channels_last else p) * itemsize % 16 == 0


def plane_tile(n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int) -> Tile:
    """For kernels that reduce or scale planes: a program owns ``block_c`` planes and walks along their pixels."""
    if channels_last:
        # Two sectors a pixel where there are programs enough, one where there are not.
        block_c = min(next_power_of_2(c), 128 // itemsize * 2 if c * p >= TILE else 128 // itemsize)
        least = max(SECTOR // itemsize, 8)
    else:
        # Whole rows up to 1,024 pixels; at most 64 blocks, since each leaves a partial product of fc1 to be summed.
        block_c = max(TILE // min(next_power_of_2(p), 1024), next_power_of_2(cdiv(c, 64)))
        block_c, least = min(block_c, next_power_of_2(c)), next_power_of_2(cdiv(c, 64))
    while block_c > least and n * cdiv(c, block_c) < 2 * multiprocessors:
        block_c //= 2
    block_c = max(block_c, 8) if channels_last else block_c
    block_p = min(max(next_power_of_2(p), 8), TILE // block_c)
    return Tile.of(block_c, block_p, is_vector(c, p, itemsize, channels_last))


def plane_splits(n: int, c: int, p: int, tile: Tile, multiprocessors: int) -> int:
    """Into how many programs the pixels of a plane are divided where no sum runs over them."""
    programs = n * cdiv(c, tile.block_c)
    return min(cdiv(p, tile.block_p), max(cdiv(4 * multiprocessors, programs), 1))


def pixel_tile(n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int) -> Tile:
    """For kernels that reduce or scale over channels: a program owns ``block_p`` pixels, walks along channels."""
    block_p, least = (32, 1) if channels_last else (128, SECTOR // itemsize)
    block_p = min(max(block_p, TILE // next_power_of_2(c)), next_power_of_2(p))
    while block_p > least and n * cdiv(p, block_p) < 2 * multiprocessors:
        block_p //= 2
    block_p = block_p if channels_last else max(block_p, 8)
    block_c = min(max(next_power_of_2(c), 8), TILE // block_p)
    return Tile.of(block_c, block_p, is_vector(c, p, itemsize, channels_last))


def whole_plane_tile(n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int) -> Tile:
    """For SimAM: whole planes in a tile (``block_p >= p``) where registers allow, else a tile to walk along them."""
    largest = 4 * TILE if itemsize <= 4 else TILE  # 32 elements a thread in 16 warps
    least = max(SECTOR // itemsize, 8) if channels_last else 1
    block_p = max(next_power_of_2(p), 8)
    if block_p * least > largest:
        return plane_tile(n, c, p, itemsize, channels_last, multiprocessors)
    block_c = max(least, min(TILE // block_p, next_power_of_2(c)))
    while block_c > least and n * cdiv(c, block_c) < 2 * multiprocessors:
        block_c //= 2
    return Tile.of(block_c, block_p, is_vector(c, p, itemsize, channels_last))


def hidden_block(hidden: int) -> int:
    """Hidden units of the MLP that are handled at once; 16 at least, for ``tl.dot``."""
    return min(max(next_power_of_2(hidden), 16), 32)
