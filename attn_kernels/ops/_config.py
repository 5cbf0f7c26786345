"""Launch configuration: pure functions of shape, layout, element size and number of multiprocessors. No Triton here.

Thresholds are reasoned from bytes and machine code and not yet measured on a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

# Elements of x that a program holds at once; each is a register for every accumulator that is kept lane by lane.
TILE = 4096
# Bytes of consecutive channels that a channels_last tile reads at least: one 32-byte DRAM sector.
SECTOR = 32
# Elements along the unit stride that a tile holds at least: one byte of the bits that a ReLU leaves.
BYTE = 8
# Bytes of x that a program of a launch in two phases reads at most where it can choose; twice as many where it does
# more than to pool averages: its lanes then meet in four times as many instructions.
ITEM_BYTES = 32 * 1024
# Stages of the loop that pools x, and of BatchNorm's, by bytes an element: one more than the tiles that a program asks
# for ahead.
STAGES = {2: 4, 4: 3, 8: 1}
# Elements of a gate's hidden layer that a program adds up at most.
HIDDEN_ELEMENTS = 64
# Bytes of x that a tile of a whole plane has at most, where a program serves several samples.
PLANE_BYTES = 16 * 1024
# Stages of the loops over such tiles but the one that pools x, by bytes an element; in half precision one less where
# more than averages are pooled or there is a spatial gate.
PLANE_STAGES = {2: 3, 4: 2, 8: 1}
# Samples of small planes that a program serves at most, so that it reads its weights once for all of them.
SAMPLES = 16
# Channels of a map that a program holds at once at most, where it adds them up.
ADDED_CHANNELS = 128


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
    def of(cls, block_c: int, block_p: int, row: int, itemsize: int, a_thread: int = 64) -> Tile:
        """``a_thread`` bytes of x a thread, 64 are four vectors; half where rows of ``row`` elements are no vectors."""
        a_thread = max(a_thread // (1 if row * itemsize % 16 == 0 else 2), 16) // itemsize
        return cls(block_c, block_p, min(max(block_c * block_p // (32 * a_thread), 1), 16))


def vector_length(row: int, itemsize: int) -> int:
    """Elements of the widest loads, of 16 bytes at most, of which a row of ``row`` elements is a whole number."""
    return min(row & -row, 16 // itemsize)


@functools.lru_cache
def plane_tile(
    n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int, divided: bool = False
) -> Tile:
    """For kernels that reduce or scale planes: a program owns ``block_c`` planes and walks along their pixels.

    Where planes are ``divided`` among programs, fewer of them make enough programs.
    """
    if channels_last:
        # Rows of 256 bytes; of 64 where there would be too few programs, and of a sector where still too few.
        block_c, least = min(next_power_of_2(c), 256 // itemsize), max(SECTOR // itemsize, BYTE)
        least = max(least, next_power_of_2(cdiv(c, 128)))
    else:
        # Rows of 128 pixels and 32 channels: every program reads the maps of CBAM's spatial gate along its pixels, and
        # the partial products of fc1 that each block of channels leaves of each part, of 64 blocks at most.
        least = next_power_of_2(cdiv(c, 64))
        block_c = min(max(TILE // min(next_power_of_2(p), 128), least), next_power_of_2(c))
    while block_c > least:
        enough = multiprocessors if channels_last and block_c * itemsize <= 64 else 3 * multiprocessors
        tiles = cdiv(p, max(TILE // block_c, 1)) if divided else 1
        if n * cdiv(c, block_c) * tiles >= enough:
            break
        block_c //= 2
    block_c = max(block_c, BYTE) if channels_last else min(block_c, TILE // BYTE)
    block_p = min(max(next_power_of_2(p), BYTE), max(TILE // block_c, 1))
    return Tile.of(block_c, block_p, c if channels_last else p, itemsize)


@dataclass(frozen=True)
class ChannelPlan:
    """How squeeze and excitation are divided: items of ``samples`` x ``tile.block_c`` channels x ``chunk`` pixels.

    A sample has ``blocks`` x ``splits`` of them; ``groups`` of samples follow one another, the first phase of a group
    ``lead`` groups ahead of its second, in a ``single_launch`` or in one for each phase (see _phases.py).
    """

    tile: Tile
    samples: int
    chunk: int
    splits: int
    blocks: int
    groups: int
    lead: int
    block_h: int
    bwd_block_h: int
    stages: int
    plane_stages: int
    single_launch: bool

    @property
    def items(self) -> int:
        """Of a group, in each phase."""
        return self.blocks * self.splits

    @property
    def joins(self) -> int:
        """Divided planes of a group, by blocks of channels."""
        return self.blocks if self.splits > 1 else 0

    def hidden_items(self, elements: int) -> int:
        """Of a group, between the phases: they add up a hidden layer of ``elements`` a sample."""
        return cdiv(self.samples * elements, HIDDEN_ELEMENTS)

    @property
    def weight_block(self) -> int:
        """Channels, and hidden units, of an item of the weights' gradients: more spill beside divided planes."""
        return 32 if self.samples > 1 else 16

    def weight_items(self, c: int, hidden: int) -> int:
        return cdiv(c, self.weight_block) * cdiv(hidden, self.weight_block)

    @property
    def registers(self) -> int:
        """Per thread at most: for two programs of 8 warps per multiprocessor, or for three or four of 4."""
        return 168 if self.samples > 1 and self.tile.num_warps == 4 else 128

    def block_e(self, elements: int) -> int:
        """Elements of it that an item adds up."""
        return min(max(next_power_of_2(self.samples * elements), 16), HIDDEN_ELEMENTS)


