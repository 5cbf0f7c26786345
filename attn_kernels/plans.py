"""What a fused module computes: plans, which say where a module keeps its layers and which functional form they enter.

A plan holds names and options, no parameters: those are read from the module at every call. It names layers by the path
that leads to them, ``("channel", "fc1")``. Each plan is a frozen dataclass, so that modules of one configuration share
one, and pickles carry it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn

from attn_kernels.ops._library import PLAIN_TENSORS
from reference._common import DTYPES, like_parameters

Path = tuple[str, ...]


def layer(module: nn.Module, path: Path) -> nn.Module | None:
    """The submodule at ``path``; None where there is none any more."""
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


class Layer(NamedTuple):
    """A submodule as it was when a plan was made: where, of which class, with how many children and parameters."""

    path: Path
    kind: type
    children: int
    parameters: int

    @classmethod
    def of(cls, module: nn.Module, path: Path) -> Layer:
        found = layer(module, path)
        return cls(path, type(found), len(found._modules), len(found._parameters))


def changes(module: nn.Module, layers: tuple[Layer, ...]) -> list[str]:
    """Which of the submodules are not what they were, or would run more than their class's forward; empty as a rule."""
    found_changes = []
    for expected in layers:
        path, kind, children, parameters = expected
        found = module
        for name in path:
            found = found._modules.get(name)
            if found is None:
                break
        if found is None:
            found_changes.append(f"{'.'.join(path)} is gone")
            continue
        state = found.__dict__  # by which all of this takes a third of the time
        if (
            type(found) is not kind
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
            or len(state["_modules"]) != children
            or len(state["_parameters"]) != parameters
        ):
            found_changes.append(_change(found, expected))
    return found_changes


def _change(found: nn.Module, expected: Layer) -> str:
    """What was done to a submodule."""
    name = ".".join(expected.path)
    if type(found) is not expected.kind:
        return f"{name} is a {type(found).__name__}, no longer a {expected.kind.__name__}"
    if "forward" in vars(found):
        return f"the forward of {name} was replaced on the instance"
    if (len(found._modules), len(found._parameters)) != (expected.children, expected.parameters):
        return f"{name} has other children or parameters than it had"
    return f"hooks on {name}"


def is_plain(t: Tensor | None, x: Tensor) -> bool:
    """Whether a kernel may read ``t`` beside ``x``: no subclass (quantized, distributed), a dtype that it takes."""
    return t is None or (type(t) in PLAIN_TENSORS and t.dtype in DTYPES and t.device == x.device)


@dataclass(frozen=True)
class Plan:
    """The base of all plans: ``compute`` stands for the module's forward where :meth:`why_not` says nothing."""

    bypassed: tuple[Layer, ...] = ()
    """Every submodule whose call the plan replaces: where one is touched, by a hook say, the plan does not apply."""

    kind = "attention"

    def why_not(self, module: nn.Module, x: Tensor) -> list[str]:
        """Why ``compute`` does not stand for the module's forward on ``x``; empty where it does."""
        reasons = changes(module, self.bypassed)
        if not reasons:
            for t in self.tensors(module):
                if not is_plain(t, x):
                    reasons.append(f"a parameter is a {type(t).__name__} of {t.dtype} on {t.device}")
        return reasons

    def bypasses(self, path: Path) -> bool:
        """Whether ``compute`` does not call the submodule at ``path``."""
        return True

    def tensors(self, module: nn.Module) -> tuple[Tensor | None, ...]:
        """The parameters that the kernels read."""
        return ()

    def norm(self, module: nn.Module) -> nn.Module | None:
        """The norm that the kernels compute, where there is one."""
        return None

    def nchw(self, x: Tensor) -> Tensor:
        """A view of the module's input, with the channel where the functional forms have it."""
        return x

    def channels(self, module: nn.Module) -> int:
        """The channels that the module takes; any number will do where it takes any."""
        return 6

    def compute(
        self, module: nn.Module, x: Tensor, residual: Tensor | None, activation: str | None, ops: ModuleType
    ) -> Tensor:
        """``activation(module(x) + residual)`` by the functional forms of ``ops``."""
        raise NotImplementedError


