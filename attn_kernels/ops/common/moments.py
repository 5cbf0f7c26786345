"""BatchNorm's statistics on the device."""

import triton
import triton.language as tl


@triton.jit
def update_running(running_ptr, value, factor, mask):
    """BatchNorm's running average of a statistic of the batch, in place."""
    old = tl.load(running_ptr, mask=mask).to(value.dtype)
    tl.store(running_ptr, (1 - factor) * old + factor * value, mask=mask)
