"""Channel attention by any gate: ``y = act(x * gate(pools of x) + residual)``, the gate's network left to PyTorch.

For gates that ``channel_gate`` has no kernel for: a BatchNorm between the layers, a mixture of pools, a single layer,
another activation. The full-size tensors are fused in two operators; the network between them works on (N, C) values.
|x| is the bytes of x.

- pool: the means and maxima of the planes from one read of x, |x|. Backward: dx from one read of dy, the gradient by
  way of the scale included, 2|x|.
- scale: reads x, writes y, 2|x| (+ |x| residual). Backward: reads dy and x for the gate's gradient, 2|x| (+ |x| for dy
  behind the ReLU, which is the residual's gradient).
Forward 3|x|, backward 4|x|. Saved: x, the argmax and the gate; one bit per element with ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common import device, tiling
from attn_kernels.ops.common.epilogue import (
    empty_dresidual,
    empty_mask,
    load_epilogue_grad,
    optional,
    store_epilogue,
    unmask,
)
from attn_kernels.ops.common.excite import Sizes
from attn_kernels.ops.common.gate_plan import channel_plan
from attn_kernels.ops.common.grid_sync import Sync, empty_scratch, flags_pointer, launches, phase_task, signal
from attn_kernels.ops.common.layout import contiguous, like
from attn_kernels.ops.common.operator import (
    needs_grad,
    reference_gradients,
    register,
    save_tensors,
    saved_tensors,
)
from attn_kernels.ops.common.pools import POOLS, Extent, empty_argmax, pool_bits, pools_of
from attn_kernels.ops.common.squeeze import scratch_pointers, squeeze_planes, workspace
from attn_kernels.ops.common.tile import (
    Place,
    aligned,
    at_pixel,
    channel_block,
    channels,
    load_tile,
    pixels,
    store_tile,
)
from attn_kernels.ops.common.tiling import Tile, cdiv, geometry, plane_tile
from reference._common import accumulation_dtype
from reference.cbam import POOLS as FORMULAS


@triton.jit(do_not_specialize=["flags", "epoch", "N"], do_not_specialize_on_alignment=["S"])
def squeeze_kernel(
    x_ptr,  # (N, C, P)
    pool_ptr,  # (N, K, C), written
    argmax_ptr,  # (N, C), written if there is a maximum
    scratch_ptr,  # the workspace of split planes, written
    flags,  # where they begin in scratch
    epoch,  # of a single launch, else its phase
    N,
    S,  # parts of a plane
    extent,  # C, P, no hidden units, and pixels of a part
    POOLS: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The pools alone. Reads x."""
    C, P = aligned(extent.C, extent.P, TILE)
    size = Sizes(N, C, P, 0, S, extent.chunk)
    J = tl.cdiv(C, TILE.block_c)
    if WORK.single:
        group = tl.program_id(0) // (J * S)
        task = tl.program_id(0) % (J * S)
    else:
        _, group, task = phase_task(tl.program_id(0), epoch, S, J * S, 0, 0, 0)
    scratch = scratch_pointers(scratch_ptr, size, J, POOLS, WORK.joined)
    given_up_ptr = flags_pointer(scratch_ptr, flags)
    p_flags = given_up_ptr + 1 + group * J * S
    sync = Sync(given_up_ptr, p_flags, p_flags, epoch)
    squeeze_planes(x_ptr, None, pool_ptr, argmax_ptr, scratch, sync, group, task, size, True, POOLS, WORK, TILE)
    if WORK.joined:
        signal(p_flags + task, sync, WORK.single)


@triton.jit
def scale_fwd_kernel(
    x_ptr,  # (N, C, P)
    residual_ptr,  # (N, C, P) or None
    gate_ptr,  # (N, C)
    y_ptr,  # (N, C, P), written
    mask_ptr,  # bits of the ReLU, written, or None
    C,
    P,
    RELU: tl.constexpr,
    TILE: tl.constexpr,
):
    """y of BLOCK_C channels by BLOCK_P pixels. Reads x (and residual), writes y."""
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    at = _tile_of_program(C, P, TILE)
    b_gate = _load_channels(gate_ptr, at.sample, at, ACC, TILE)
    b_y = load_tile(x_ptr, at, TILE) * b_gate[:, None]
    store_epilogue(b_y, y_ptr, residual_ptr, mask_ptr, at, RELU, TILE)


