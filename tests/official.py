"""The published modules written out from their formulas: oracles that share no code with ``reference``.

State dict keys are those of the published checkpoints. Square maps only where the publication takes square maps only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def hardsigmoid(z: Tensor) -> Tensor:
    return (z + 3).clamp(0, 6) / 6


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z * sigmoid(z),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "hardswish": lambda z: z * hardsigmoid(z),
}
GATES = {"sigmoid": sigmoid, "hardsigmoid": hardsigmoid}


class SE(nn.Module):
    """x * gate(W2 act(W1 avg(x) + b1) + b2)."""

    def __init__(self, channels: int, hidden: int, bias: bool = True, activation: str = "relu", gate: str = "sigmoid"):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, bias)
        self.fc2 = nn.Linear(hidden, channels, bias)
        self.activation, self.gate = ACTIVATIONS[activation], GATES[gate]

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
        excited = self.gate(self.fc2(self.activation(self.fc1(squeezed))))
        return torch.einsum("nchw,nc->nchw", x, excited)


def _lse(x: Tensor) -> Tensor:
    shift = x.amax((2, 3), keepdim=True)
    return shift + (x - shift).exp().sum((2, 3), keepdim=True).log()


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: F.avg_pool2d(x, x.shape[2:]),
    "max": lambda x: F.max_pool2d(x, x.shape[2:]),
    "lp": lambda x: F.lp_pool2d(x, 2.0, x.shape[2:]),
    "lse": _lse,
}


class ChannelGate(nn.Module):
    """CBAM's channel gate: x * sigmoid(sum over pools of MLP(pool(x)))."""

    def __init__(self, channels: int, reduction: int = 16, pool_types: Sequence[str] = ("avg", "max")):
        super().__init__()
        hidden = channels // reduction
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.pool_types = pool_types

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([self.mlp(POOLS[pool](x)) for pool in self.pool_types]).sum(0)
        return torch.einsum("nchw,nc->nchw", x, sigmoid(logits))


class SpatialGate(nn.Module):
    """CBAM's spatial gate: x * sigmoid(BN(conv7x7([max_c(x), mean_c(x)])))."""

    def __init__(self):
        super().__init__()
        conv, bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01)
        self.spatial = nn.Sequential(OrderedDict(conv=conv, bn=bn))

    def forward(self, x: Tensor) -> Tensor:
        return x * sigmoid(self.spatial(torch.stack((x.max(1).values, x.mean(1)), 1)))


class CBAM(nn.Module):
    """The channel gate, then, unless ``no_spatial``, the spatial gate."""

    def __init__(
        self, channels: int, reduction: int = 16, pool_types: Sequence[str] = ("avg", "max"), no_spatial: bool = False
    ):
        super().__init__()
        self.ChannelGate = ChannelGate(channels, reduction, pool_types)
        if not no_spatial:
            self.SpatialGate = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.children():
            x = gate(x)
        return x


class BAM(nn.Module):
    """x * (1 + sigmoid(Mc(x) * Ms(x))), for square maps."""

    def __init__(self, channels: int, reduction: int = 16, dilations: int = 2, dilation: int = 4):
        super().__init__()
        hidden = channels // reduction
        spatial: OrderedDict[str, nn.Module] = OrderedDict(
            gate_s_conv_reduce0=nn.Conv2d(channels, hidden, 1),
            gate_s_bn_reduce0=nn.BatchNorm2d(hidden),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for i in range(dilations):
            spatial[f"gate_s_conv_di_{i}"] = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            spatial[f"gate_s_bn_di_{i}"] = nn.BatchNorm2d(hidden)
            spatial[f"gate_s_relu_di_{i}"] = nn.ReLU()
        spatial["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1)
        channel = OrderedDict(
            flatten=nn.Flatten(),
            gate_c_fc_0=nn.Linear(channels, hidden),
            gate_c_bn_1=nn.BatchNorm1d(hidden),
            gate_c_relu_1=nn.ReLU(),
            gate_c_fc_final=nn.Linear(hidden, channels),
        )
        self.channel_att = nn.ModuleDict({"gate_c": nn.Sequential(channel)})
        self.spatial_att = nn.ModuleDict({"gate_s": nn.Sequential(spatial)})

    def forward(self, x: Tensor) -> Tensor:
        return self.from_average(x, F.avg_pool2d(x, x.shape[2]))

    def from_average(self, x: Tensor, average: Tensor) -> Tensor:
        """The formula for a given (N, C, 1, 1) average."""
        channel = self.channel_att["gate_c"](average)[:, :, None, None]
        return x * (1 + sigmoid(channel * self.spatial_att["gate_s"](x)))


class SimAM(nn.Module):
    """x * sigmoid(d / (4 * (sum(d) / (HW - 1) + lambda)) + 1/2), d = (x - mean)^2."""

    def __init__(self, e_lambda: float = 1e-4):
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        planes = x.flatten(2)
        variance, mean = torch.var_mean(planes, 2, correction=1, keepdim=True)
        energy = (planes - mean) ** 2 / (4 * (variance + self.e_lambda)) + 0.5
        return (planes * sigmoid(energy)).view_as(x)