def weight_and_bias(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    return layer.weight.flatten(1), layer.bias


def _parameters(module: nn.Module, *paths: Path) -> tuple[Tensor | None, ...]:
    # Past nn.Module.__getattr__, which takes a microsecond.
    return tuple(p for path in paths for p in layer(module, path)._parameters.values())


@dataclass(frozen=True)
class SEPlan(Plan):
    """Two layers, Linear or 1x1 convolutions, and names of ``reference.se``'s activation and gate.

    ``nhwc``: the channel is the last dimension of x.
    """

    fc1: Path = ("fc1",)
    fc2: Path = ("fc2",)
    mlp_activation: str = "relu"
    gate: str = "sigmoid"
    nhwc: bool = False

    kind = "SE"

    def tensors(self, module):
        return _parameters(module, self.fc1, self.fc2)

    def channels(self, module):
        return layer(module, self.fc1).weight.shape[1]

    def nchw(self, x):
        return x.permute(0, 3, 1, 2) if self.nhwc else x

    def compute(self, module, x, residual, activation, ops):
        y = ops.se(
            self.nchw(x),
            *weight_and_bias(layer(module, self.fc1)),
            *weight_and_bias(layer(module, self.fc2)),
            mlp_activation=self.mlp_activation,
            gate=self.gate,
            residual=None if residual is None else self.nchw(residual),
            activation=activation,
        )
        return y.permute(0, 2, 3, 1) if self.nhwc else y


@dataclass(frozen=True)
class GatePlan(Plan):
    """A chain of the module's own layers on the pooled (N, C, 1, 1) map, the gate the last; they are called as usual.

    ``add_maxpool``: the map is the mean of the plane's mean and maximum. ``flat``: the layers take (N, C).
    """

    chain: tuple[Path, ...] = ()
    add_maxpool: bool = False
    flat: bool = False

    kind = "SE, gate by PyTorch"

    def why_not(self, module, x):
        gone = [f"{'.'.join(path)} is gone" for path in self.chain if layer(module, path) is None]
        return super().why_not(module, x) + gone

    def bypasses(self, path):
        return not any(path[: len(called)] == called for called in self.chain)

    def channels(self, module):
        return layer(module, self.chain[0]).weight.shape[1]

    def compute(self, module, x, residual, activation, ops):
        def gate(*pooled: Tensor) -> Tensor:
            t = sum(pooled) / len(pooled) if self.add_maxpool else pooled[0]
            t = like_parameters(t, module)
            t = t if self.flat else t[:, :, None, None]
            for path in self.chain:
                t = layer(module, path)(t)
            return t.flatten(1)

        pools = ("avg", "max") if self.add_maxpool else ("avg",)
        return ops.channel_attention(x, gate, pool_types=pools, residual=residual, activation=activation)


@dataclass(frozen=True)
class ChannelGatePlan(Plan):
    """CBAM's channel gate: two layers and the names of the pools."""

    fc1: Path = ("mlp", "1")
    fc2: Path = ("mlp", "3")
    pool_types: tuple[str, ...] = ("avg", "max")

    kind = "CBAM, channel gate"

    def mlp(self, module: nn.Module) -> tuple[Tensor | None, ...]:
        return *weight_and_bias(layer(module, self.fc1)), *weight_and_bias(layer(module, self.fc2))

    def tensors(self, module):
        return _parameters(module, self.fc1, self.fc2)

    def channels(self, module):
        return layer(module, self.fc1).weight.shape[1]

    def compute(self, module, x, residual, activation, ops):
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
        weight = layer(module, self.conv).weight
        return weight.flip(1) if self.mean_first else weight

    def norm(self, module):
        return layer(module, self.bn)

    def tensors(self, module):
        buffers = layer(module, self.bn)._buffers
        return *_parameters(module, self.conv, self.bn), buffers.get("running_mean"), buffers.get("running_var")

    def compute(self, module, x, residual, activation, ops):
        return ops.spatial_gate(
            x, self.conv_weight(module), self.norm(module), residual=residual, activation=activation
        )


@dataclass(frozen=True)
class CBAMPlan(SpatialGatePlan, ChannelGatePlan):
    """The channel gate, then the spatial gate."""

    kind = "CBAM"

    def tensors(self, module):
        return ChannelGatePlan.tensors(self, module) + SpatialGatePlan.tensors(self, module)

    def compute(self, module, x, residual, activation, ops):
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
    """BAM's two branches, each a Sequential.

    ``square``: only square maps, since of others the published code averages a part, or raises.
    """

    gate_c: Path = ("channel_att", "gate_c")
    gate_s: Path = ("spatial_att", "gate_s")
    square: bool = False

    kind = "BAM"

    def why_not(self, module, x):
        reasons = super().why_not(module, x)
        if self.square and x.shape[2] != x.shape[3]:
            reasons.append("x is not square, and of such a map the module does not take the mean")
        return reasons

    def tensors(self, module):
        branches = layer(module, self.gate_c), layer(module, self.gate_s)
        return tuple(p for branch in branches for p in branch.parameters())

    def channels(self, module):
        return layer(module, self.gate_s)[0].in_channels

    def compute(self, module, x, residual, activation, ops):
        gate_c, gate_s = layer(module, self.gate_c), layer(module, self.gate_s)
        return ops.bam(x, gate_c, gate_s, residual=residual, activation=activation)


@dataclass(frozen=True)
class SimAMPlan(Plan):
    """SimAM; lambda is the module's ``e_lambda``."""

    kind = "SimAM"

    def compute(self, module, x, residual, activation, ops):
        return ops.simam(x, module.e_lambda, residual=residual, activation=activation)
