"""Numbers as arguments of kernels.

A float argument is a float32. A constexpr would be exact, but each value of it would be another kernel to compile. So
the bits of a number are the argument.
"""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.lru_cache
def _bits(number: float, double: bool) -> int:
    if double:
        return struct.unpack("q", struct.pack("d", number))[0]
    return struct.unpack("i", struct.pack("f", ctypes.c_float(number).value))[0]


def number_bits(number: float, x: Tensor) -> int:
    """The bits of a number in the dtype in which kernels compute on x."""
    return _bits(float(number), x.dtype == torch.float64)


@triton.jit
def number(bits, ACC: tl.constexpr):
    """The number that has these bits (see :func:`number_bits`)."""
    if tl.float64 == ACC:
        return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)
    else:
        return tl.cast(tl.cast(bits, tl.int32), tl.float32, bitcast=True)
