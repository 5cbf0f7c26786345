"""Contiguous and channels_last tensors: which of the two a tensor is, and tensors brought into one of them."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channel has the unit stride: a dense NHWC tensor that is not also a dense NCHW one."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is dense in one of the two layouts."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def layout(x: Tensor) -> torch.memory_format:
    """The layout that the kernels run in: ``x``'s own where it is dense in one, else the nearer of the two."""
    return torch.contiguous_format if x.is_contiguous() or x.stride(1) != 1 else torch.channels_last


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is dense in one of the two layouts, else a copy in the nearer of the two."""
    return x if is_dense(x) else x.contiguous(memory_format=layout(x))


def in_layout_of(x: Tensor, t: Tensor) -> Tensor:
    """``t`` in ``x``'s layout; itself where it already is (it may come expanded or transposed)."""
    return t.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in ``x``'s dtype and layout; itself where it already is, as gradients are as a rule."""
    return in_layout_of(x, t.to(x.dtype))


def contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters as the kernels read them; they come so, as a rule."""
    return [None if p is None else p.contiguous() for p in parameters]


def factors(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters as kernels read them that multiply matrices.

    In float64 where x is: of 16-bit loads Triton cannot make the operands of a float64 product.
    """
    if x.dtype == torch.float64:
        parameters = [None if p is None else p.to(x.dtype) for p in parameters]
    return contiguous(*parameters)
