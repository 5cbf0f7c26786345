"""The tasks of a launch in the order of its programs, by the kernels' own function; needs the interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from attn_kernels.ops.common.grid_sync import ordered_task


@triton.jit
def _order_kernel(out_ptr, groups, lookahead, FIRST, SECOND, AHEAD, count, BLOCK: tl.constexpr):
    pid = tl.arange(0, BLOCK)
    second, group, task = ordered_task(pid, groups, lookahead, FIRST, SECOND, AHEAD)
    tl.store(out_ptr + pid, second.to(tl.int32), mask=pid < count)
    tl.store(out_ptr + count + pid, group, mask=pid < count)
    tl.store(out_ptr + 2 * count + pid, task, mask=pid < count)


def work_order(count: int, groups: int, lookahead: int, first: int, second: int, ahead: int) -> NDArray:
    """(3, count): for each program whether its task is one of the second phase, its group, and its number there."""
    out = torch.zeros(3, count, dtype=torch.int32)
    _order_kernel[(1,)](out, groups, lookahead, first, second, ahead, count, BLOCK=triton.next_power_of_2(count))
    return out.numpy()
