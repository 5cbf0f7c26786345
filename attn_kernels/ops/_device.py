"""Device functions that several operators share: programs, offsets, activations, the residual + ReLU tail.

A tile is [BLOCK_C, BLOCK_P], channels by pixels of one sample, in both layouts: which axis has the unit stride is the
constexpr CHANNELS_LAST. The offset of a sample is 64 bits wide, within a sample 32 (see functional.is_fused), which
saves a register an element. A pointer may be None: the kernel is compiled without it. EVICT is a tile's eviction policy
in L2: "evict_first" for what the launch does not need again.
"""

import triton
import triton.language as tl

# The default of EVICT. A plain string as a default is nothing that Triton 3.6 compiles.
NORMAL = tl.constexpr("")


@triton.jit
def aligned(C, P, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """C and P, of which the compiler learns that rows along the unit stride are multiples of UNIT (it knows of 16)."""
    if UNIT > 1:
        if CHANNELS_LAST:
            C = C // UNIT * UNIT
        else:
            P = P // UNIT * UNIT
    return C, P


@triton.jit
def tile_offsets(o_c, o_p, C, P, CHANNELS_LAST: tl.constexpr):
    """Element offsets within a sample, [BLOCK_C, BLOCK_P]."""
    if CHANNELS_LAST:
        return o_p[None, :] * C + o_c[:, None]
    else:
        return o_c[:, None] * P + o_p[None, :]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    # Comparisons are written so that NaN stays NaN.
    if ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "leaky_relu":
        y = tl.where(x > 0, x, 0.01 * x)
    else:  # hardswish
        y = x * hardsigmoid(x)
    return y


@triton.jit
def activate_bwd(dy, x, ACTIVATION: tl.constexpr):
    """The gradient of the activation at x. It selects where it can, since 0 times an infinite dy would be NaN."""
    if ACTIVATION == "relu":
        dx = tl.where(x <= 0, 0.0, dy)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        dx = dy * (s * (1 + x * (1 - s)))
    elif ACTIVATION == "gelu":
        dx = dy * (0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "leaky_relu":
        dx = tl.where(x > 0, dy, 0.01 * dy)
    else:  # hardswish
        dx = tl.where(x <= -3, 0.0, tl.where(x >= 3, dy, dy * (x / 3 + 0.5)))
    return dx


@triton.jit
def hardsigmoid(x):
    y = x + 3
    y = tl.where(y <= 0, 0.0, y)
    return tl.where(y >= 6, 6.0, y) / 6


@triton.jit
def gate_value(logit, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return tl.sigmoid(logit)
    else:
        return hardsigmoid(logit)


@triton.jit
def gate_bwd(dy, gate, GATE: tl.constexpr):
    """The gradient of the gate, from its value."""
    if GATE == "sigmoid":
        return dy * (gate * (1 - gate))
    else:
        return tl.where((gate <= 0) | (gate >= 1), 0.0, dy / 6)  # dy where the gate is NaN, as ReLU6 has it


@triton.jit
def _mask_pointers(
    mask_ptr, i_n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Pointers and validity of the bytes that hold a tile's bits, 8 elements along the unit stride in each."""
    if CHANNELS_LAST:
        o_row = p + tl.arange(0, BLOCK_P)
        o_byte = c // 8 + tl.arange(0, BLOCK_C // 8)
        bytes_a_row = (C + 7) // 8
        pointers = mask_ptr + i_n * P * bytes_a_row + (o_row[None, :] * bytes_a_row + o_byte[:, None])
        return pointers, (o_row < P)[None, :] & (o_byte < bytes_a_row)[:, None]
    else:
        o_row = c + tl.arange(0, BLOCK_C)
        o_byte = p // 8 + tl.arange(0, BLOCK_P // 8)
        bytes_a_row = (P + 7) // 8
        pointers = mask_ptr + i_n * C * bytes_a_row + (o_row[:, None] * bytes_a_row + o_byte[None, :])
        return pointers, (o_row < C)[:, None] & (o_byte < bytes_a_row)[None, :]


@triton.jit
def _store_mask(
    mask_ptr, y, i_n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    bits = tl.where(y <= 0, 0, 1)
    if CHANNELS_LAST:
        bits = tl.reshape(bits, [BLOCK_C // 8, 8, BLOCK_P]) << tl.arange(0, 8)[None, :, None]
        packed = tl.sum(bits, axis=1)
    else:
        bits = tl.reshape(bits, [BLOCK_C, BLOCK_P // 8, 8]) << tl.arange(0, 8)[None, None, :]
        packed = tl.sum(bits, axis=2)
    pointers, m = _mask_pointers(mask_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    tl.store(pointers, packed.to(tl.uint8), mask=m)


@triton.jit
def _load_mask(mask_ptr, i_n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    pointers, m = _mask_pointers(mask_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    packed = tl.load(pointers, mask=m, other=0).to(tl.int32)
    if CHANNELS_LAST:
        bits = packed[:, None, :] >> tl.arange(0, 8)[None, :, None]
    else:
        bits = packed[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, [BLOCK_C, BLOCK_P])


@triton.jit
def store_tail(
    y,
    y_ptr,
    residual_ptr,
    mask_ptr,
    i_n,
    c,
    p,
    C,
    P,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVICT: tl.constexpr = NORMAL,
):
    """Store ``act(y + residual)`` for the tile at channel c, pixel p of sample i_n; a bit an element for backward.

    The residual may have another dtype than y's tensor. The sum is made before anything is rounded.
    """
    o_c = c + tl.arange(0, BLOCK_C)
    o_p = p + tl.arange(0, BLOCK_P)
    m = (o_c < C)[:, None] & (o_p < P)[None, :]
    sample = i_n * C * P
    offsets = tile_offsets(o_c, o_p, C, P, CHANNELS_LAST)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + sample + offsets, mask=m, other=0, eviction_policy=EVICT)
        y = (y + residual.to(tl.float64 if residual.dtype == tl.float64 else y.dtype)).to(y.dtype)
    if RELU:
        if mask_ptr is not None:
            _store_mask(mask_ptr, y, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        y = tl.where(y <= 0, 0.0, y)
    tl.store(y_ptr + sample + offsets, y, mask=m, eviction_policy=EVICT)


@triton.jit
def load_tail_grad(
    dy_ptr,
    mask_ptr,
    dresidual_ptr,
    i_n,
    c,
    p,
    C,
    P,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EVICT: tl.constexpr = NORMAL,
):
    """dy of a tile behind the ReLU, which is also the residual's gradient and is stored as such where it is wanted."""
    o_c = c + tl.arange(0, BLOCK_C)
    o_p = p + tl.arange(0, BLOCK_P)
    m = (o_c < C)[:, None] & (o_p < P)[None, :]
    sample = i_n * C * P
    offsets = tile_offsets(o_c, o_p, C, P, CHANNELS_LAST)
    dy = tl.load(dy_ptr + sample + offsets, mask=m, other=0, eviction_policy=EVICT).to(ACC)
    if mask_ptr is not None:
        dy = tl.where(_load_mask(mask_ptr, i_n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P) != 0, dy, 0.0)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + sample + offsets, dy, mask=m, eviction_policy=EVICT)
    return dy


@triton.jit
def load_tile(
    x_ptr, i_n, c, p, C, P, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, EVICT: tl.constexpr = NORMAL,
):  # fmt: skip
    """x of the tile at channel c, pixel p of sample i_n; 0 outside."""
    o_c = c + tl.arange(0, BLOCK_C)
    o_p = p + tl.arange(0, BLOCK_P)
    m = (o_c < C)[:, None] & (o_p < P)[None, :]
    pointers = x_ptr + i_n * C * P + tile_offsets(o_c, o_p, C, P, CHANNELS_LAST)
    return tl.load(pointers, mask=m, other=0, eviction_policy=EVICT).to(ACC)


@triton.jit
def load_elements(x_ptr, i_n, o_c, o_p, m, C, P, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """x of sample i_n, one element at each channel o_c and pixel o_p where m, 0 elsewhere."""
    offsets = o_p * C + o_c if CHANNELS_LAST else o_c * P + o_p
    return tl.load(x_ptr + i_n * C * P + offsets, mask=m, other=0).to(ACC)


@triton.jit
def store_tile(
    x, x_ptr, i_n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    EVICT: tl.constexpr = NORMAL,
):  # fmt: skip
    o_c = c + tl.arange(0, BLOCK_C)
    o_p = p + tl.arange(0, BLOCK_P)
    m = (o_c < C)[:, None] & (o_p < P)[None, :]
    pointers = x_ptr + i_n * C * P + tile_offsets(o_c, o_p, C, P, CHANNELS_LAST)
    tl.store(pointers, x, mask=m, eviction_policy=EVICT)


@triton.jit
def number(bits, ACC: tl.constexpr):
    """The number of which ``_launch.number_bits`` has the bits."""
    if tl.float64 == ACC:
        return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)
    else:
        return tl.cast(tl.cast(bits, tl.int32), tl.float32, bitcast=True)


@triton.jit
def update_running(running_ptr, value, factor, mask):
    """BatchNorm's running average of a statistic of the batch, in place."""
    old = tl.load(running_ptr, mask=mask).to(value.dtype)
    tl.store(running_ptr, (1 - factor) * old + factor * value, mask=mask)