@triton.jit
def _tile_of_program(C, P, TILE: tl.constexpr):
    """Its place; the pixels of a block of channels follow one another."""
    pixel_blocks = tl.cdiv(P, TILE.block_p)
    planes = tl.program_id(0) // pixel_blocks
    channel_blocks = tl.cdiv(C, TILE.block_c)
    c = planes % channel_blocks * TILE.block_c
    i_n = (planes // channel_blocks).to(tl.int64)
    return Place(i_n, c, tl.program_id(0) % pixel_blocks * TILE.block_p, C, P)


@triton.jit
def _load_channels(ptr, row, at, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """[BLOCK_C] values of a row from (rows, C)."""
    o_c = channels(at, TILE)
    return tl.load(ptr + row * at.C + o_c, mask=o_c < at.C, other=0).to(DTYPE)


@triton.jit
def dgate_kernel(
    dy_ptr,  # (N, C, P)
    mask_ptr,  # bits of the ReLU, or None
    x_ptr,  # (N, C, P)
    dresidual_ptr,  # (N, C, P), written, or None: dy behind the ReLU
    dgate_ptr,  # (N, C), written
    C,
    P,
    TILE: tl.constexpr,
):
    """dgate[c] = sum_p dy * x of BLOCK_C planes. Reads dy and x."""
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_P: tl.constexpr = TILE.block_p
    C, P = aligned(C, P, TILE)
    at = channel_block(tl.program_id(0), C, P, TILE)
    o_c = channels(at, TILE)
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], dgate_ptr.dtype.element_ty)
    for p in range(0, P, BLOCK_P):
        b_dy = load_epilogue_grad(dy_ptr, mask_ptr, dresidual_ptr, at_pixel(at, p), TILE)
        b_sum += b_dy * load_tile(x_ptr, at_pixel(at, p), TILE)
    tl.store(dgate_ptr + at.sample * C + o_c, tl.sum(b_sum, axis=1), mask=o_c < C)


