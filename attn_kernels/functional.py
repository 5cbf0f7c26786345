"""The functional forms of ``reference``, by the fused operators where they apply and by the reference elsewhere.

The fused path needs ``x`` on a CUDA device (or on the CPU with ``TRITON_INTERPRET=1``), Triton, a float dtype, at least
one element and plain tensors; export, tracing, forward-mode differentiation and functorch transforms see the reference
formula, that is plain operators. ``why_not`` decides, and ``attn_kernels.explain`` says what it decided.

``ATTN_KERNELS_DISABLE=1`` in the environment turns the fused path off. It is read once, when this module is imported.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import reference
from attn_kernels._versions import interpreter_clash
from attn_kernels.ops.common import device as _device
from attn_kernels.ops.common.batch_norm import has_usual_state
from attn_kernels.ops.common.layout import dense, in_layout_of
from attn_kernels.ops.common.operator import PLAIN, FakeTensor
from reference._common import is_plain_layer, without_autocast
from reference.bam import check_bam
from reference.cbam import check_cbam, check_channel_gate, check_spatial_gate
from reference.channel_attention import check_channel_attention, check_gate
from reference.se import check_se, linear_weight
from reference.simam import check_simam

# The devices that the kernels run on, or why there is none.
_DEVICES: tuple[str, ...] = ()
_NO_DEVICE = ""

if os.environ.get("ATTN_KERNELS_DISABLE", "0") not in ("", "0"):
    _NO_DEVICE = "ATTN_KERNELS_DISABLE is set"
elif torch.version.hip is not None:
    _NO_DEVICE = "this PyTorch is built for ROCm, and the kernels are written for NVIDIA GPUs"
else:
    try:
        import triton
    except ImportError as error:
        _NO_DEVICE = f"Triton cannot be imported: {error}"
    else:
        from attn_kernels.ops import bam as _bam
        from attn_kernels.ops import cbam as _cbam
        from attn_kernels.ops import channel_attention as _channel_attention
        from attn_kernels.ops import channel_gate as _channel_gate
        from attn_kernels.ops import simam as _simam

        _DEVICES = ("cuda",)
        if triton.knobs.runtime.interpret:
            import numpy

            _NO_DEVICE = interpreter_clash(triton.__version__, numpy.__version__)
            _DEVICES = () if _NO_DEVICE else ("cuda", "cpu")
        if _NO_DEVICE:
            warnings.warn(f"{_NO_DEVICE}: every module runs the reference formula", RuntimeWarning)

__all__ = ["bam", "cbam", "channel_attention", "channel_gate", "se", "simam", "spatial_gate"]


def why_not(x: Tensor, others: Sequence[Tensor | None] = (), norm: object = None, width: int = 0) -> list[str]:
    """Why a call does not take the fused path; empty where it does.

    Args:
        x: (N, C, H, W), of a dtype and shape that the functional forms take.
        others: the residual and the parameters that the kernels would read.
        norm: the spatial gate's, where there is one.
        width: the channels of the widest map of x's pixels that the kernels make.
    """
    reasons = why_not_here(x)
    if reasons and _records_plain_operators():
        return reasons
    n, c, h, w = x.shape
    if n == 0:
        reasons.append("x has no element")
    elif any(t is not None and t.numel() == 0 for t in others):
        reasons.append("a parameter has no element: an MLP without hidden units")
    # Offsets within a sample, and within the maps of a batch, are 32 bits wide.
    if max(c, width) * h * w >= 2**30:
        reasons.append("a sample of x, or of a map made of it, has 2**30 elements or more")
    if n * h * w >= 2**29:
        reasons.append("x has 2**29 pixels or more")
    if type(x) not in PLAIN or not PLAIN.issuperset(map(type, others)):
        kinds = sorted({type(t).__name__ for t in (x, *others) if type(t) not in PLAIN})
        reasons.append(f"x, the residual or a parameter is a {', '.join(kinds)}, and the kernels read plain tensors")
    if getattr(forward_ad, "_current_level", -1) >= 0:
        reasons.append("the kernels have no forward-mode derivative")
    if hasattr(torch._C, "_are_functorch_transforms_active") and torch._C._are_functorch_transforms_active():
        reasons.append("torch.func transforms plain operators")
    if norm is not None and _DEVICES:
        if not _cbam.is_fusable(norm):
            kind = type(norm).__name__
            reasons.append(f"the norm ({kind}) is not a plain BatchNorm2d: one channel, its usual buffers, no hooks")
        elif not has_usual_state(norm):
            reasons.append("a parameter or buffer of the norm is no plain tensor of one element per channel")
    return reasons


def why_not_here(x: Tensor) -> list[str]:
    """Why no call takes the fused path on x's device, or while a program is recorded; empty where calls may."""
    # No shape is looked at here: whatever is asked of a shape becomes a condition of the exported program.
    if _records_plain_operators():
        return ["torch.export, ONNX export and torch.jit.trace record plain operators"]
    if not _DEVICES:
        return [_NO_DEVICE]
    if x.device.type not in _DEVICES and not _is_recorded(x):
        return [f"x is on {x.device.type}, and the kernels run on {' and '.join(_DEVICES)}"]
    return []


