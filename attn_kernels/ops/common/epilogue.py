"""The end of a residual block behind an operator: ``y = relu(y + residual)``, and its gradient.

The ReLU leaves one bit per element for backward: 1 where it let the element through, and where it is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common.layout import is_channels_last
from attn_kernels.ops.common.tile import NORMAL, tile_mask, tile_offsets


@triton.jit
def _mask_pointers(mask_ptr, at, TILE: tl.constexpr):
    """Pointers and validity of the bytes that hold a tile's bits, 8 elements along the unit stride in each."""
    if TILE.channels_last:
        o_row = at.pixel + tl.arange(0, TILE.block_p)
        o_byte = at.channel // 8 + tl.arange(0, TILE.block_c // 8)
        row_bytes = (at.C + 7) // 8
        pointers = mask_ptr + at.sample * at.P * row_bytes + (o_row[None, :] * row_bytes + o_byte[:, None])
        return pointers, (o_row < at.P)[None, :] & (o_byte < row_bytes)[:, None]
    else:
        o_row = at.channel + tl.arange(0, TILE.block_c)
        o_byte = at.pixel // 8 + tl.arange(0, TILE.block_p // 8)
        row_bytes = (at.P + 7) // 8
        pointers = mask_ptr + at.sample * at.C * row_bytes + (o_row[:, None] * row_bytes + o_byte[None, :])
        return pointers, (o_row < at.C)[:, None] & (o_byte < row_bytes)[None, :]


@triton.jit
def _store_mask(mask_ptr, b_y, at, TILE: tl.constexpr):
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    bits = tl.where(b_y <= 0, 0, 1)
    if TILE.channels_last:
        bits = tl.reshape(bits, [BLOCK_C // 8, 8, BLOCK_P]) << tl.arange(0, 8)[None, :, None]
        packed = tl.sum(bits, axis=1)
    else:
        bits = tl.reshape(bits, [BLOCK_C, BLOCK_P // 8, 8]) << tl.arange(0, 8)[None, None, :]
        packed = tl.sum(bits, axis=2)
    pointers, m = _mask_pointers(mask_ptr, at, TILE)
    tl.store(pointers, packed.to(tl.uint8), mask=m)


@triton.jit
def _load_mask(mask_ptr, at, TILE: tl.constexpr):
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    pointers, m = _mask_pointers(mask_ptr, at, TILE)
    packed = tl.load(pointers, mask=m, other=0).to(tl.int32)
    if TILE.channels_last:
        bits = packed[:, None, :] >> tl.arange(0, 8)[None, :, None]
    else:
        bits = packed[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, [BLOCK_C, BLOCK_P])


@triton.jit
def store_epilogue(
    b_y, y_ptr, residual_ptr, mask_ptr, at, RELU: tl.constexpr, TILE: tl.constexpr, EVICT: tl.constexpr = NORMAL
):
    """Store ``act(y + residual)`` of a tile, and one bit per element for backward.

    The residual may have another dtype than y's tensor. The sum is made before anything is rounded.
    """
    m = tile_mask(at, TILE)
    sample = at.sample * at.C * at.P
    offsets = tile_offsets(at, TILE)
    if residual_ptr is not None:
        b_residual = tl.load(residual_ptr + sample + offsets, mask=m, other=0, eviction_policy=EVICT)
        b_y = (b_y + b_residual.to(tl.float64 if b_residual.dtype == tl.float64 else b_y.dtype)).to(b_y.dtype)
    if RELU:
        if mask_ptr is not None:
            _store_mask(mask_ptr, b_y, at, TILE)
        b_y = tl.where(b_y <= 0, 0.0, b_y)
    tl.store(y_ptr + sample + offsets, b_y, mask=m, eviction_policy=EVICT)


@triton.jit
def load_epilogue_grad(dy_ptr, mask_ptr, dresidual_ptr, at, TILE: tl.constexpr, EVICT: tl.constexpr = NORMAL):
    """dy of a tile behind the ReLU, which is the residual's gradient too, and is stored where that is wanted."""
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    m = tile_mask(at, TILE)
    sample = at.sample * at.C * at.P
    offsets = tile_offsets(at, TILE)
    b_dy = tl.load(dy_ptr + sample + offsets, mask=m, other=0, eviction_policy=EVICT).to(ACC)
    if mask_ptr is not None:
        b_dy = tl.where(_load_mask(mask_ptr, at, TILE) != 0, b_dy, 0.0)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + sample + offsets, b_dy, mask=m, eviction_policy=EVICT)
    return b_dy


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Rows along the unit stride and bytes per row, each row padded to whole bytes."""
    n, c, h, w = x.shape
    return (n * h * w, (c + 7) // 8) if is_channels_last(x) else (n * c, (h * w + 7) // 8)


def empty_mask(x: Tensor, needed: bool) -> Tensor:
    """The bits that a ReLU leaves for backward; empty where none are needed."""
    return x.new_empty(mask_shape(x) if needed else (0, 0), dtype=torch.uint8)


def empty_dresidual(x: Tensor, needed: bool) -> Tensor:
    """The residual's gradient behind a ReLU; empty where none is needed, or dy is it."""
    return torch.empty_like(x) if needed else x.new_empty(0)


def optional(t: Tensor | None) -> Tensor | None:
    """None for an empty tensor, which stands for one that is not needed: kernels are compiled without it."""
    return None if t is None or not t.numel() else t


def residual_grad(needed: bool, dy: Tensor, dresidual: Tensor) -> Tensor | None:
    """The residual's gradient: ``dresidual`` that kernels have written behind a ReLU, else ``dy`` itself."""
    if not needed:
        return None
    return dresidual if dresidual.numel() else dy


def unmask(dy: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """``dy`` where the mask's bits are set, else 0, also where it is infinite; differentiable.

    Without a mask it is ``dy`` itself.
    """
    if not mask.numel():
        return dy
    n, c, h, w = x.shape
    bits = mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8) & 1
    if is_channels_last(x):
        kept = bits.flatten(1)[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2)
    else:
        kept = bits.flatten(1)[:, : h * w].reshape(n, c, h, w)
    return torch.where(kept.bool(), dy, 0.0)
