"""Plans say what a fused module computes: where it keeps its layers, and which functional form takes them.

A plan holds names and options, no parameters: those are read from the module at every call. It names layers by the path
that leads to them, ``("channel", "fc1")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from attn_kernels.fuse.evaluate import layer_at
from attn_kernels.fuse.guards import Path
from attn_kernels.ops.common.operator import PLAIN_TENSORS
from reference._common import DTYPES, like_parameters


@dataclass(frozen=True)
class Plan:
    """The base of all plans: ``compute`` stands for the module's forward where :meth:`why_not` says nothing.

    Attributes:
        channels: how many the module takes; None where it takes any number.
        plane: the condition on (H, W), where there is one: "square", or both.
        ties: the module pools by ``amax``, which shares a gradient among equal maxima; the kernels give it to the
            first, so that they stand for it where no gradient is asked for.
        nhwc: the channel is the last dimension of x.
    """

    channels: int | None = None
    plane: str | tuple[int, int] | None = None
    ties: bool = False
    nhwc: bool = False

    kind = "attention"

    def why_not(self, module: nn.Module, x: Tensor) -> list[str]:
        """Why ``compute`` does not give what the module's forward gives for ``x``; empty where it does."""
        shape = self.nchw(x).shape
        reasons = []
        if self.channels is not None and shape[1] != self.channels:
            reasons.append(f"x has {shape[1]} channels, and the module takes {self.channels}")
        if 0 in shape:
            reasons.append("x has no element")
        if self.plane == "square" and shape[2] != shape[3]:
            reasons.append("x is not square, and of such a map the module pools a part")
        elif self.plane not in (None, "square") and shape[2:] != self.plane:
            reasons.append(f"x is no map of {self.plane[0]}x{self.plane[1]} pixels, which the module's pool takes")
        tensors = self.tensors(module)
        if self.ties and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
            reasons.append("a gradient is asked for, which amax shares among equal maxima and the kernels do not")
        for t in tensors:
            if t is not None and (type(t) not in PLAIN_TENSORS or t.dtype not in DTYPES or t.device != x.device):
                reasons.append(f"a parameter is a {type(t).__name__} of {t.dtype} on {t.device}")
        return reasons

    def tensors(self, module: nn.Module) -> tuple[Tensor | None, ...]:
        """The parameters and buffers that ``compute`` reads."""
        return ()

    def norm(self, module: nn.Module) -> nn.Module | None:
        """The norm that the kernels compute, where there is one."""
        return None

    def width(self, module: nn.Module) -> int | None:
        """How many channels the module takes: as ``channels`` says, or else its first layer."""
        if self.channels is None and hasattr(self, "fc1"):
            return layer_at(module, self.fc1).weight.shape[1]
        return self.channels

    def nchw(self, x: Tensor) -> Tensor:
        """A view of the module's input, with the channel where the functional forms have it."""
        return x.permute(0, 3, 1, 2) if self.nhwc else x

    def compute(
        self, module: nn.Module, x: Tensor, residual: Tensor | None, activation: str | None, ops: ModuleType
    ) -> Tensor:
        """``activation(module(x) + residual)`` by the functional forms of ``ops``."""
        residual = None if residual is None else self.nchw(residual)
        y = self.call(module, self.nchw(x), ops, residual, activation)
        return y.permute(0, 2, 3, 1) if self.nhwc else y

    def call(
        self, module: nn.Module, x: Tensor, ops: ModuleType, residual: Tensor | None, activation: str | None
    ) -> Tensor:
        """The functional form on an ``x`` of (N, C, H, W)."""
        raise NotImplementedError


