"""Two dependent phases in one launch: the second reads again, from L2, what the first one read (see ops/README.md).

Programs do tasks in the order of their numbers. The first-phase tasks of a group of samples come ``lookahead`` groups
ahead of those of its second phase, about as many as run at once; a task of the second phase waits until those of its
group's first phase are done. A program only ever waits for some of a lower number, which have started before it: GPUs
start the programs of a launch in the order of their numbers, on which NVIDIA's own scans rely likewise (CUB, and with
it PyTorch's cumsum and sort; NVIDIA/cub issue 245). The interpreter, which runs programs one after another, never
waits at all.

A task has a flag in memory, and sets it to the epoch of the launch, a number that no other launch has. So memory need
not be zeroed first, which would be a launch of its own, and belongs to one call only: streams and graphs share none.
A graph, however, replays its launches with the epochs that they were captured with: in a graph the flags are zeroed
before each replay, by a node of the graph.

Nobody waits for ever. A program that has polled ``PATIENCE`` times in vain, about a second, gives up and says so in the
launch's first flag, whereupon all others give up at once. Values that depend on the missing data are then NaN; indices
stay in their range and the buffers of CBAM's BatchNorm as they were.

``ATTN_KERNELS_SINGLE_LAUNCH=0`` does without waiting: the same kernels, one launch per phase.

Memory order: all threads of a program meet (a barrier) before one of them sets its flag with release semantics, and
after they have found others' set with acquire semantics, at the scope of the GPU (PTX memory model, causality order).
Data that crosses programs is loaded with ``.cg`` as well. It must not be prefetched, for cp.async may take it through
L1, which the memory model does not order: a launch whose programs exchange data takes Triton's num_stages=1.
"""

from __future__ import annotations

import itertools
import secrets
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference._common import accumulation_dtype

# Of 2^62 to 2^63, so that every epoch is an int64 argument.
_epochs = itertools.count(2**62 + secrets.randbits(61))

# Polls of about a microsecond each.
PATIENCE = tl.constexpr(2**20)

# The phases where each is a launch, in this order. PARTS are the tasks of the first phase. In a single launch the task
# of a split plane's last part also adds up the sums of all parts; among plain launches JOIN does. HIDDEN, GATES and
# REST are the tasks of the second phase, WEIGHTS those behind them.
PARTS = tl.constexpr(0)
JOIN = tl.constexpr(1)
HIDDEN = tl.constexpr(2)
GATES = tl.constexpr(3)
REST = tl.constexpr(4)
WEIGHTS = tl.constexpr(5)


def new_epoch() -> int:
    """The epoch of a launch."""
    return next(_epochs)


def launches(
    single: bool, parts: int, join: int, hidden: int = 0, gates: int = 0, rest: int = 0, weights: int = 0
) -> list[tuple[int, int]]:
    """``(epoch, programs)`` of the single launch, or ``(phase, programs)`` of each phase that has programs."""
    if single:
        return [(new_epoch(), parts + hidden + gates + rest + weights)]
    return [(phase, count) for phase, count in enumerate((parts, join, hidden, gates, rest, weights)) if count]


