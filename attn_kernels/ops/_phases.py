"""Two dependent phases in one launch: what the first one read is still in L2 where the second reads it again.

Programs do work items in the order of their numbers. The items of the first phase of a group of samples come ``lead``
groups ahead of those of its second phase, about as many as run at once; an item of the second phase waits until those
of its group's first phase are done. A program only ever waits for some of a lower number, which have started before
it: GPUs start the programs of a launch in the order of their numbers, on which NVIDIA's own scans rely likewise
(CUB, and with it PyTorch's cumsum and sort; NVIDIA/cub issue 245). The interpreter, which runs programs one after
another, never waits at all.

A program has a slot in memory, and sets it to the stamp of the launch, a number that no other launch has. So memory
need not be zeroed first, which would be a launch of its own, and belongs to one call only: streams and graphs share
none. A graph, however, replays its launches with the stamps that they were captured with: in a graph the slots are
zeroed before each replay, by a node of the graph.

Nobody waits for ever. Who has polled ``PATIENCE`` times in vain, about a second, gives up and says so in the launch's
first slot, whereupon all others give up at once. What would have come from the missing data is then NaN; indices stay
in their range and the buffers of CBAM's BatchNorm as they were.

``ATTN_KERNELS_SINGLE_LAUNCH=0`` does without waiting: the same kernels, one launch per phase.

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

# Polls of about a microsecond each.
PATIENCE = tl.constexpr(2**20)

# The phases where each is a launch, in this order. PARTS are the first phase of a single launch, in which the item of a
# divided plane's last part adds up what has to be added up: here a JOIN does. HIDDEN, GATES and REST are stretches of
# the second phase's items, WEIGHTS the programs behind those.
PARTS = tl.constexpr(0)
JOIN = tl.constexpr(1)
HIDDEN = tl.constexpr(2)
GATES = tl.constexpr(3)
REST = tl.constexpr(4)
WEIGHTS = tl.constexpr(5)


def new_stamp() -> int:
    """The stamp of a launch."""
    return next(_stamps)


def launches(
    single: bool, parts: int, join: int, hidden: int = 0, gates: int = 0, rest: int = 0, weights: int = 0
) -> list[tuple[int, int]]:
    """The phase and the number of programs of each launch, given those of each phase: all in one, or one a phase."""
    if single:
        return [(PARTS.value, parts + hidden + gates + rest + weights)]
    return [(phase, count) for phase, count in enumerate((parts, join, hidden, gates, rest, weights)) if count]


def empty_scratch(x: Tensor, elements: int, slots: int) -> tuple[Tensor, int]:
    """``elements`` in x's accumulation dtype and slots behind them, for a launch; and where these begin."""
    dtype = accumulation_dtype(x)
    begin = elements + elements % 2  # slots have 8 bytes
    scratch = torch.empty(begin + slots * (8 // dtype.itemsize), dtype=dtype, device=x.device)
    if slots and will_be_replayed(x):
        scratch[begin:].zero_()
    return scratch, begin


def will_be_replayed(x: Tensor) -> bool:
    """Whether x's launches are captured into a graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@triton.jit
def slots_pointer(scratch_ptr, begin):
    """The first slot, that of a launch that is given up; behind it are those of its programs."""
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
def phase_item(pid, phase, S, FIRST, HIDDEN_ITEMS, AHEAD, SECOND):
    """``second, group, item`` likewise, in a launch of one phase; planes are divided into S parts."""
    begin = tl.where(phase == GATES, HIDDEN_ITEMS, tl.where(phase == REST, AHEAD, 0))
    end = tl.where(phase == HIDDEN, HIDDEN_ITEMS, tl.where(phase == GATES, AHEAD, SECOND))
    end = tl.where(phase == PARTS, FIRST, tl.where(phase == JOIN, FIRST // S, end))
    group = pid // (end - begin)
    item = begin + pid % (end - begin)
    return phase >= HIDDEN, group, tl.where(phase == JOIN, item * S + S - 1, item)


@triton.jit
def mark(slot_ptr, stamp):
    tl.debug_barrier()
    tl.atomic_xchg(slot_ptr, stamp, sem="release")


@triton.jit
def wait(slots_ptr, count, given_up_ptr, stamp):
    """Until the first ``count`` slots are set; whether that was given up, so that what they stand for is missing."""
    polls = 0
    for i in range(0, count, 512):  # no fewer than a program has threads
        o = i + tl.arange(0, 512)
        pending = 1
        while (pending > 0) & (polls < PATIENCE):
            # Ahead of the atomics, behind whose acquire it would cost a round trip to L2. Warps may see it differently:
            # what counts is the maximum, which is the same for all.
            polled = tl.where(tl.load(given_up_ptr, volatile=True) == stamp, PATIENCE, 1)
            b_slots = tl.atomic_or(slots_ptr + o, 0, mask=o < count, sem="acquire")
            pending = tl.max(tl.where((b_slots != stamp) & (o < count), polled, 0), axis=0)
            polls += pending
    tl.debug_barrier()
    if polls >= PATIENCE:
        tl.atomic_xchg(given_up_ptr, stamp, sem="relaxed")
    return polls >= PATIENCE


@triton.jit
def unless(given_up, b):
    """``b``, or NaN."""
    return tl.where(given_up, float("nan"), b)