@functools.lru_cache
def channel_plan(
    n: int,
    c: int,
    p: int,
    hidden: int,
    itemsize: int,
    channels_last: bool,
    multiprocessors: int,
    single_launch: bool = True,
    averages: bool = False,
    dspatial: bool = False,
    tile_elements: int = TILE,
) -> ChannelPlan:
    """For the channel gate, whose MLP has ``hidden`` units, 0 where there is none.

    Where it pools ``averages`` alone a thread has registers for 64 bytes of x. Beside other pools, or the maps of a
    spatial gate, 64 spill: there it has 32, programs have larger items, and fewer of them run at once. Of small planes,
    which are a tile each in programs of several samples, it has up to 64 but where the gradients of a spatial gate are
    beside it (``dspatial``).
    """
    a_thread, item_bytes, resident = (64, ITEM_BYTES, 3) if averages else (32, 2 * ITEM_BYTES, 2)
    tile = plane_tile(n, c, p, itemsize, channels_last, multiprocessors, True)
    block_c, block_p, samples, splits = tile.block_c, tile.block_p, 1, 0
    if hidden and c > BYTE:
        # A program reads its weights, 8 bytes a channel and unit in float32, once for enough samples that they are a
        # quarter of x. Tiles of 64-byte rows and of 16 channels at least, for ``tl.dot``, and of whole planes.
        samples = min(SAMPLES, next_power_of_2(n), next_power_of_2(cdiv(32 * hidden, p * itemsize)))
        narrow_c = min(max(64 // itemsize, 16), max(next_power_of_2(c), 16))
        plane_p = max(next_power_of_2(p), BYTE)
        if (dspatial or not (averages or channels_last)) and narrow_c * plane_p * itemsize > PLANE_BYTES // 2:
            narrow_c = min(narrow_c, 16)  # in 8 warps more spill behind a spatial gate
        while samples > 1 and (
            cdiv(n, samples) * cdiv(c, narrow_c) < multiprocessors
            or samples * narrow_c * p * itemsize > 2 * ITEM_BYTES
            or narrow_c * plane_p * itemsize > PLANE_BYTES
        ):
            samples //= 2
        if samples > 1:
            block_c, block_p, splits = narrow_c, plane_p, 1
    if samples == 1:
        block_p = min(block_p, max(tile_elements // block_c, BYTE))
    row = c if channels_last else p
    tile = Tile.of(block_c, block_p, row, itemsize, a_thread)
    if samples > 1:
        # Programs of 4 warps: the next phase's are there already when a phase ends. Larger tiles spill in 4, and those
        # whose elements have an address each.
        most = PLANE_BYTES // (4 if dspatial else 2)
        small = block_c * block_p * itemsize <= most and vector_length(row, itemsize) > 1
        tile = replace(tile, num_warps=4 if small else 8)
    elif hidden:
        # The products of 16 x 16, the least of the MLP's, spill in fewer than 4 warps.
        tile = replace(tile, num_warps=max(tile.num_warps, 4))
    block_h = hidden_block(hidden, block_c, 64 if samples > 1 and averages else 32)
    # Beside dy more spill, in half precision on sm_80 to sm_90.
    bwd_block_h = min(block_h, 32 if block_c * block_p <= TILE else 64)
    blocks, tiles = cdiv(c, block_c), cdiv(p, block_p)
    # Every part reads its weights anew, 4 bytes a channel and unit of each layer: larger parts where they outweigh x.
    most = max(max(item_bytes, 8 * block_c * hidden) // (block_c * block_p * itemsize), 1)
    least = max(n * blocks * tiles // (4 * multiprocessors), 1)
    chunk = cdiv(tiles, splits or cdiv(tiles, min(most, least))) * block_p
    splits, groups = cdiv(p, chunk), cdiv(n, samples)
    # The first phase is as many groups ahead as run at once: they are done when the second gets there. That is 12.4 to
    # 16.5 MB of x on an H100, whose L2 has 50.
    lead = resident * multiprocessors // cdiv(max(blocks * splits * item_bytes, samples * c * p * itemsize), item_bytes)
    lead = min(max(lead, 1), groups)
    stages = STAGES[itemsize] if chunk > block_p or samples > 1 else 1
    plane_stages = PLANE_STAGES[itemsize] - (not averages and itemsize == 2) if samples > 1 else 1
    return ChannelPlan(
        tile, samples, chunk, splits, blocks, groups, lead, block_h, bwd_block_h, stages, plane_stages, single_launch
    )


@functools.lru_cache
def pixel_tile(n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int) -> Tile:
    """For kernels that reduce or scale over channels: a program owns ``block_p`` pixels, walks along channels."""
    most_c = max(next_power_of_2(c), BYTE)
    # At least 8 pixels: what a block of pixels leaves of a sum over them is then an eighth of x.
    block_p, least = (32, 8) if channels_last else (128, max(SECTOR // itemsize, BYTE))
    block_p = max(min(max(block_p, TILE // most_c), next_power_of_2(p)), 1 if channels_last else BYTE)
    while block_p > least and n * cdiv(p, block_p) < 2 * multiprocessors:
        block_p //= 2
    block_c = min(most_c, TILE // block_p)
    return Tile.of(block_c, block_p, c if channels_last else p, itemsize)


@functools.lru_cache
def pools_tile(n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int) -> Tile:
    """For CBAM's pools over channels: as :func:`pixel_tile`, but 16 elements a thread, each with three accumulators."""
    tile = pixel_tile(n, c, p, itemsize, channels_last, multiprocessors)
    block_c = max(min(tile.block_c, TILE // 2 // tile.block_p), 1)
    return Tile(block_c, tile.block_p, max(block_c * tile.block_p // (32 * 16), 1))


def _least_channels(itemsize: int, channels_last: bool) -> int:
    return max(SECTOR // itemsize, BYTE) if channels_last else 1


def largest_plane(itemsize: int, channels_last: bool) -> int:
    """Pixels of a plane that a tile holds whole at most, a power of 2."""
    # 32 elements a thread in 16 warps; channels_last, whose sums cross warps, spills there.
    largest = (2 if channels_last else 4) * TILE if itemsize <= 4 else TILE
    return largest // _least_channels(itemsize, channels_last)


@functools.lru_cache
def whole_plane_tile(
    n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int, backward: bool = False
) -> Tile:
    """For SimAM: whole planes in a tile (``block_p >= p``) where registers allow, else a tile to walk along them.

    ``backward`` holds dy beside x, in more threads.
    """
    least = _least_channels(itemsize, channels_last)
    if p > largest_plane(itemsize, channels_last):
        tile = plane_tile(n, c, p, itemsize, channels_last, multiprocessors)
        block_c, block_p = tile.block_c, tile.block_p
    else:
        block_p = max(next_power_of_2(p), BYTE)
        block_c = max(least, min(TILE // block_p, next_power_of_2(c)))
        while block_c > least and n * cdiv(c, block_c) < 2 * multiprocessors:
            block_c //= 2
    row, a_thread = c if channels_last else p, 64
    if backward:
        # More than 16 elements a thread take the place of other programs; more than 8 where each has its own address.
        if vector_length(row, itemsize) == 1:
            block_c, a_thread = max(block_c // 2, least), 32
        elif row * itemsize % 16 == 0:
            a_thread = min(64, 16 * itemsize)
    return Tile.of(block_c, block_p, row, itemsize, a_thread)


@functools.lru_cache
def reduce_tile(n: int, p: int, hidden: int, itemsize: int, multiprocessors: int) -> tuple[Tile, int]:
    """For BAM's reducing convolution: a program owns ``block_p`` pixels; and the units that it computes at once."""
    if itemsize == 8:
        return Tile(16, 16, 4), 16
    # More units or pixels at once spill: 128 registers are what two programs of 8 warps leave each other.
    block_h = min(max(next_power_of_2(hidden), 16), 64)
    # The sums of a block of pixels, for the means, are 1/64 of what it reads and less.
    block_p = min(max(next_power_of_2(p), 16), 8192 // (block_h * itemsize), 128)
    while block_p > 8 * itemsize and n * cdiv(p, block_p) < multiprocessors:
        block_p //= 2
    # 128 bytes of consecutive channels; in half precision 256 where blocks of pixels are small: fewer steps. 8 warps
    # where each thread still has a vector of x.
    row = 256 if itemsize == 2 and block_p <= 32 else 128
    return Tile(row // itemsize, block_p, 8 if block_h * block_p >= 2048 and block_p >= 32 else 4), block_h


@functools.lru_cache
def reduce_bwd_tile(n: int, c: int, p: int, hidden: int, itemsize: int, multiprocessors: int) -> tuple[Tile, int, int]:
    """For its backward: a program owns ``block_c`` channels; units at once; programs that share the pixels."""
    if itemsize == 8:
        return Tile(16, 16, 4), 16, min(n * cdiv(p, 16), 4)
    block_h = min(max(next_power_of_2(hidden), 16), 64)
    # Three programs of 4 warps run at once, in 168 registers per thread, which larger tiles spill on sm_80. No program
    # more than that: it would begin when all others end. Beside many units rows of 128 bytes, for each block of
    # channels reads all of dreduced.
    block_c, block_p = (128 // itemsize, 16) if block_h == 64 else (64 // itemsize, 32)
    block_p = min(max(next_power_of_2(p), 16), block_p)
    programs = min(n * cdiv(p, block_p), max(3 * multiprocessors // cdiv(c, block_c), 1))
    return Tile(block_c, block_p, 4), block_h, programs


@functools.lru_cache
def norm_tile(
    n: int, c: int, p: int, itemsize: int, channels_last: bool, multiprocessors: int, whole: bool
) -> tuple[Tile, int]:
    """For BatchNorm of a map: a program owns ``block_c`` channels, all if ``whole``; programs that share the pixels."""
    block_c = next_power_of_2(c)
    if not whole:
        # Rows of 256 bytes; of 256 pixels where planes are large.
        block_c = min(block_c, 256 // itemsize if channels_last else max(TILE // min(next_power_of_2(p), 256), 1))
    blocks, block_p = cdiv(c, block_c), min(next_power_of_2(p), max(TILE // block_c, 1))
    while block_p > 32 and n * cdiv(p, block_p) * blocks < multiprocessors:
        block_p //= 2
    # What every program leaves, 8 bytes a channel, every one of the next launch reads, as one tile: so many programs
    # that all of it is no more than the map.
    programs = min(math.isqrt(n * p * itemsize // 8), TILE // block_c, cdiv(2 * multiprocessors, blocks))
    # The parts need registers: half as many bytes a thread.
    tile = Tile.of(block_c, block_p, c if channels_last else p, itemsize, 32)
    return tile, min(max(programs, 1), n * cdiv(p, block_p))


def hidden_block(hidden: int, block_c: int, most: int) -> int:
    """Hidden units of the MLP that are handled at once with ``block_c`` channels; 16 at least, for ``tl.dot``.

    ``most``: of up to 64 channels; beside more, whose products take more registers, no more than 16.
    """
    return min(max(next_power_of_2(hidden), 16), most if block_c <= 64 else 16)
