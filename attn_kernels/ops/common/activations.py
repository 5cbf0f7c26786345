"""Activations and gates on the device, and their gradients."""

import triton
import triton.language as tl


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