def _records_plain_operators() -> bool:
    return _is_exporting() or torch.jit.is_tracing()


def devices() -> tuple[str, ...]:
    """The types of devices that the kernels run on; none where there is no Triton."""
    return _DEVICES


def _is_recorded(x: Tensor) -> bool:
    """Whether ``attn_kernels.precompile`` is recording what a call on x would launch; x has no data then."""
    is_ours = _device.recorded_thread > 0 and _device.recorded_thread == get_ident()
    return is_ours and (x.is_meta or type(x) is FakeTensor)


def _is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which under torch.compile is always true for the Dynamo of torch 2.11."""
    exporting = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if exporting is None else exporting


def is_fused(x: Tensor, others: Sequence[Tensor | None] = (), norm: object = None, width: int = 0) -> bool:
    """Whether a call takes the fused path."""
    return not why_not(x, others, norm, width)


def _prepare(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x = dense(x)
    residual = None if residual is None else in_layout_of(x, residual)
    # torch.compile takes no tensor twice in an autograd Function.
    return x, torch.ops.aten.alias(x) if residual is x else residual


def _linear(w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> tuple[Tensor | None, ...]:
    """The MLP's parameters with weights of two dimensions."""
    return linear_weight(w1), b1, linear_weight(w2), b2


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
    if not is_fused(x, (residual, *parameters)):
        return reference.se(x, *parameters, **options)
    x, residual = _prepare(x, residual)
    mlp = _linear(*parameters)
    return _channel_gate.channel_gate(x, *mlp, residual, ("avg",), mlp_activation, gate, activation == "relu")


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
    if not is_fused(x, (residual, *parameters)):
        return reference.channel_gate(x, *parameters, **options)
    x, residual = _prepare(x, residual)
    mlp = _linear(*parameters)
    return _channel_gate.channel_gate(x, *mlp, residual, pool_types, "relu", "sigmoid", activation == "relu")


def channel_attention(
    x: Tensor,
    gate: Callable[..., Tensor],
    *,
    pool_types: Sequence[str] = ("avg",),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    check_channel_attention(x, gate, pool_types=pool_types, residual=residual, activation=activation)
    if not is_fused(x, (residual,)):
        return reference.channel_attention(x, gate, pool_types=pool_types, residual=residual, activation=activation)

    def checked(*pooled: Tensor) -> Tensor:
        with without_autocast(x):
            return check_gate(gate(*pooled), x)

    x, residual = _prepare(x, residual)
    return _channel_attention.channel_attention(x, checked, pool_types, residual, activation == "relu")


def simam(
    x: Tensor, e_lambda: float = 1e-4, *, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    check_simam(x, e_lambda, residual=residual, activation=activation)
    if not is_fused(x, (residual,)):
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
    if not is_fused(x, (residual, conv_weight), norm):
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
    if not is_fused(x, (residual, *mlp, conv_weight), norm):
        return reference.cbam(x, *mlp, conv_weight, norm, **options)
    x, residual = _prepare(x, residual)
    return _cbam.cbam(x, _linear(*mlp), conv_weight, norm, residual, pool_types, activation == "relu")


def bam(
    x: Tensor,
    gate_c: nn.Sequential,
    gate_s: nn.Sequential,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    check_bam(x, gate_c, gate_s, residual=residual, activation=activation)
    reduce = gate_s[0]
    is_plain = is_plain_layer(gate_s, nn.Sequential) and is_plain_layer(reduce, nn.Conv2d)
    if not is_plain or not is_fused(x, (residual, reduce.weight, reduce.bias), width=reduce.out_channels):
        return reference.bam(x, gate_c, gate_s, residual=residual, activation=activation)
    x, residual = _prepare(x, residual)
    return _bam.bam(x, gate_c, gate_s, residual, activation == "relu")


for _function in (bam, cbam, channel_attention, channel_gate, se, simam, spatial_gate):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
