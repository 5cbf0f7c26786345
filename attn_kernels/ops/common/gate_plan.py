"""How squeeze and excitation are divided into tasks: a pure function of a tensor's geometry."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from attn_kernels.ops.common import tiling
from attn_kernels.ops.common.pools import AVERAGE, Extent, pools_of
from attn_kernels.ops.common.tiling import BYTE, STAGES, Geometry, Tile, cdiv, next_power_of_2, plane_tile

# Bytes of x that a program of a launch in two phases reads at most where it can choose; twice as many where it does
# more than to pool averages: its lanes then meet in four times as many instructions.
TASK_BYTES = 32 * 1024
# Elements of a gate's hidden layer that a program adds up at most.
HIDDEN_ELEMENTS = 64
# Bytes of x that a tile of a whole plane has at most, where a program serves several samples.
PLANE_BYTES = 16 * 1024
# Stages of the loops over such tiles, except the one that pools x, by bytes per element; in half precision one less
# where more than averages are pooled or there is a spatial gate.
PLANE_STAGES = {2: 3, 4: 2, 8: 1}
# Samples of small planes that a program serves at most, so that it reads its weights once for all of them.
SAMPLES = 16


class Work(NamedTuple):
    """How a kernel does its tasks: its constexpr WORK.

    Attributes:
        single: all phases are in one launch.
        joined: the parts of a plane are added up; in forward those of an average need not be.
        samples: of a task.
        plane_stages: of the loop over a task's tiles in the second phase, and over its samples in backward's first.
        block_r: hidden units at once.
        block_e: elements of the hidden layer of a task that adds them up.
        block_w: channels, and hidden units, of a task of the weights' gradients.
    """

    single: bool
    joined: bool
    samples: int
    plane_stages: int
    block_r: int
    block_e: int
    block_w: int


@dataclass(frozen=True)
class ChannelPlan:
    """Tasks of ``samples`` x ``tile.block_c`` channels x ``chunk`` pixels.

    A sample has ``blocks`` x ``splits`` of them. ``groups`` of samples follow one another, the first phase of a group
    ``lookahead`` groups ahead of its second, in a ``single_launch`` or in one for each phase (see grid_sync.py).
    """

    tile: Tile
    samples: int
    chunk: int
    splits: int
    blocks: int
    groups: int
    lookahead: int
    block_r: int
    bwd_block_r: int
    plane_stages: int
    single_launch: bool

    @property
    def tasks(self) -> int:
        """Of a group, in each phase."""
        return self.blocks * self.splits

    @property
    def is_split(self) -> bool:
        """Whether planes are split among programs."""
        return self.splits > 1

    def hidden_tasks(self, elements: int) -> int:
        """Of a group, between the phases: they add up a hidden layer of ``elements`` per sample."""
        return cdiv(self.samples * elements, HIDDEN_ELEMENTS)

    @property
    def weight_block(self) -> int:
        """Channels, and hidden units, of a task of the weights' gradients: more spill beside split planes."""
        return 32 if self.samples > 1 else 16

    def weight_tasks(self, c: int, hidden: int) -> int:
        return cdiv(c, self.weight_block) * cdiv(hidden, self.weight_block)

    def work(self, elements: int, joined: bool, backward: bool = False) -> Work:
        """For a hidden layer of ``elements`` per sample."""
        block_r = self.bwd_block_r if backward else self.block_r
        block_e = min(max(next_power_of_2(self.samples * elements), 16), HIDDEN_ELEMENTS)
        return Work(self.single_launch, joined, self.samples, self.plane_stages, block_r, block_e, self.weight_block)


