"""Sets of pools of planes: average, maximum, lp norm and logsumexp over the pixels of each channel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reference._common import accumulation_dtype

# A set of pools is an integer of these bits; the k-th pool is the k-th bit that is set.
POOLS = ("avg", "max", "lp", "lse")
AVERAGE = 1


class Pools(NamedTuple):
    """A set of pools as kernels take it: 1 or 0 for each, K pools in all, Q statistics per part.

    L = lp + lse of them are saved, since backward could not recompute them cheaply.
    """

    avg: int
    max: int
    lp: int
    lse: int
    K: int
    Q: int  # logsumexp needs the maximum, too


class Extent(NamedTuple):
    """C channels, P pixels, R hidden units, pixels of a part: the ``Sizes`` that a kernel gets in one tuple."""

    C: int
    P: int
    R: int
    chunk: int


@functools.cache
def pools_of(bits: int) -> Pools:
    flags = [bits >> i & 1 for i in range(len(POOLS))]
    return Pools(*flags, sum(flags), sum(flags) + (flags[3] and not flags[1]))


def pool_bits(pool_types: Sequence[str]) -> int:
    return sum(1 << POOLS.index(pool) for pool in pool_types)


def empty_argmax(x: Tensor, pools: int) -> Tensor:
    """(N, C) pixels, or nothing without "max"."""
    n, c, h, w = x.shape
    return torch.empty((n, c) if pools & 2 else 0, dtype=index_dtype(h * w), device=x.device)


def index_dtype(count: int) -> torch.dtype:
    """The smallest dtype of an index below ``count``."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def empty_saved(x: Tensor, hidden: int, pools: int) -> Tensor:
    """What a channel gate saves for backward, empty: the preactivation (N, K, R), and lp and lse (N, L, C), in one."""
    n, c, _, _ = x.shape
    pool_set = pools_of(pools)
    size = n * (pool_set.K * hidden + (pool_set.lp + pool_set.lse) * c)
    return torch.empty(size, dtype=accumulation_dtype(x), device=x.device)
