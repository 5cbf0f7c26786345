"""The GPU that launches are configured for, and the switch that gives each phase a launch of its own.

With ``ATTN_KERNELS_SINGLE_LAUNCH=0`` in the environment no program waits for another. The variable is read once, when
this module is imported.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SINGLE_LAUNCH = os.environ.get("ATTN_KERNELS_SINGLE_LAUNCH", "1") != "0"

_assumed_multiprocessors = 1  # of tensors elsewhere: the interpreter runs programs one after another
# The thread whose launches on meta and fake tensors are recorded; else 0.
recorded_thread = 0


@functools.lru_cache
def _multiprocessors(device_index: int | None) -> int:
    settle_cache_keys()  # here, since every launcher asks for this first, and once per device
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Those of x's GPU; of a tensor that is on no GPU, the assumed number."""
    return _multiprocessors(x.device.index) if x.is_cuda else _assumed_multiprocessors


@contextmanager
def assuming(multiprocessors: int) -> Iterator[None]:
    """Inside the block, tensors that are on no GPU count as on one with this many multiprocessors."""
    global _assumed_multiprocessors
    before, _assumed_multiprocessors = _assumed_multiprocessors, multiprocessors
    try:
        yield
    finally:
        _assumed_multiprocessors = before


@functools.cache
def settle_cache_keys() -> None:
    """Have Triton hash every function of this package, callees before callers.

    A kernel's place in Triton's cache is a hash of all functions that it calls and of their constants. Before 3.9
    Triton misses the constants of a callee that it has not hashed yet (triton-lang/triton pull request 10494): the same
    kernel is then compiled anew in a process that launches kernels in another order.
    """
    from triton.runtime.jit import JITFunction

    def settle(function: JITFunction) -> None:
        for name in function.fn.__code__.co_names:
            callee = function.fn.__globals__.get(name)
            if isinstance(callee, JITFunction) and callee.hash is None:
                settle(callee)
        _ = function.cache_key

    for module in [m for name, m in sys.modules.items() if name.startswith("attn_kernels.ops.")]:
        for function in vars(module).values():
            if isinstance(function, JITFunction) and function.module == module.__name__:
                settle(function)
