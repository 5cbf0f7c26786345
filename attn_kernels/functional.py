"""The functional forms of ``reference``, by the fused operators where they apply and by the reference elsewhere.

The fused path needs ``x`` on a CUDA device (or on the CPU with ``TRITON_INTERPRET=1``), Triton, a float dtype and at
least one element; export, tracing, forward-mode differentiation and functorch transforms see the reference formula,
that is plain operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import reference
from reference._common import without_autocast
from reference.bam import check_bam
from reference.cbam import check_cbam, check_channel_gate, check_spatial_gate
from reference.channel_attention import check_channel_attention, check_gate
from reference.se import check_se
from reference.simam import check_simam

try:
    import triton
except ImportError:
    _DEVICES: tuple[str, ...] = ()
else:
    from attn_kernels.ops import bam as _bam
    from attn_kernels.ops import cbam as _cbam
    from attn_kernels.ops import channel_gate as _channel_gate
    from attn_kernels.ops import channel_scale as _channel_scale
    from attn_kernels.ops import simam as _simam
    from attn_kernels.ops._library import dense, like

    _DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)

__all__ = ["bam", "cbam", "channel_attention", "channel_gate", "se", "simam", "spatial_gate"]


def is_fused(x: Tensor) -> bool:
    """Whether a call on ``x`` takes the fused path."""
    return (
        x.device.type in _DEVICES
        and x.numel() > 0
        # Offsets within a sample, and within the maps of a batch, are 32 bits wide.
        and x.shape[1] * x.shape[2] * x.shape[3] < 2**30
        and x.shape[0] * x.shape[2] * x.shape[3] < 2**29
        and forward_ad._current_level < 0
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def _prepare(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x = dense(x)
    return x, None if residual is None else like(residual, x)


def se(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    mlp_activation: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    options = {"mlp_activation": mlp_activation, "gate": gate, "residual": residual, "activation": activation}
    check_se(x, *parameters, **options)
    if not is_fused(x):
        return reference.se(x, *parameters, **options)
    x, residual = _prepare(x, residual)
    return _channel_gate.channel_gate(x, *parameters, residual, ("avg",), mlp_activation, gate, activation == "relu")


def channel_gate(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    pool_types: Sequence[str] = ("avg", "max"),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    options = {"pool_types": pool_types, "residual": residual, "activation": activation}
    check_channel_gate(x, *parameters, **options)
    if not is_fused(x):
        return reference.channel_gate(x, *parameters, **options)
    x, residual = _prepare(x, residual)
    return _channel_gate.channel_gate(x, *parameters, residual, pool_types, "relu", "sigmoid", activation == "relu")


def channel_attention(
    x: Tensor,
    gate: Callable[..., Tensor],
    *,
    pool_types: Sequence[str] = ("avg",),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    check_channel_attention(x, gate, pool_types=pool_types, residual=residual, activation=activation)
    if not is_fused(x):
        return reference.channel_attention(x, gate, pool_types=pool_types, residual=residual, activation=activation)

    def checked(*pooled: Tensor) -> Tensor:
        with without_autocast(x):
            return check_gate(gate(*pooled), x)

    x, residual = _prepare(x, residual)
    return _channel_scale.channel_attention(x, checked, pool_types, residual, activation == "relu")


def simam(
    x: Tensor, e_lambda: float = 1e-4, *, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    check_simam(x, e_lambda, residual=residual, activation=activation)
    if not is_fused(x):
        return reference.simam(x, e_lambda, residual=residual, activation=activation)
    x, residual = _prepare(x, residual)
    return _simam.simam(x, residual, e_lambda, activation == "relu")


def spatial_gate(
    x: Tensor,
    conv_weight: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    check_spatial_gate(x, conv_weight, norm, residual=residual, activation=activation)
    if not (is_fused(x) and _cbam.is_fusable(norm)):
        return reference.spatial_gate(x, conv_weight, norm, residual=residual, activation=activation)
    x, residual = _prepare(x, residual)
    return _cbam.cbam(x, (None, None, None, None), conv_weight, norm, residual, (), activation == "relu")


def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    pool_types: Sequence[str] = ("avg", "max"),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    mlp = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    options = {"pool_types": pool_types, "residual": residual, "activation": activation}
    check_cbam(x, *mlp, conv_weight, norm, **options)
    if not (is_fused(x) and _cbam.is_fusable(norm)):
        return reference.cbam(x, *mlp, conv_weight, norm, **options)
    x, residual = _prepare(x, residual)
    return _cbam.cbam(x, mlp, conv_weight, norm, residual, pool_types, activation == "relu")


def bam(
    x: Tensor,
    gate_c: nn.Sequential,
    gate_s: nn.Sequential,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    check_bam(x, gate_c, gate_s, residual=residual, activation=activation)
    if not is_fused(x):
        return reference.bam(x, gate_c, gate_s, residual=residual, activation=activation)
    x, residual = _prepare(x, residual)
    return _bam.bam(x, gate_c, gate_s, residual, activation == "relu")


for _function in (bam, cbam, channel_attention, channel_gate, se, simam, spatial_gate):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
