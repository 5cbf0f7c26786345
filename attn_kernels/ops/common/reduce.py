"""Reductions on the device: maxima with the index of the first, and sums of what programs have left, in order."""

import triton
import triton.language as tl


@triton.jit
def _bits(b):
    return b.to(tl.int64 if b.dtype == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def nowhere(m, ACC: tl.constexpr):
    """0 where m, else -inf. Added to a value it hides what is outside and turns -0 into 0, for :func:`running_max`."""
    return tl.where(m, 0.0, float("-inf")).to(ACC)


@triton.jit
def running_max(b_max, b_arg, b_x, o_x):
    """Lane by lane: only a greater value, or the first NaN, takes the place of an earlier one. x must not be -0."""
    # A maximum that is NaN stays the same NaN, so that whether bits change tells whether it is a new one. To compare
    # values with NaN in mind takes twice as many instructions.
    b_new = tl.maximum(b_max, b_x, propagate_nan=tl.PropagateNan.ALL)
    return b_new, tl.where(_bits(b_new) != _bits(b_max), o_x, b_arg)


# More than any index of a maximum.
_NO_INDEX = tl.constexpr(1 << 30)


@triton.jit
def first_max(b_max, b_arg, AXIS: tl.constexpr):
    """The maximum of lanes along an axis and its lowest index; NaN, the first one, counts as the greatest."""
    # NaN as an infinity whose index comes before those of the others.
    nan = b_max != b_max
    b_max = tl.where(nan, float("inf"), b_max)
    b_arg = tl.where(nan, b_arg - _NO_INDEX, b_arg)
    b_top = tl.max(b_max, axis=AXIS)
    first = tl.min(tl.where(b_max == tl.expand_dims(b_top, AXIS), b_arg, _NO_INDEX), axis=AXIS)
    return tl.where(first < 0, float("nan"), b_top), tl.where(first < 0, first + _NO_INDEX, first)


@triton.jit
def sum_partials(partial_ptr, i_n, o_e, m, J, SIZE, ACC: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_E] sums over J partials in a fixed order: element o_e, of SIZE, of sample i_n."""
    ROWS: tl.constexpr = 1024 // BLOCK_E  # the pointers of more spill in 4 warps with Triton 3.6
    b_sum = tl.zeros([BLOCK_E], ACC)
    for j in range(0, J, ROWS):
        o_j = j + tl.arange(0, ROWS)
        pointers = partial_ptr + (i_n[None, :] * J + o_j[:, None]) * SIZE + o_e[None, :]
        b_partial = tl.load(pointers, mask=(o_j < J)[:, None] & m[None, :], other=0, cache_modifier=".cg")
        b_sum += tl.sum(b_partial, axis=0)
    return b_sum
