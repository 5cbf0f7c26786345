"""The gradient that a spatial gate passes back to the channel-gated x in front of it."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.ops.common.tile import pixels


class SpatialGrad(NamedTuple):
    """What a spatial gate behind the channel gate adds to dy: both None without one.

    ``maps`` (N, 3, P): its gate, the gradient of its maximum, and of each channel by its mean; ``argmax`` (N, P).
    """

    maps: Tensor | None = None
    argmax: Tensor | None = None


@triton.jit
def gated_grad(b_dy, spatial, at, o_c, TILE: tl.constexpr):
    """The gradient of the channel-gated x: dy itself, or behind a spatial gate dy * gate plus that gate's pools."""
    if spatial.maps is not None:
        P = at.P
        o_p = pixels(at, TILE)
        m_p = o_p < P
        p_map = spatial.maps + at.sample * 3 * P + o_p
        b_gate = tl.load(p_map, mask=m_p, other=0)
        b_dmax = tl.load(p_map + P, mask=m_p, other=0)
        b_dmean = tl.load(p_map + 2 * P, mask=m_p, other=0)
        b_argmax = tl.load(spatial.argmax + at.sample * P + o_p, mask=m_p, other=0).to(tl.int32)
        b_dpools = tl.where(o_c[:, None] == b_argmax[None, :], (b_dmax + b_dmean)[None, :], b_dmean[None, :])
        b_dy = b_dy * b_gate[None, :] + b_dpools
    return b_dy
