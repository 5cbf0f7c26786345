"""The speed of light of what is bound by memory: the fastest copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import timing

BLOCK = 4096


@triton.jit
def copy_kernel(source_ptr, target_ptr, SIZE, BLOCK: tl.constexpr):
    """target = source, BLOCK elements per program."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + o, tl.load(source_ptr + o, mask=o < SIZE), mask=o < SIZE)


def triton_copy(source: Tensor, target: Tensor) -> None:
    copy_kernel[(triton.cdiv(source.numel(), BLOCK),)](source, target, source.numel(), BLOCK=BLOCK, num_warps=8)


def torch_copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


COPIES: tuple[Callable[[Tensor, Tensor], None], ...] = (triton_copy, torch_copy)


@functools.cache
def copy_times(size: int, device: torch.device) -> timing.Quantiles:
    """Device seconds of the faster way to read ``size / 2`` bytes and write them elsewhere."""
    numel = max(1, size // 8)
    sets = [
        (
            torch.randint(2**30, (numel,), dtype=torch.int32, device=device),
            torch.empty(numel, dtype=torch.int32, device=device),
        )
        for _ in range(timing.input_sets(8 * numel))
    ]
    times = [timing.device_times(lambda _, copy=copy: [partial(copy, *s) for s in sets], len(sets)) for copy in COPIES]
    return min(times, key=lambda quantiles: quantiles.p50)