@triton.jit
def dx_kernel(
    dy_ptr,  # (N, C, P), behind the ReLU
    gate_ptr,  # (N, C)
    dpool_ptr,  # (N, K, C)
    argmax_ptr,  # (N, C), or None
    dx_ptr,  # (N, C, P), written
    C,
    P,
    POOLS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx = dy * gate + dmean / P + dmax at the first maximum, of BLOCK_C channels by BLOCK_P pixels. Reads dy."""
    C, P = aligned(C, P, TILE)
    ACC: tl.constexpr = dpool_ptr.dtype.element_ty
    K: tl.constexpr = POOLS.K
    at = _tile_of_program(C, P, TILE)
    b_gate = _load_channels(gate_ptr, at.sample, at, ACC, TILE)
    b_dx = load_tile(dy_ptr, at, TILE) * b_gate[:, None]
    if POOLS.avg:
        b_dx += (_load_channels(dpool_ptr, at.sample * K, at, ACC, TILE) / P)[:, None]
    if POOLS.max:
        b_first = _load_channels(argmax_ptr, at.sample, at, tl.int32, TILE)
        b_dmax = _load_channels(dpool_ptr + POOLS.avg * C, at.sample * K, at, ACC, TILE)
        b_dx += tl.where(pixels(at, TILE)[None, :] == b_first[:, None], b_dmax[:, None], 0.0)
    store_tile(b_dx, dx_ptr, at, TILE)


def _tile(x: Tensor, split: bool) -> tuple[Tile, int]:
    """A tile of x, and how many of them divide it, or divide its planes into whole ones."""
    n, c, h, w = x.shape
    tile = plane_tile(geometry(x), split)
    programs = n * cdiv(c, tile.block_c)
    return tile, programs * cdiv(h * w, tile.block_p) if split else programs


def _allocate_pool(x: Tensor, pools: int) -> tuple[Tensor, Tensor]:
    n, c, _, _ = x.shape
    return x.new_empty((n, pools.bit_count(), c), dtype=accumulation_dtype(x)), empty_argmax(x, pools)


def _launch_pool(outputs: tuple[Tensor, Tensor], x: Tensor, pools: int) -> None:
    n, c, h, w = x.shape
    values, argmax = outputs
    plan = channel_plan(geometry(x), 0, device.SINGLE_LAUNCH, tile_elements=tiling.TILE // 2)
    scratch, flags, joins = values, 0, 0  # of whole planes nothing is left
    if plan.is_split:
        size = workspace.fn(n, c, 0, plan.splits, 0, pools_of(pools), True).size
        scratch, flags = empty_scratch(x, size, 1 + n * plan.tasks if plan.single_launch else 0)
        joins = n * plan.blocks
    tile = plan.tile._replace(maxnreg=None)
    for epoch, programs in launches(plan.single_launch, n * plan.tasks, joins):
        squeeze_kernel[(programs,)](
            x_ptr=x,
            pool_ptr=values,
            argmax_ptr=argmax,
            scratch_ptr=scratch,
            flags=flags,
            epoch=epoch,
            N=n,
            S=plan.splits,
            extent=Extent(c, h * w, 0, plan.chunk),
            POOLS=pools_of(pools),
            WORK=plan.work(0, plan.is_split),
            TILE=tile,
            **tile.options,
        )


def _allocate_scale(x: Tensor, gate: Tensor, residual: Tensor | None, relu: bool, save: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_mask(x, relu and save)


def _launch_scale(
    outputs: tuple[Tensor, Tensor], x: Tensor, gate: Tensor, residual: Tensor | None, relu: bool, save: bool
) -> None:
    _, c, h, w = x.shape
    y, mask = outputs
    tile, programs = _tile(x, split=True)
    scale_fwd_kernel[(programs,)](
        x_ptr=x,
        residual_ptr=residual,
        gate_ptr=gate,
        y_ptr=y,
        mask_ptr=optional(mask),
        C=c,
        P=h * w,
        RELU=relu,
        TILE=tile,
        **tile.options,
    )


def _allocate_dgate(dy: Tensor, x: Tensor, mask: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x)), empty_dresidual(x, relu)


def _launch_dgate(outputs: tuple[Tensor, Tensor], dy: Tensor, x: Tensor, mask: Tensor, relu: bool) -> None:
    _, c, h, w = x.shape
    dgate, dresidual = outputs
    tile, programs = _tile(x, split=False)
    dgate_kernel[(programs,)](
        dy_ptr=like(dy, x),
        mask_ptr=optional(mask),
        x_ptr=x,
        dresidual_ptr=optional(dresidual),
        dgate_ptr=dgate,
        C=c,
        P=h * w,
        TILE=tile,
        **tile.options,
    )


def _allocate_dx(dy: Tensor, gate: Tensor, dpool: Tensor, argmax: Tensor, pools: int) -> Tensor:
    return torch.empty_like(dy)


def _launch_dx(dx: Tensor, dy: Tensor, gate: Tensor, dpool: Tensor, argmax: Tensor, pools: int) -> None:
    _, c, h, w = dy.shape
    tile, programs = _tile(dy, split=True)
    dx_kernel[(programs,)](
        dy_ptr=dy,
        gate_ptr=gate,
        dpool_ptr=dpool,
        argmax_ptr=optional(argmax),
        dx_ptr=dx,
        C=c,
        P=h * w,
        POOLS=pools_of(pools),
        TILE=tile,
        **tile.options,
    )


pool_op = register("channel_pool(Tensor x, int pools) -> (Tensor, Tensor)", _allocate_pool, _launch_pool)
scale_op = register(
    "channel_scale(Tensor x, Tensor gate, Tensor? residual, bool relu, bool save) -> (Tensor, Tensor)",
    _allocate_scale,
    _launch_scale,
)
dgate_op = register(
    "channel_dgate(Tensor dy, Tensor x, Tensor mask, bool relu) -> (Tensor, Tensor)", _allocate_dgate, _launch_dgate
)
dx_op = register(
    "channel_dx(Tensor dy, Tensor gate, Tensor dpool, Tensor argmax, int pools) -> Tensor", _allocate_dx, _launch_dx
)


class _Pool(torch.autograd.Function):
    """x to its pools; and to two slots, which nobody reads, of the shapes of x and the gate.

    dx is computed here, since it needs the network's gradients. The backward of the scale comes first, and hands over
    dy behind the ReLU and the gate as the "gradients" of the slots.
    """

    @staticmethod
    def forward(ctx, x, pools):
        values, argmax = pool_op(x, pools)
        save_tensors(ctx, x, argmax)
        ctx.pools = pools
        # view_as may change strides
        return values, torch.ops.aten.alias(x), torch.empty_like(values[:, 0])

    @staticmethod
    def backward(ctx, dpool, dy, gate):
        x, argmax = saved_tensors(ctx)
        if torch.is_grad_enabled():
            names = [name for i, name in enumerate(POOLS) if ctx.pools >> i & 1]

            def formula(x):
                return torch.stack([FORMULAS[name](x) for name in names], 1)

            return *reference_gradients(formula, (x,), (dpool,)), None
        return dx_op(like(dy, x), *contiguous(gate, dpool), argmax, ctx.pools), None


class _Scale(torch.autograd.Function):
    """x, the gate and the residual to y; the gradient of x goes by the slots, unless it will be differentiated."""

    @staticmethod
    def forward(ctx, x, gate, residual, relu, *slots):
        y, mask = scale_op(x, gate, residual, relu, True)
        save_tensors(ctx, x, gate, mask)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, mask = saved_tensors(ctx)
        need_dresidual, to_slots = ctx.needs_input_grad[2], [None] * (len(ctx.needs_input_grad) - 4)
        if torch.is_grad_enabled():
            dy = unmask(dy, mask, x)
            gradients = reference_gradients(_scaled, (x, gate), (dy,))
            return *gradients, dy if need_dresidual else None, None, *to_slots
        dgate, dresidual = dgate_op(dy, x, mask, ctx.relu)
        dy = dresidual if ctx.relu else dy
        if to_slots:
            to_slots = dy, gate.to(accumulation_dtype(x))
        return None, dgate.to(gate.dtype), dy if need_dresidual else None, None, *to_slots


def _scaled(x, gate):
    return x * gate.to(x.dtype)[:, :, None, None]


def channel_attention(
    x: Tensor, gate: Callable[..., Tensor], pool_types: Sequence[str], residual: Tensor | None, relu: bool
) -> Tensor:
    """The fused operators, differentiable; ``x`` and ``residual`` (N, C, H, W), dense in the same layout."""
    bits = pool_bits(pool_types)
    values, *slots = _Pool.apply(x, bits) if needs_grad(x) else pool_op(x, bits)[:1]
    order = sorted(pool_types, key=POOLS.index)
    (scale,) = contiguous(gate(*(values[:, order.index(name)] for name in pool_types)))
    if needs_grad(x, scale, residual):
        return _Scale.apply(x, scale, residual, relu, *slots)
    return scale_op(x, scale, residual, relu, False)[0]