@functools.lru_cache
def channel_plan(
    g: Geometry,
    hidden: int,
    single_launch: bool = True,
    averages: bool = False,
    dspatial: bool = False,
    tile_elements: int | None = None,
) -> ChannelPlan:
    """For a channel gate, whose MLP has ``hidden`` units, 0 where there is none.

    Where it pools ``averages`` alone, with no spatial gate behind it, a thread has registers for 64 bytes of x. Beside
    other pools, or the maps of a spatial gate, 64 spill: there it has 32, programs have larger tasks, and fewer of them
    run at once. With small planes, a tile each and several samples per program, a thread has up to 64 bytes, except in
    backward with a spatial gate behind (``dspatial``).
    """
    n, c, p, itemsize = g.n, g.c, g.p, g.itemsize
    thread_bytes, task_bytes, resident = (64, TASK_BYTES, 3) if averages else (32, 2 * TASK_BYTES, 2)
    tile = plane_tile(g, True)
    block_c, block_p, samples, splits = tile.block_c, tile.block_p, 1, 0
    if hidden and c > BYTE:
        # A program reads its weights, 8 bytes per channel and unit in float32, once for enough samples that they are a
        # quarter of x. Tiles of 64-byte rows and of 16 channels at least, for ``tl.dot``, and of whole planes.
        samples = min(SAMPLES, next_power_of_2(n), next_power_of_2(cdiv(32 * hidden, p * itemsize)))
        narrow_c = min(max(64 // itemsize, 16), max(next_power_of_2(c), 16))
        plane_p = max(next_power_of_2(p), BYTE)
        if (dspatial or not (averages or g.channels_last)) and narrow_c * plane_p * itemsize > PLANE_BYTES // 2:
            narrow_c = min(narrow_c, 16)  # in 8 warps more spill behind a spatial gate
        while samples > 1 and (
            cdiv(n, samples) * cdiv(c, narrow_c) < g.multiprocessors
            or samples * narrow_c * p * itemsize > 2 * TASK_BYTES
            or narrow_c * plane_p * itemsize > PLANE_BYTES
        ):
            samples //= 2
        if samples > 1:
            block_c, block_p, splits = narrow_c, plane_p, 1
    if samples == 1:
        block_p = min(block_p, max((tile_elements or tiling.TILE) // block_c, BYTE))
    tile = Tile.of(g, block_c, block_p, thread_bytes=thread_bytes)
    if samples > 1:
        # Programs of 4 warps: the next phase's are there already when a phase ends. Larger tiles spill in 4, and those
        # whose elements have an address each.
        most = PLANE_BYTES // (4 if dspatial else 2)
        small = block_c * block_p * itemsize <= most and tile.unit > 1
        tile = tile._replace(num_warps=4 if small else 8)
    elif hidden:
        # The products of 16 x 16, the least of the MLP's, spill in fewer than 4 warps.
        tile = tile._replace(num_warps=max(tile.num_warps, 4))
    block_r = hidden_block(hidden, block_c, 64 if samples > 1 and averages else 32)
    # Beside dy more spill, in half precision on sm_80 to sm_90.
    bwd_block_r = min(block_r, 32 if block_c * block_p <= tiling.TILE else 64)
    blocks, tiles = cdiv(c, block_c), cdiv(p, block_p)
    # Every part reads its weights anew, 4 bytes per channel and unit of each layer: larger parts where they outweigh x.
    most = max(max(task_bytes, 8 * block_c * hidden) // (block_c * block_p * itemsize), 1)
    least = max(n * blocks * tiles // (4 * g.multiprocessors), 1)
    chunk = cdiv(tiles, splits or cdiv(tiles, min(most, least))) * block_p
    splits, groups = cdiv(p, chunk), cdiv(n, samples)
    # The first phase is as many groups ahead as run at once: they are done when the second gets there. That is 12.4 to
    # 16.5 MiB of x on an H100, whose L2 has 50 MB; the programs that run at once add as much again at most.
    group_bytes = max(blocks * splits * task_bytes, samples * c * p * itemsize)
    lookahead = min(max(resident * g.multiprocessors // cdiv(group_bytes, task_bytes), 1), groups)
    # One stage, since programs exchange data (see grid_sync.py). Registers for two programs of 8 warps per
    # multiprocessor, or for three or four of 4.
    tile = tile._replace(
        stages=STAGES[itemsize] if chunk > block_p or samples > 1 else 1,
        num_stages=1,
        maxnreg=168 if samples > 1 and tile.num_warps == 4 else 128,
    )
    plane_stages = PLANE_STAGES[itemsize] - (not averages and itemsize == 2) if samples > 1 else 1
    return ChannelPlan(
        tile, samples, chunk, splits, blocks, groups, lookahead, block_r, bwd_block_r, plane_stages, single_launch
    )


def hidden_block(hidden: int, block_c: int, most: int) -> int:
    """Hidden units of the MLP that are handled at once with ``block_c`` channels; 16 at least, for ``tl.dot``.

    ``most``: of up to 64 channels; beside more, whose products take more registers, no more than 16.
    """
    return min(max(next_power_of_2(hidden), 16), most if block_c <= 64 else 16)


class GateLaunch(NamedTuple):
    """All of a gate's launch that follows from the geometry, computed once for it.

    Attributes:
        joined: the parts of a plane are added up.
        partials: partial sums per sample.
        flags: their number, 0 in plain launches.
        programs: of each phase, by ``grid_sync.launches``' names.
        arguments: of the kernel, and the options of its launch.
        gates: of a kernel that computes the gates alone, in backward.
    """

    plan: ChannelPlan
    joined: bool
    partials: int
    flags: int
    programs: dict[str, int]
    arguments: dict[str, object]
    gates: dict[str, object]


def _gate_launch(
    g: Geometry, plan: ChannelPlan, tile: Tile, hidden: int, pools: int, elements: int, joined: bool, backward: bool
) -> GateLaunch:
    """For a hidden layer of ``elements`` per sample; ``programs`` and ``flags`` for the caller to complete."""
    tasks, hidden_tasks = plan.groups * plan.tasks, plan.groups * plan.hidden_tasks(elements)
    arguments = {
        "N": g.n,
        "groups": plan.groups,
        "lookahead": plan.lookahead,
        "S": plan.splits,
        "extent": Extent(g.c, g.p, hidden, plan.chunk),
        "POOLS": pools_of(pools),
        "WORK": plan.work(elements, joined, backward),
        "TILE": tile,
        **tile.options,
    }
    programs = {"parts": tasks, "join": plan.groups * plan.blocks if joined else 0, "hidden": hidden_tasks}
    partials = plan.blocks if joined and not backward else plan.tasks
    return GateLaunch(plan, joined, partials, 1 + tasks + hidden_tasks, programs, arguments, {})


@functools.lru_cache
def forward_launch(g: Geometry, hidden: int, pools: int, single_launch: bool, scales: bool) -> GateLaunch:
    """For a gate that ``scales`` x, or for the gates alone."""
    # Of gates alone half a tile: in half precision programs of 4 warps, of which a multiprocessor holds four.
    size = {"averages": pools == AVERAGE} if scales else {"tile_elements": tiling.TILE // 2}
    plan = channel_plan(g, hidden, single_launch, **size)
    joined = plan.is_split and pools != AVERAGE
    found = _gate_launch(g, plan, plan.tile, hidden, pools, pools_of(pools).K * hidden, joined, False)
    second = {"rest": plan.groups * plan.tasks} if scales else {"gates": plan.groups * plan.blocks}
    return found._replace(programs=found.programs | second, flags=found.flags if single_launch else 0)


@functools.lru_cache
def backward_launch(g: Geometry, hidden: int, pools: int, single_launch: bool, dspatial: bool) -> GateLaunch:
    """For the backward pass, with a spatial gate behind the channel gate or without."""
    averages = pools == AVERAGE and not dspatial
    plan = channel_plan(g, hidden, single_launch, averages, dspatial)
    tile = plan.tile._replace(stages=1)
    # Registers for three programs of 8 warps per multiprocessor where that does not spill: lp, lse, 64 bytes of x per
    # thread, the maps of a spatial gate and the products of several samples take more.
    pool_set = pools_of(pools)
    more = pool_set.lp or pool_set.lse or averages or dspatial or plan.samples > 1
    tile = tile if more or tile.num_warps != 8 else tile._replace(maxnreg=80)
    found = _gate_launch(g, plan, tile, hidden, pools, hidden, plan.is_split, True)
    second = {"rest": plan.groups * plan.tasks, "weights": plan.weight_tasks(g.c, hidden)}
    # One more flag, that of all hidden layers and joins.
    flags = found.flags + 1 + found.programs["join"]
    # No data is exchanged among the gates alone, and no tile is loaded: the same kernel for both layouts.
    tile = Tile(False, 1, tile.block_c, 1, tile.num_warps)
    work = plan.work(hidden, False)._replace(single=True, plane_stages=1, block_e=1, block_w=1)
    gates = {"N": g.n, "C": g.c, "R": hidden, "K": pool_set.K, "WORK": work, "TILE": tile, **tile.options}
    return found._replace(programs=found.programs | second, flags=flags if single_launch else 0, gates=gates)
