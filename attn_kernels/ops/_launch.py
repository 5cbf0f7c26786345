"""Launch configuration of a tensor: ``_config``'s pure functions, asked for a tensor's shape, layout and device.

With ``ATTN_KERNELS_SINGLE_LAUNCH=0`` in the environment no program waits for another: each phase of a launch is one of
its own. The variable is read once, when this module is imported.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys

import torch
from torch import Tensor

from attn_kernels.ops import _config as config
from attn_kernels.ops._library import is_channels_last

SINGLE_LAUNCH = os.environ.get("ATTN_KERNELS_SINGLE_LAUNCH", "1") != "0"

# Of the GPU that tensors elsewhere stand for; else 0.
assumed_multiprocessors = 0
# The thread whose launches on meta and fake tensors are recorded; else 0.
recorded_thread = 0


@functools.lru_cache
def _multiprocessors(device_index: int | None) -> int:
    settle_cache_keys()  # here, since every launcher asks for this first, and once per device
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Of x's GPU; 1 under the interpreter, which runs programs one after another."""
    return _multiprocessors(x.device.index) if x.is_cuda else assumed_multiprocessors or 1


@functools.cache
def settle_cache_keys() -> None:
    """Have Triton hash every function of this package, callees before callers.

    A kernel's place in Triton's cache is a hash of all functions that it calls and of their constants. Before 3.9
    Triton misses the constants of a callee that it has not hashed yet (triton-lang/triton pull request 10494): the same
    kernel is then compiled anew in a process that launches kernels in another order.
    """
    from triton.runtime.jit import JITFunction

    for module in [m for name, m in sys.modules.items() if name.startswith("attn_kernels.ops.")]:
        for function in vars(module).values():  # in the order of their definitions, as modules are of their imports
            if isinstance(function, JITFunction) and function.module == module.__name__:
                _ = function.cache_key


def _tile(choose, x: Tensor, **options: bool) -> config.Tile:
    n, c, h, w = x.shape
    return choose(n, c, h * w, x.element_size(), is_channels_last(x), multiprocessors(x), **options)


def pixel_tile(x: Tensor) -> config.Tile:
    """For kernels that walk along channels."""
    return _tile(config.pixel_tile, x)


def whole_plane_tile(x: Tensor, backward: bool) -> config.Tile:
    """For kernels that keep whole planes, where they fit."""
    return _tile(config.whole_plane_tile, x, backward=backward)


def tile_options(x: Tensor, tile: config.Tile) -> dict[str, int]:
    """A kernel's constexpr arguments for tiles of x, and its warps."""
    _, c, h, w = x.shape
    channels_last = is_channels_last(x)
    return {
        "CHANNELS_LAST": channels_last,
        "UNIT": config.vector_length(c if channels_last else h * w, x.element_size()),
        "BLOCK_C": tile.block_c,
        "BLOCK_P": tile.block_p,
        "num_warps": tile.num_warps,
    }


@functools.lru_cache
def _bits(number: float, double: bool) -> int:
    if double:
        return struct.unpack("q", struct.pack("d", number))[0]
    return struct.unpack("i", struct.pack("f", ctypes.c_float(number).value))[0]


def number_bits(number: float, x: Tensor) -> int:
    """The bits of a number in the dtype in which kernels compute on x, as an argument of theirs.

    A float argument is a float32. A constexpr would be exact, but each value of it would be another kernel to compile.
    """
    return _bits(float(number), x.dtype == torch.float64)


# Triton's options for launches of a channel gate's items. What crosses programs must not be prefetched: cp.async may
# take it through L1, which the memory model does not order.
GATE_OPTIONS = {"num_stages": 1}


def scale_options(x: Tensor, relu: bool) -> dict[str, int | None]:
    """Triton's options for the kernel that scales by CBAM's gates.

    With the ReLU's bits, Triton 3.6 and no limit ptxas settles on 64 registers in float32 on sm_90, and on 80 in
    half precision and channels_last on sm_100, where it then spills 8 bytes. With 80 float32 spills on sm_100.
    """
    limits = {4: 88, 2: 96 if is_channels_last(x) else None}
    return {"maxnreg": limits.get(x.element_size()) if relu else None}


def pools_tile(x: Tensor) -> config.Tile:
    """For CBAM's pools over channels."""
    return _tile(config.pools_tile, x)


def channel_plan(
    x: Tensor, hidden: int, averages: bool = False, dspatial: bool = False, tile_elements: int = config.TILE
) -> config.ChannelPlan:
    """For the channel gate of x.

    ``averages``: it pools averages alone, and there is no spatial gate behind it; ``dspatial``: for the backward of one
    that has a spatial gate behind it.
    """
    n, c, h, w = x.shape
    return config.channel_plan(
        n,
        c,
        h * w,
        hidden,
        x.element_size(),
        is_channels_last(x),
        multiprocessors(x),
        SINGLE_LAUNCH,
        averages,
        dspatial,
        tile_elements,
    )


def reduce_tile(x: Tensor, hidden: int) -> tuple[config.Tile, int]:
    """For the forward of BAM's squeeze, and units at once."""
    n, _, h, w = x.shape
    return config.reduce_tile(n, h * w, hidden, x.element_size(), multiprocessors(x))


def reduce_bwd_tile(x: Tensor, hidden: int) -> tuple[config.Tile, int, int]:
    """For its backward, units at once, and programs that share the pixels."""
    n, c, h, w = x.shape
    return config.reduce_bwd_tile(n, c, h * w, hidden, x.element_size(), multiprocessors(x))


def norm_tile(x: Tensor, whole: bool) -> tuple[config.Tile, int]:
    """For BatchNorm of a map, all its channels in a tile if ``whole``; and programs that share the pixels."""
    n, c, h, w = x.shape
    return config.norm_tile(n, c, h * w, x.element_size(), is_channels_last(x), multiprocessors(x), whole)