def empty_scratch(x: Tensor, elements: int, flags: int) -> tuple[Tensor, int]:
    """``elements`` in x's accumulation dtype and flags behind them, for a launch; and where these begin."""
    dtype = accumulation_dtype(x)
    begin = elements + elements % 2  # flags have 8 bytes
    scratch = torch.empty(begin + flags * (8 // dtype.itemsize), dtype=dtype, device=x.device)
    if flags and will_be_replayed(x):
        scratch[begin:].zero_()
    return scratch, begin


def will_be_replayed(x: Tensor) -> bool:
    """Whether x's launches are captured into a graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Sync(NamedTuple):
    """Pointers to the flag of a launch that is given up, and to a group's first-phase and hidden flags; the epoch.

    In a launch of one phase there are no flags, and the phase is in the place of the epoch.
    """

    given_up: tl.tensor
    first: tl.tensor
    hidden: tl.tensor
    epoch: tl.tensor


@triton.jit
def flags_pointer(scratch_ptr, begin):
    """The first flag, that of a launch that is given up; behind it are those of its tasks."""
    return (scratch_ptr + begin).to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def group_flags(scratch_ptr, begin, epoch, groups, group, FIRST, HIDDEN_TASKS):
    """The flags of all groups' FIRST tasks come before those of the hidden layers."""
    given_up_ptr = flags_pointer(scratch_ptr, begin)
    p_hidden = given_up_ptr + 1 + groups * FIRST + group * HIDDEN_TASKS
    return Sync(given_up_ptr, given_up_ptr + 1 + group * FIRST, p_hidden, epoch)


@triton.jit
def task_of(pid, epoch, groups, lookahead, S, FIRST, HIDDEN_TASKS, AHEAD, SECOND, SINGLE: tl.constexpr):
    """``second, group, task`` of a program: the phase, and which of the FIRST or SECOND tasks of which group."""
    if SINGLE:
        second, group, task = ordered_task(pid, groups, lookahead, FIRST, SECOND, AHEAD)
    else:
        second, group, task = phase_task(pid, epoch, S, FIRST, HIDDEN_TASKS, AHEAD, SECOND)
    return second, group, task


@triton.jit
def ordered_task(pid, groups, lookahead, FIRST, SECOND, AHEAD):
    """As :func:`task_of`, in a single launch; planes' parts are tasks of their own.

    ``lookahead`` groups of the first phase; then in turns a group of the first phase and one of the second, of which
    AHEAD tasks come before the others'; then the rest of the second. Programs behind those are the caller's.
    """
    both = FIRST + SECOND
    u = pid - lookahead * FIRST
    steady = (groups - lookahead) * both
    turn = u // both
    k = u % both
    is_first = (k >= AHEAD) & (k < AHEAD + FIRST)
    v = u - steady
    at_start = u < 0
    at_end = v >= 0
    second = ~at_start & (at_end | ~is_first)
    group = tl.where(is_first, turn + lookahead, turn)
    task = tl.where(is_first, k - AHEAD, tl.where(k < AHEAD, k, k - FIRST))
    divisor = tl.maximum(FIRST, 1)
    group = tl.where(at_start, pid // divisor, tl.where(at_end, groups - lookahead + v // SECOND, group))
    task = tl.where(at_start, pid % divisor, tl.where(at_end, v % SECOND, task))
    return second, group, task


@triton.jit
def phase_task(pid, phase, S, FIRST, HIDDEN_TASKS, AHEAD, SECOND):
    """As :func:`task_of`, in a launch of one phase; planes are split into S parts."""
    begin = tl.where(phase == GATES, HIDDEN_TASKS, tl.where(phase == REST, AHEAD, 0))
    end = tl.where(phase == HIDDEN, HIDDEN_TASKS, tl.where(phase == GATES, AHEAD, SECOND))
    end = tl.where(phase == PARTS, FIRST, tl.where(phase == JOIN, FIRST // S, end))
    group = pid // (end - begin)
    task = begin + pid % (end - begin)
    return phase >= HIDDEN, group, tl.where(phase == JOIN, task * S + S - 1, task)


@triton.jit
def signal(flag_ptr, sync, SINGLE: tl.constexpr):
    """Set a task's flag, where phases share a launch."""
    if SINGLE:
        tl.debug_barrier()
        tl.atomic_xchg(flag_ptr, sync.epoch, sem="release")


@triton.jit
def wait(flags_ptr, count, sync, SINGLE: tl.constexpr):
    """Until the first ``count`` flags are set, where phases share a launch.

    Returns whether that was given up, so that the data that the flags stand for is missing.
    """
    if SINGLE:
        polls = 0
        for i in range(0, count, 512):  # at least as many as a program has threads
            o = i + tl.arange(0, 512)
            pending = 1
            while (pending > 0) & (polls < PATIENCE):
                # Ahead of the atomics, behind whose acquire it would cost a round trip to L2. Warps may see it
                # differently: the maximum counts, which is the same for all.
                polled = tl.where(tl.load(sync.given_up, volatile=True) == sync.epoch, PATIENCE, 1)
                b_flags = tl.atomic_or(flags_ptr + o, 0, mask=o < count, sem="acquire")
                pending = tl.max(tl.where((b_flags != sync.epoch) & (o < count), polled, 0), axis=0)
                polls += pending
        tl.debug_barrier()
        if polls >= PATIENCE:
            tl.atomic_xchg(sync.given_up, sync.epoch, sem="relaxed")
        return polls >= PATIENCE
    else:
        return sync.epoch < 0  # False, of the same type


@triton.jit
def unless(given_up, b):
    """``b``, or NaN."""
    return tl.where(given_up, float("nan"), b)
