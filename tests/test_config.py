"""Launch configuration, over every shape that a network might have."""

import itertools

import pytest

from attn_kernels.ops import simam
from attn_kernels.ops.bam.norm import ADDED_CHANNELS
from attn_kernels.ops.bam.norm.forward import norm_tile
from attn_kernels.ops.cbam.forward import pools_tile
from attn_kernels.ops.common.gate_plan import PLANE_BYTES, channel_plan
from attn_kernels.ops.common.tiling import (
    BYTE,
    TILE,
    Geometry,
    cdiv,
    next_power_of_2,
    pixel_tile,
    plane_tile,
)
from attn_kernels.ops.simam import whole_plane_tile

CHANNELS = (1, 2, 3, 8, 16, 40, 64, 96, 240, 256, 1024, 2048, 4096)
PIXELS = (1, 4, 16, 49, 196, 784, 3136, 12544, 50176)


@pytest.mark.parametrize("choose", [plane_tile, pixel_tile, whole_plane_tile])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_fit(choose, channels_last):
    for n, c, p, itemsize, sms in itertools.product((1, 8, 32, 256), CHANNELS, PIXELS, (2, 4, 8), (1, 58, 132)):
        tile = choose(Geometry(n, c, p, itemsize, channels_last, sms))
        blocks = (tile.block_c, tile.block_p)
        assert all(block & (block - 1) == 0 and block >= 1 for block in blocks)
        assert blocks[0 if channels_last else 1] >= BYTE  # a ReLU's bits fill bytes
        assert tile.block_c * tile.block_p <= 4 * TILE
        assert 1 <= tile.num_warps <= 16


@pytest.mark.parametrize("channels_last", [False, True])
def test_simam_holds_the_same_planes_whole_forward_and_backward(channels_last):
    """What forward saves depends on it."""
    for n, c, p, itemsize, sms in itertools.product((1, 32), CHANNELS, (*PIXELS, 512, 513), (2, 4, 8), (1, 132)):
        for backward in (False, True):
            tile = whole_plane_tile(Geometry(n, c, p, itemsize, channels_last, sms), backward)
            assert (tile.block_p >= p) == (p <= simam.largest_plane(itemsize, channels_last))
            assert tile.block_c >= BYTE or not channels_last
            assert 1 <= tile.num_warps <= 16


@pytest.mark.parametrize("channels_last", [False, True])
def test_pools_have_16_elements_per_thread_at_most(channels_last):
    for n, c, p, itemsize, sms in itertools.product((1, 32), CHANNELS, PIXELS, (2, 4, 8), (1, 132)):
        g = Geometry(n, c, p, itemsize, channels_last, sms)
        tile = pools_tile(g)
        assert tile.block_p == pixel_tile(g).block_p
        assert tile.block_c & (tile.block_c - 1) == 0
        assert tile.num_warps & (tile.num_warps - 1) == 0
        assert tile.block_c * tile.block_p <= max(32 * 16 * tile.num_warps, tile.block_p)
        assert 1 <= tile.num_warps <= 16


@pytest.mark.parametrize("options", [{}, {"averages": True}, {"dspatial": True}, {"tile_elements": TILE // 2}], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_tasks_cover_every_plane(channels_last, options):
    for n, c, p, itemsize, sms in itertools.product((1, 8, 32, 256), CHANNELS, PIXELS, (2, 4, 8), (1, 58, 132)):
        hidden = max(c // 16, 1)
        plan = channel_plan(Geometry(n, c, p, itemsize, channels_last, sms), hidden, **options)
        block_e = plan.work(hidden, plan.is_split).block_e
        assert plan.blocks * plan.tile.block_c >= c > (plan.blocks - 1) * plan.tile.block_c
        assert plan.splits * plan.chunk >= p > (plan.splits - 1) * plan.chunk
        assert plan.chunk % plan.tile.block_p == 0
        assert plan.groups * plan.samples >= n > (plan.groups - 1) * plan.samples
        assert 1 <= plan.lookahead <= plan.groups
        assert (plan.tile.stages > 1) == (
            itemsize < 8 and (plan.chunk > plan.tile.block_p or plan.samples > 1)
        )  # tiles to come
        assert plan.hidden_tasks(hidden) * block_e >= plan.samples * hidden
        assert plan.hidden_tasks(hidden) == cdiv(plan.samples * hidden, block_e)  # as kernels count
        assert plan.tile.num_warps >= 4  # fewer spill 0.5 to 1.7 KB in the products of the MLP, as on 4x4 planes
        if plan.samples > 1:
            assert plan.splits == 1
            assert plan.tile.block_p >= p
            assert plan.tile.block_c * plan.tile.block_p * itemsize <= PLANE_BYTES
            assert plan.tile.block_c >= 16
            assert plan.block_r >= 16
            assert plan.tile.num_warps in (4, 8)
            if "dspatial" in options and itemsize < 8:  # more spill
                assert plan.tile.block_c * plan.tile.block_p <= 16 * 32 * plan.tile.num_warps
            assert plan.samples in (2, 4, 8, 16)  # rows of tl.dot
            assert (plan.plane_stages > 1) == (itemsize < 8)
        else:
            assert plan.plane_stages == 1


def test_few_partial_products():
    for c, p, channels_last in itertools.product(CHANNELS, PIXELS, (False, True)):
        tile = plane_tile(Geometry(1, c, p, 2, channels_last, 132))
        assert cdiv(c, tile.block_c) <= (128 if channels_last else 64)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_tiles_fit(channels_last, whole):
    for n, c, p, itemsize, sms in itertools.product((1, 8, 32, 256), CHANNELS, PIXELS, (2, 4, 8), (1, 58, 132)):
        if whole and c > ADDED_CHANNELS:
            continue
        tile, programs = norm_tile(Geometry(n, c, p, itemsize, channels_last, sms), whole)
        assert all(block & (block - 1) == 0 and block >= 1 for block in (tile.block_c, tile.block_p))
        assert tile.block_c >= c or not whole
        assert tile.block_c * tile.block_p <= TILE
        assert 1 <= programs <= n * cdiv(p, tile.block_p)  # each has a tile
        assert next_power_of_2(programs) * tile.block_c <= TILE  # what all leave is one tile
        assert programs == 1 or programs**2 * 8 <= n * p * itemsize
        assert 1 <= tile.num_warps <= 16
