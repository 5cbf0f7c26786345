"""SimAM (Yang, Zhang, Li, Xie: "SimAM: A Simple, Parameter-Free Attention Module", ICML 2021, equations 5 and 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference._common import AttentionModule, accumulation_dtype, check_input, check_positive, epilogue


def check_lambda(e_lambda: float) -> None:
    """Raise ValueError unless ``e_lambda`` is a finite number >= 0."""
    if not (isinstance(e_lambda, int | float) and 0 <= e_lambda < math.inf):
        raise ValueError(f"e_lambda: expected a finite number >= 0, got {e_lambda!r}")


def check_simam(x, e_lambda=1e-4, *, residual=None, activation=None):
    """Raise what :func:`simam` raises for these arguments."""
    check_input(x, residual, activation)
    check_lambda(e_lambda)


def simam(
    x: Tensor, e_lambda: float = 1e-4, *, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Scale each element by the sigmoid of its inverse energy, how far it stands out from its plane.

    ``act(x * sigmoid(d / (4 * (sum_hw(d) / n + e_lambda)) + 0.5) + residual)`` with ``d = (x - mean_hw(x))^2`` and
    ``n = max(H * W - 1, 1)``.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last.
        e_lambda: regulariser of the variance, >= 0.
        residual: added after the gate; the shape of ``x``.
        activation: None or "relu", applied last.

    Returns:
        (N, C, H, W) in ``x``'s dtype and memory format. The energy is computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, an unknown name, or ``e_lambda`` < 0.
    """
    check_simam(x, e_lambda, residual=residual, activation=activation)
    mean = x.mean((2, 3), keepdim=True, dtype=accumulation_dtype(x))
    d = (x - mean).square()
    variance = d.sum((2, 3), keepdim=True) / max(x.shape[2] * x.shape[3] - 1, 1)
    inverse_energy = d / (4 * (variance + e_lambda)) + 0.5
    return epilogue((x * torch.sigmoid(inverse_energy)).to(x.dtype), residual, activation)


class SimAM(AttentionModule):
    """SimAM: no parameters.

    Args:
        channels: unused, kept so that every attention module can be built from its channels.
        e_lambda: regulariser of the variance, >= 0.

    Raises:
        ValueError: ``channels`` that are no integer of at least 1, or a negative ``e_lambda``.
    """

    _function = staticmethod(simam)

    def __init__(self, channels: int | None = None, e_lambda: float = 1e-4):
        super().__init__()
        if channels is not None:
            check_positive("channels", channels)
        check_lambda(e_lambda)
        self.e_lambda = e_lambda

    def attend(self, x, residual, activation):
        return self._function(x, self.e_lambda, residual=residual, activation=activation)

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda}"
