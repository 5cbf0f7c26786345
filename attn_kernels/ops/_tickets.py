"""Two dependent phases in one launch: what the first one read is still in L2 when the second reads it again.

Programs take tickets (an atomic counter) and do the work item of their ticket. The items of the first phase of a group
of samples come ``lead`` groups ahead of those of its second phase, about as many as run at once; an item of the second
phase waits until all items of its group's first phase have signalled. Those have lower tickets, so they are done or
running: whatever the order in which a GPU starts programs, and however few fit on it, none waits for one that has not
started. The interpreter, which runs programs one after another, never waits at all.

Memory order: all threads of a program meet (a barrier) before one of them signals with release semantics, and after
one has waited with acquire semantics, at the scope of the GPU (PTX memory model, causality order). What crosses
programs is loaded past L1 (``.cg``), too. Counters start at zero and are allocated for each call, so that streams and
graphs share none, and a captured graph zeroes its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops._config import ChannelPlan


@triton.jit
def take_ticket(counters_ptr):
    return tl.atomic_add(counters_ptr, 1, sem="relaxed")


@triton.jit
def work_item(ticket, groups, lead, FIRST, SECOND, AHEAD):
    """``second, group, item``: the phase, and which of the FIRST or SECOND items of which group.

    ``lead`` groups of the first phase; then in turns a group of the first phase and one of the second, of which AHEAD
    items come before the others'; then what is left of the second. Tickets behind those are the caller's.
    """
    both = FIRST + SECOND
    u = ticket - lead * FIRST
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
    group = tl.where(at_start, ticket // divisor, tl.where(at_end, groups - lead + v // SECOND, group))
    item = tl.where(at_start, ticket % divisor, tl.where(at_end, v % SECOND, item))
    return second, group, item


@triton.jit
def signal(flag_ptr):
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def wait(flag_ptr, count):
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def is_last_of(counter_ptr, count):
    """Whether ``count - 1`` programs have been here before; what they stored earlier can be loaded then."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    tl.debug_barrier()
    return last


@triton.jit
def flag(counters_ptr, groups, PHASE: tl.constexpr, group):
    """Signalled by the items of a group: those of the first phase, and those of the second that others wait for."""
    return counters_ptr + 1 + PHASE * groups + group


@triton.jit
def done_counter(counters_ptr, groups):
    """Signalled by items of all groups, where others wait for all; in place of the third flag of the first group."""
    return flag(counters_ptr, groups, 2, 0)


@triton.jit
def split_counter(counters_ptr, groups, i):
    """Counts the programs that have done their part of the i-th sum."""
    return counters_ptr + 1 + 3 * groups + i


def counters_size(x: Tensor, plan: ChannelPlan) -> int:
    """The ticket, three flags a group, and a counter for every sum that several programs share."""
    sums = x.shape[0] * plan.blocks if plan.splits > 1 else 0
    return 1 + 3 * plan.groups + sums


def counters(x: Tensor, plan: ChannelPlan, more: int = 0) -> Tensor:
    """The counters and ``more`` integers, at zero."""
    return torch.zeros(counters_size(x, plan) + more, dtype=torch.int32, device=x.device)
