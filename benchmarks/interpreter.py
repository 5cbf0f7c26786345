"""Triton's interpreter, made to round as a GPU does."""

from __future__ import annotations

import functools

import numpy as np
import torch


@functools.cache
def round_to_nearest() -> None:
    """Round float32 to the nearest bfloat16: the interpreter truncates, which doubles the error and biases sums."""
    import triton.language as tl  # here, for Triton has to be imported after TRITON_INTERPRET is set
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.cast_impl

    def cast_impl(builder, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return truncate(builder, source, target)

    InterpreterBuilder.cast_impl = cast_impl
