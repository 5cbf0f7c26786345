"""Channel attention with a gate of the caller's: what SE, ESE and their variants have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from reference._common import check_choice, check_input, check_parameter, epilogue, without_autocast
from reference.cbam import POOLS, check_pool_types

GATED_POOLS = ("avg", "max")


def check_channel_attention(x, gate, *, pool_types=("avg",), residual=None, activation=None):
    """Raise what :func:`channel_attention` raises for these arguments."""
    check_input(x, residual, activation)
    check_pool_types(pool_types)
    for pool in pool_types:
        check_choice("pool_types", pool, GATED_POOLS)
    if not callable(gate):
        raise TypeError(f"gate: expected a function of the pooled (N, C) tensors, got {type(gate).__name__}")


def check_gate(scale: Tensor, x: Tensor) -> Tensor:
    """``scale`` itself, which ``gate`` has returned."""
    check_parameter("gate(...)", scale, tuple(x.shape[:2]), x)
    return scale


def channel_attention(
    x: Tensor,
    gate: Callable[..., Tensor],
    *,
    pool_types: Sequence[str] = ("avg",),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Scale each channel by a gate that any network computes from the poolings of its plane.

    ``act(x * gate(pool(x), ...) + residual)``

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last.
        gate: called once with one (N, C) tensor a pool, in the order of ``pool_types``, float32 (float64 for float64)
            and without autocast; returns (N, C) of any float dtype, its sigmoid included.
        pool_types: one or both of "avg" and "max".
        residual: added after the gate; the shape of ``x``.
        activation: None or "relu", applied last.

    Returns:
        (N, C, H, W) in ``x``'s dtype and memory format.

    Raises:
        TypeError, ValueError: an argument, or what ``gate`` returns, of another dtype, shape or device, or an unknown
            name.
    """
    check_channel_attention(x, gate, pool_types=pool_types, residual=residual, activation=activation)
    pooled = [POOLS[pool](x) for pool in pool_types]
    with without_autocast(x):
        scale = check_gate(gate(*pooled), x)
    return epilogue(x * scale.to(x.dtype)[:, :, None, None], residual, activation)
