"""Modules that look like SE and do something else besides, or only sometimes: each must keep its own forward.

Each is SE but for one thing that eager code can do. What differs may show in training alone, at some sizes, for some
dtypes, in gradients, or in what is stored: a trace or a comparison of outputs would miss it.
"""

from __future__ import annotations

import os
import random
import time

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

C = 16
SEEN: list = []
OPTIONS = {"on": True}
ON = True


class SE(nn.Module):
    """The layout of many tutorials, the gate apart."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(C, 4), nn.ReLU(), nn.Linear(4, C), nn.Sigmoid())

    def gate(self, x):
        return self.fc(self.pool(x).flatten(1))[:, :, None, None]

    def forward(self, x):
        return x * self.gate(x)


ATTACKS: dict[str, type[nn.Module]] = {}


def attack(cls: type[nn.Module]) -> type[nn.Module]:
    ATTACKS[cls.__name__] = cls
    return cls


# ---- training and randomness


@attack
class Dropout(SE):
    def __init__(self):
        super().__init__()
        self.fc.append(nn.Dropout(0.5))


@attack
class FunctionalDropout(SE):
    def forward(self, x):
        return x * F.dropout(self.gate(x), 0.5, self.training)


@attack
class SkipsInTraining(SE):
    def forward(self, x):
        return x if self.training and torch.rand(1) < 0.5 else super().forward(x)


@attack
class OtherInTraining(SE):
    def forward(self, x):
        y = super().forward(x)
        return y * 0.5 if self.training else y


@attack
class PythonRandom(SE):
    def forward(self, x):
        return super().forward(x) if random.random() < 0.999 else x


@attack
class NumpyRandom(SE):
    def forward(self, x):
        return super().forward(x) if numpy.random.rand() < 0.999 else x  # noqa: NPY002


@attack
class RandomTensor(SE):
    def forward(self, x):
        return x * self.gate(x) + 0 * torch.rand(1)


@attack
class Clock(SE):
    def forward(self, x):
        return super().forward(x) if time.time() > 0 else x


# ---- gradients


@attack
class Detached(SE):
    def forward(self, x):
        return x * self.gate(x.detach())


@attack
class Data(SE):
    def forward(self, x):
        return x * self.gate(x.data)


@attack
class NoGrad(SE):
    def forward(self, x):
        with torch.no_grad():
            gate = self.gate(x)
        return x * gate


@attack
class NoGradDecorator(SE):
    @torch.no_grad()
    def gate(self, x):
        return super().gate(x)


@attack
class GradientHook(SE):
    def forward(self, x):
        gate = self.gate(x)
        if gate.requires_grad:
            gate.register_hook(lambda d: 2 * d)
        return x * gate


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return -d


@attack
class OwnFunction(SE):
    def forward(self, x):
        return x * Negated.apply(self.gate(x))


@attack
class Checkpointed(SE):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


# ---- sizes, values, dtypes and modes


@attack
class SmallMaps(SE):
    def forward(self, x):
        return super().forward(x) if x.shape[-1] < 1000 else x


@attack
class LargeBatches(SE):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 else x


@attack
class Values(SE):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@attack
class Where(SE):
    def forward(self, x):
        return torch.where(x > 1e6, x, super().forward(x))


@attack
class Halves(SE):
    def forward(self, x):
        return super().forward(x) if x.dtype != torch.float16 else x


@attack
class Devices(SE):
    def forward(self, x):
        return x if x.is_cuda else super().forward(x)


@attack
class Contiguous(SE):
    def forward(self, x):
        return super().forward(x) if x.is_contiguous() else x


@attack
class GradMode(SE):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else x


@attack
class Casts(SE):
    def forward(self, x):
        return x * self.gate(x.float()).to(x.dtype)


@attack
class Autocast(SE):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


# ---- state


@attack
class StoresGate(SE):
    def forward(self, x):
        self.last = self.gate(x)
        return x * self.last


@attack
class StoresInDict(SE):
    def forward(self, x):
        gate = self.gate(x)
        self.__dict__["last"] = gate
        return x * gate


@attack
class StoresInChild(SE):
    def forward(self, x):
        gate = self.gate(x)
        self.pool.last = gate
        return x * gate


@attack
class AppendsToGlobal(SE):
    def forward(self, x):
        gate = self.gate(x)
        SEEN.append(gate)
        return x * gate


@attack
class Counts(SE):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@attack
class CountsInBuffer(SE):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@attack
class ReadsBuffer(SE):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, x):
        return x * self.gate(x) * self.temperature


@attack
class Prints(SE):
    def forward(self, x):
        print("", end="")
        return super().forward(x)


@attack
class InPlace(SE):
    def forward(self, x):
        return x.mul_(self.gate(x))


@attack
class AugmentedInPlace(SE):
    def forward(self, x):
        x *= self.gate(x)
        return x


@attack
class ReluOfInput(SE):
    def forward(self, x):
        F.relu_(x.flatten(2))
        return super().forward(x)


@attack
class OverwritesAlias(SE):
    def forward(self, x):
        pooled = self.pool(x)
        F.relu_(pooled.view(pooled.size(0), -1))
        return x * self.fc(pooled.flatten(1))[:, :, None, None]


@attack
class NormIsUpdated(SE):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x):
        self.norm(x)
        return super().forward(x)


# ---- options from elsewhere


@attack
class GlobalDict(SE):
    def forward(self, x):
        return super().forward(x) if OPTIONS["on"] else x


@attack
class GlobalFlag(SE):
    def forward(self, x):
        return super().forward(x) if ON else x


@attack
class OwnDict(SE):
    def __init__(self):
        super().__init__()
        self.options = {"residual": True}

    def forward(self, x):
        y = super().forward(x)
        return y + x if self.options["residual"] else y


@attack
class Environment(SE):
    def forward(self, x):
        return x if os.environ.get("NO_ATTENTION") else super().forward(x)


@attack
class DefaultDict(SE):
    def forward(self, x, options=OPTIONS):
        return super().forward(x) if options["on"] else x


@attack
class Property(SE):
    @property
    def on(self):
        return len(SEEN) < 1000

    def forward(self, x):
        return super().forward(x) if self.on else x


@attack
class GetAttr(SE):
    def __getattr__(self, name):
        return SEEN if name == "seen" else super().__getattr__(name)

    def forward(self, x):
        return super().forward(x) if len(self.seen) < 1000 else x


@attack
class OwnCall(SE):
    def __call__(self, x):
        return super().__call__(x) * 2


@attack
class OwnCallImpl(SE):
    def _call_impl(self, *args):
        return super()._call_impl(*args) * 2


@attack
class Tries(SE):
    def forward(self, x):
        try:
            return super().forward(x)
        except RuntimeError:
            return x


# ---- other formulas


@attack
class ClampedInput(SE):
    def forward(self, x):
        return super().forward(x.clamp(-6, 6))


@attack
class MeanOfBatch(SE):
    def forward(self, x):
        return x * self.gate(x.mean(0, keepdim=True))


@attack
class Flipped(SE):
    def forward(self, x):
        return x * self.gate(x.flip(1))


@attack
class GateAlongWidth(SE):
    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, None, None, :]


@attack
class MixesSamples(SE):
    def forward(self, x):
        return x * self.fc(self.pool(x).view(C, -1).t())[:, :, None, None]


@attack
class SqueezesBatch(SE):
    def forward(self, x):
        return x * self.fc(x.mean((2, 3)).squeeze())[..., None, None]


@attack
class SumOfExpanded(SE):
    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True).expand_as(x)
        return x * self.fc(pooled.sum((2, 3)))[:, :, None, None]


@attack
class OneGate(SE):
    def __init__(self):
        super().__init__()
        self.fc[2] = nn.Linear(4, 1)


@attack
class Tuple(SE):
    def forward(self, x):
        return super().forward(x), x


@attack
class SimAMOfAllPixels(nn.Module):
    def forward(self, x):
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        n = x.shape[2] * x.shape[3]  # not n - 1
        return x * torch.sigmoid(d / (4 * (d.sum((2, 3), keepdim=True) / n + 1e-4)) + 0.5)


@attack
class SimAMDetached(nn.Module):
    def forward(self, x):
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        n = x.shape[2] * x.shape[3] - 1
        return x * torch.sigmoid(d / (4 * (d.sum((2, 3), keepdim=True).detach() / n + 1e-4)) + 0.5)


# ---- layers that are not what they seem


@attack
class HookedLayer(SE):
    def __init__(self):
        super().__init__()
        self.fc[0].register_forward_hook(lambda m, x, y: 2 * y)


@attack
class WeightNorm(SE):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.fc[0])


@attack
class SpectralNorm(SE):
    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.fc[0])


class _Wrapped(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


@attack
class SubclassOfLinear(SE):
    def __init__(self):
        super().__init__()
        self.fc[0] = _Wrapped(C, 4)


@attack
class PatchedLayer(SE):
    def __init__(self):
        super().__init__()
        layer = self.fc[0]
        layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2
