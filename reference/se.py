"""Squeeze-and-Excitation (Hu, Shen, Sun: "Squeeze-and-Excitation Networks", CVPR 2018, equations 2 to 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference._common import (
    AttentionModule,
    accumulation_dtype,
    check_choice,
    check_input,
    check_parameter,
    check_positive,
    epilogue,
    is_plain_layer,
    like_parameters,
    without_autocast,
)


def hardsigmoid(x: Tensor) -> Tensor:
    """``relu6(x + 3) / 6``; ``F.hardsigmoid`` has no second derivative."""
    return F.relu6(x + 3) / 6


ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
}
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": hardsigmoid}


def check_mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None):
    """Check the two layers of a gate's MLP: (h, C), (h,), (C, h), (C,) for any h, weights also of 1x1 convolutions."""
    channels, hidden = x.shape[1], 1
    if isinstance(fc1_weight, Tensor) and fc1_weight.dim() >= 2:
        hidden, takes = fc1_weight.shape[:2]
        if takes != channels and isinstance(fc2_weight, Tensor) and fc2_weight.shape[:2] == (takes, hidden):
            raise ValueError(f"x: expected {takes} channels, as fc1_weight takes, got shape {tuple(x.shape)}")
    check_parameter("fc1_weight", fc1_weight, _like_weight(fc1_weight, hidden, channels), x)
    check_parameter("fc1_bias", fc1_bias, (hidden,), x, optional=True)
    check_parameter("fc2_weight", fc2_weight, _like_weight(fc2_weight, channels, hidden), x)
    check_parameter("fc2_bias", fc2_bias, (channels,), x, optional=True)


def _like_weight(weight: object, *shape: int) -> tuple[int, ...]:
    """The shape of a linear layer's weight, or of a 1x1 convolution's where ``weight`` has four dimensions."""
    return (*shape, 1, 1) if isinstance(weight, Tensor) and weight.dim() == 4 else shape


def linear_weight(weight: Tensor) -> Tensor:
    """A linear layer's weight itself; a 1x1 convolution's without its last two dimensions."""
    return weight if weight.dim() == 2 else weight.flatten(1)


def check_se(
    x,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    *,
    mlp_activation="relu",
    gate="sigmoid",
    residual=None,
    activation=None,
):
    """Raise what :func:`se` raises for these arguments."""
    check_input(x, residual, activation)
    check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_choice("mlp_activation", mlp_activation, ACTIVATIONS)
    check_choice("gate", gate, GATES)


def mlp(
    pooled: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """``fc2(act(fc1(pooled)))`` in ``pooled``'s dtype, whatever the parameters' dtype: (N, C) -> (N, C)."""
    fc1_weight, fc2_weight = linear_weight(fc1_weight), linear_weight(fc2_weight)
    w1, b1, w2, b2 = (p if p is None else p.to(pooled.dtype) for p in (fc1_weight, fc1_bias, fc2_weight, fc2_bias))
    with without_autocast(pooled):
        return F.linear(ACTIVATIONS[activation](F.linear(pooled, w1, b1)), w2, b2)


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
    """Scale each channel by a gate computed from the channel means.

    ``act(x * gate(fc2(mlp_activation(fc1(mean_hw(x))))) + residual)``

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last.
        fc1_weight, fc1_bias: (h, C) or (h, C, 1, 1), and (h,) or None, any float dtype.
        fc2_weight, fc2_bias: (C, h) or (C, h, 1, 1), and (C,) or None, any float dtype.
        mlp_activation: "relu", "silu", "gelu", "leaky_relu" or "hardswish".
        gate: "sigmoid" or "hardsigmoid".
        residual: added after the gate; the shape of ``x``.
        activation: None or "relu", applied last.

    Returns:
        (N, C, H, W) in ``x``'s dtype and memory format. Means and gate are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unknown name.
    """
    check_se(
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        mlp_activation=mlp_activation,
        gate=gate,
        residual=residual,
        activation=activation,
    )
    squeezed = x.mean((2, 3), dtype=accumulation_dtype(x))
    logits = mlp(squeezed, fc1_weight, fc1_bias, fc2_weight, fc2_bias, mlp_activation)
    scale = GATES[gate](logits).to(x.dtype)[:, :, None, None]
    return epilogue(x * scale, residual, activation)


def se_by_layers(
    x: Tensor,
    fc1: nn.Module,
    fc2: nn.Module,
    *,
    mlp_activation: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`se` by two modules of an (N, C) tensor, which are called with whatever else they do."""
    check_input(x, residual, activation)
    squeezed = x.mean((2, 3), dtype=accumulation_dtype(x))
    with without_autocast(x):
        logits = fc2(ACTIVATIONS[mlp_activation](fc1(like_parameters(squeezed, fc1))))
        scale = GATES[gate](logits).to(x.dtype)[:, :, None, None]
    return epilogue(x * scale, residual, activation)


class SE(AttentionModule):
    """Squeeze-and-Excitation. Keys ``fc1.weight (h, C)``, ``fc1.bias``, ``fc2.weight (C, h)``, ``fc2.bias``.

    Args:
        channels: C of the input.
        reduction: h = max(1, round(C / reduction)).
        hidden_channels: h itself, in place of ``reduction``.
        bias: whether the two layers have biases.
        mlp_activation: "relu", "silu", "gelu", "leaky_relu" or "hardswish".
        gate: "sigmoid" or "hardsigmoid".

    Raises:
        ValueError: a size below 1 or an unknown activation or gate.
    """

    _function = staticmethod(se)

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        hidden_channels: int | None = None,
        bias: bool = True,
        mlp_activation: str = "relu",
        gate: str = "sigmoid",
    ):
        super().__init__()
        check_positive("channels", channels)
        check_positive("reduction", reduction)
        check_choice("mlp_activation", mlp_activation, ACTIVATIONS)
        check_choice("gate", gate, GATES)
        hidden = max(1, round(channels / reduction)) if hidden_channels is None else hidden_channels
        check_positive("hidden_channels", hidden)
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)
        self.mlp_activation, self.gate = mlp_activation, gate

    def is_plain(self):
        return is_plain_layer(self.fc1, nn.Linear) and is_plain_layer(self.fc2, nn.Linear)

    def attend(self, x, residual, activation):
        fc1, fc2 = self.fc1, self.fc2
        options = {
            "mlp_activation": self.mlp_activation,
            "gate": self.gate,
            "residual": residual,
            "activation": activation,
        }
        if not self.is_plain():
            return se_by_layers(x, fc1, fc2, **options)
        return self._function(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, **options)

    def extra_repr(self) -> str:
        return f"mlp_activation={self.mlp_activation!r}, gate={self.gate!r}"