def weight_and_bias(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    parameters = layer._parameters
    return parameters["weight"].flatten(1), parameters["bias"]


def _parameters(module: nn.Module, *paths: Path) -> tuple[Tensor | None, ...]:
    return tuple(p for path in paths for p in layer_at(module, path)._parameters.values())


@dataclass(frozen=True)
class SEPlan(Plan):
    """Two layers, Linear or 1x1 convolutions, and names of ``reference.se``'s activation and gate."""

    fc1: Path = ("fc1",)
    fc2: Path = ("fc2",)
    mlp_activation: str = "relu"
    gate: str = "sigmoid"

    kind = "SE"

    def tensors(self, module):
        return _parameters(module, self.fc1, self.fc2)

    def call(self, module, x, ops, residual, activation):
        return ops.se(
            x,
            *weight_and_bias(layer_at(module, self.fc1)),
            *weight_and_bias(layer_at(module, self.fc2)),
            mlp_activation=self.mlp_activation,
            gate=self.gate,
            residual=residual,
            activation=activation,
        )


@dataclass(frozen=True)
class GatePlan(Plan):
    """A gate that PyTorch computes from pools of the planes, with the layers of the module, called as modules.

    ``gate`` takes the module and one (N, C, 1, 1) tensor per pool; ``layers`` are those whose parameters it reads.
    """

    gate: Callable[..., Tensor] | None = None
    pool_types: tuple[str, ...] = ("avg",)
    layers: tuple[Path, ...] = ()

    kind = "SE, gate by PyTorch"

    def tensors(self, module):
        return _parameters(module, *self.layers)

    def call(self, module, x, ops, residual, activation):
        def gate(*pooled: Tensor) -> Tensor:
            like = layer_at(module, self.layers[0])
            return self.gate(module, *(like_parameters(t, like)[:, :, None, None] for t in pooled)).flatten(1)

        return ops.channel_attention(x, gate, pool_types=self.pool_types, residual=residual, activation=activation)


@dataclass(frozen=True)
class ChannelGatePlan(Plan):
    """CBAM's channel gate: two layers and the names of the pools."""

    fc1: Path = ("mlp", "1")
    fc2: Path = ("mlp", "3")
    pool_types: tuple[str, ...] = ("avg", "max")

    kind = "CBAM, channel gate"

    def mlp(self, module: nn.Module) -> tuple[Tensor | None, ...]:
        return *weight_and_bias(layer_at(module, self.fc1)), *weight_and_bias(layer_at(module, self.fc2))

    def tensors(self, module):
        return _parameters(module, self.fc1, self.fc2)

    def call(self, module, x, ops, residual, activation):
        return ops.channel_gate(
            x, *self.mlp(module), pool_types=self.pool_types, residual=residual, activation=activation
        )


@dataclass(frozen=True)
class SpatialGatePlan(Plan):
    """CBAM's spatial gate. ``mean_first``: its convolution takes the mean, then the maximum."""

    conv: Path = ("spatial", "conv")
    bn: Path = ("spatial", "bn")
    mean_first: bool = False

    kind = "CBAM, spatial gate"

    def conv_weight(self, module: nn.Module) -> Tensor:
        weight = layer_at(module, self.conv)._parameters["weight"]
        return weight.flip(1) if self.mean_first else weight

    def norm(self, module):
        return layer_at(module, self.bn)

    def tensors(self, module):
        buffers = layer_at(module, self.bn)._buffers
        return *_parameters(module, self.conv, self.bn), buffers.get("running_mean"), buffers.get("running_var")

    def call(self, module, x, ops, residual, activation):
        return ops.spatial_gate(
            x, self.conv_weight(module), self.norm(module), residual=residual, activation=activation
        )


@dataclass(frozen=True)
class CBAMPlan(SpatialGatePlan, ChannelGatePlan):
    """The channel gate, then the spatial gate."""

    kind = "CBAM"

    def tensors(self, module):
        return ChannelGatePlan.tensors(self, module) + SpatialGatePlan.tensors(self, module)

    def call(self, module, x, ops, residual, activation):
        return ops.cbam(
            x,
            *self.mlp(module),
            self.conv_weight(module),
            self.norm(module),
            pool_types=self.pool_types,
            residual=residual,
            activation=activation,
        )


@dataclass(frozen=True)
class BAMPlan(Plan):
    """BAM's two branches, each a Sequential."""

    gate_c: Path = ("channel_att", "gate_c")
    gate_s: Path = ("spatial_att", "gate_s")

    kind = "BAM"

    def tensors(self, module):
        branches = layer_at(module, self.gate_c), layer_at(module, self.gate_s)
        return tuple(p for branch in branches for p in branch.parameters())

    def call(self, module, x, ops, residual, activation):
        gate_c, gate_s = layer_at(module, self.gate_c), layer_at(module, self.gate_s)
        return ops.bam(x, gate_c, gate_s, residual=residual, activation=activation)


@dataclass(frozen=True)
class SimAMPlan(Plan):
    """SimAM with lambda ``e_lambda``."""

    e_lambda: float = 1e-4

    kind = "SimAM"

    def why_not(self, module, x):
        one = ["x is a map of one pixel, of which the module makes NaN"] if x.shape[2] * x.shape[3] == 1 else []
        return super().why_not(module, x) + one

    def call(self, module, x, ops, residual, activation):
        return ops.simam(x, self.e_lambda, residual=residual, activation=activation)
