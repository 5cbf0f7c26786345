"""Products with a layer's weights on the device, by ``tl.dot`` or, of one row, by a sum."""

import triton
import triton.language as tl


@triton.jit
def load_weight(weight_ptr, o_m, o_k, M, K, ACC: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of a layer's weights (M, K)."""
    pointers = weight_ptr + o_m[:, None].to(tl.int64) * K + o_k[None, :]
    return tl.load(pointers, mask=(o_m < M)[:, None] & (o_k < K)[None, :], other=0).to(ACC)


@triton.jit
def matmul_nt(b_rows, b_weight):
    """[ROWS, K] times [M, K] transposed."""
    if b_rows.shape[0] == 1:
        return tl.expand_dims(tl.sum(b_rows * b_weight, axis=1), 0)
    else:
        return tl.dot(b_rows, tl.trans(b_weight), input_precision="ieee", out_dtype=b_rows.dtype)


@triton.jit
def put_row(b_rows, row, b_row):
    """``b_rows`` with ``b_row`` in the place of one of its rows."""
    return tl.where((tl.arange(0, b_rows.shape[0]) == row)[:, None], b_row[None, :], b_rows)


@triton.jit
def get_row(b_rows, row):
    """One row of ``b_rows``."""
    return tl.sum(tl.where((tl.arange(0, b_rows.shape[0]) == row)[:, None], b_rows, 0.0), axis=0)
