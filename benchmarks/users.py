"""The code that people run, the baseline of every comparison: timm's SE and CBAM, the published BAM and SimAM.

The constructors are those of ``reference``, which is something else: its statistics are float32 in every dtype, which
costs more. Here everything is computed in the dtype that the module is moved to. A residual block ends as timm's and
torchvision's do, with the addition and the ReLU in place.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import models

LIBRARIES = {"SE": "timm", "CBAM": "timm"}  # the other modules are here
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
GATES = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}


def is_available(module: str) -> bool:
    """Whether the library that a module comes from is installed."""
    return module not in LIBRARIES or find_spec(LIBRARIES[module]) is not None


def library(name: str) -> ModuleType:
    """A module of timm or torchvision.

    Raises:
        ImportError: the library is not installed.
    """
    if not torch.cuda.is_available():  # beside a CPU build of torch, torchvision's compiled operators do not register
        sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    return import_module(name)


def SE(
    channels: int, *, hidden_channels: int | None = None, mlp_activation: str = "relu", gate: str = "sigmoid"
) -> nn.Module:
    """timm's ``SEModule``."""
    hidden = hidden_channels or max(1, round(channels / 16))
    activation, gate = ACTIVATIONS[mlp_activation], GATES[gate]
    return library("timm.layers").SEModule(channels, rd_channels=hidden, act_layer=activation, gate_layer=gate)


def CBAM(channels: int) -> nn.Module:
    """timm's ``CbamModule``."""
    return library("timm.layers.cbam").CbamModule(channels)


class Flatten(nn.Module):
    """(N, C, 1, 1) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


class BAM(nn.Module):
    """Jongchan/attention-module: MODELS/bam.py, written anew.

    It averages the leading H x H part of each plane, as published.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = channels // reduction
        channel = OrderedDict(
            flatten=Flatten(),
            gate_c_fc_0=nn.Linear(channels, hidden),
            gate_c_bn_1=nn.BatchNorm1d(hidden),
            gate_c_relu_1=nn.ReLU(),
            gate_c_fc_final=nn.Linear(hidden, channels),
        )
        spatial = OrderedDict(gate_s_conv_reduce0=nn.Conv2d(channels, hidden, 1))
        spatial["gate_s_bn_reduce0"], spatial["gate_s_relu_reduce0"] = nn.BatchNorm2d(hidden), nn.ReLU()
        for i in range(2):
            spatial[f"gate_s_conv_di_{i}"] = nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4)
            spatial[f"gate_s_bn_di_{i}"], spatial[f"gate_s_relu_di_{i}"] = nn.BatchNorm2d(hidden), nn.ReLU()
        spatial["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1)
        self.channel_att, self.spatial_att = nn.Module(), nn.Module()
        self.channel_att.gate_c = nn.Sequential(channel)
        self.spatial_att.gate_s = nn.Sequential(spatial)

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel_att.gate_c(F.avg_pool2d(x, x.shape[2], x.shape[2]))[:, :, None, None]
        return x * (1 + torch.sigmoid(channel * self.spatial_att.gate_s(x)))


class simam_module(nn.Module):
    """ZjjConan/SimAM: networks/attentions/simam_module.py, written anew."""

    def __init__(self, channels: int | None = None, e_lambda: float = 1e-4):
        super().__init__()
        self.activaton = nn.Sigmoid()  # as published
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        return x * self.activaton(d / (4 * (d.sum((2, 3), keepdim=True) / n + self.e_lambda)) + 0.5)


SimAM = simam_module


class AddReLU(nn.Module):
    """An attention module and the end of a residual block, called as this project's modules are."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, residual: Tensor, activation: str = "relu") -> Tensor:
        """``relu(attention(x) + residual)``."""
        if activation != "relu":
            raise ValueError(f'activation: expected "relu", got {activation!r}')
        out = self.attention(x)
        out += residual
        return F.relu(out, inplace=True)


class _Block:
    """A residual block of ``reference.models`` that ends in users' code."""

    def add_attention(self, out_channels: int, attention: str | None, kit: models.Kit) -> None:
        kinds = {"se": kit.SE, "cbam": kit.CBAM}
        self.end = AddReLU(kinds[attention](out_channels) if attention in kinds else nn.Identity())

    def epilogue(self, out: Tensor, identity: Tensor) -> Tensor:
        return self.end(out, identity)


class BasicBlock(_Block, models.BasicBlock):
    """3x3, 3x3."""


class Bottleneck(_Block, models.Bottleneck):
    """1x1, 3x3, 1x1 to four times the width."""


def resnet(depth: int, attention: str | None = None, num_classes: int = 1000) -> nn.Module:
    """``reference.models.resnet`` with users' modules."""
    block, layers = models.LAYERS[depth]
    block = {models.BasicBlock: BasicBlock, models.Bottleneck: Bottleneck}[block]
    kit = models.REFERENCE._replace(SE=SE, BAM=BAM, CBAM=CBAM, SimAM=SimAM)  # the blocks above need no function
    return models.ResNet(block, layers, attention, num_classes, kit)
