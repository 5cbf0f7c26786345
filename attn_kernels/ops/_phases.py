"""Two dependent phases in one launch: what the first one read is still in L2 when the second reads it again.

Programs do work items in the order of their numbers. The items of the first phase of a group of samples come ``lead``
groups ahead of those of its second phase, about as many as run at once; an item of the second phase waits until those
of its group's first phase are done. A program only ever waits for some of a lower number, which have started before
it: GPUs start the programs of a launch in the order of their numbers, on which NVIDIA's own scans rely likewise
(CUB, and with it PyTorch's cumsum and sort; NVIDIA/cub issue 245). The interpreter, which runs programs one after
another, never waits at all.

A program has a slot in memory, and sets it to the stamp of the launch, a number that no other launch has. So memory
need not be zeroed first, which would be a launch of its own, and belongs to one call only: streams and graphs share
none. A graph, however, replays its launches with the stamps that they were captured with: the last program of a group
clears the group's slots. Nothing else leaves a stamp in memory: it has 64 bits, and its first is random.

Memory order: all threads of a program meet (a barrier) before one of them sets its slot with release semantics, and
after they have found others' set with acquire semantics, at the scope of the GPU (PTX memory model, causality order).
What crosses programs is loaded with ``.cg`` as well, which the compiler may drop where it prefetches.
"""

from __future__ import annotations

import itertools
import secrets

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference._common import accumulation_dtype

# Of 2^62 to 2^63, so that every stamp is an int64 argument.
_stamps = itertools.count(2**62 + secrets.randbits(61))


def new_stamp() -> int:
    """The stamp of a launch."""
    return next(_stamps)


def empty_scratch(x: Tensor, elements: int, slots: int) -> tuple[Tensor, int]:
    """``elements`` in x's accumulation dtype and slots behind them, for a launch; and where these begin."""
    dtype = accumulation_dtype(x)
    begin = elements + elements % 2  # slots have 8 bytes
    return torch.empty(begin + slots * (8 // dtype.itemsize), dtype=dtype, device=x.device), begin


@triton.jit
def slots_pointer(scratch_ptr, begin):
    return (scratch_ptr + begin).to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def work_item(pid, groups, lead, FIRST, SECOND, AHEAD):
    """``second, group, item``: the phase, and which of the FIRST or SECOND items of which group.

    ``lead`` groups of the first phase; then in turns a group of the first phase and one of the second, of which AHEAD
    items come before the others'; then what is left of the second. Programs behind those are the caller's.
    """
    both = FIRST + SECOND
    u = pid - lead * FIRST
    steady = (groups - lead) * both
    turn = u // both
    k = u % both
    is_first = (k >= AHEAD) & (k < AHEAD + FIRST)
    v = u - steady
    at_start = u < 0
    at_end = v >= 0
    second = ~at_start & (at_end | ~is_first)
    group = tl.where(is_first, turn + lead, turn)
    item = tl.where(is_first, k - AHEAD, tl.where(k < AHEAD, k, k - FIRST))
    divisor = tl.maximum(FIRST, 1)
    group = tl.where(at_start, pid // divisor, tl.where(at_end, groups - lead + v // SECOND, group))
    item = tl.where(at_start, pid % divisor, tl.where(at_end, v % SECOND, item))
    return second, group, item


@triton.jit
def mark(slot_ptr, stamp):
    tl.debug_barrier()
    tl.atomic_xchg(slot_ptr, stamp, sem="release")


@triton.jit
def wait(slots_ptr, count, stamp):
    """Until the first ``count`` slots are set."""
    for i in range(0, count, 512):  # no fewer than a program has threads
        o = i + tl.arange(0, 512)
        pending = 1
        while pending > 0:
            b_slots = tl.atomic_or(slots_ptr + o, 0, mask=o < count, sem="acquire")
            pending = tl.max(((b_slots != stamp) & (o < count)).to(tl.int32), axis=0)
    tl.debug_barrier()


@triton.jit
def clear(slots_ptr, count):
    """Slots that nobody waits for any more."""
    for i in range(0, count, 512):
        o = i + tl.arange(0, 512)
        tl.store(slots_ptr + o, 0, mask=o < count)


@triton.jit
def mark_passed(slots_ptr, before, item, count, stamp):
    """By one of ``count`` items that has no more to wait for; the last one clears their slots and those before them.

    It waits until the others have passed, which were there before it: here and not at its end, where what it needs for
    this would take registers from its work.
    """
    mark(slots_ptr + before + item, stamp)
    if item == count - 1:
        wait(slots_ptr + before, count, stamp)
        clear(slots_ptr, before + count)
