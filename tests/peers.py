"""Stand-ins for modules of repositories that are not installed: their names, keys and formulas, written anew."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.users import BAM, Flatten
from benchmarks.users import simam_module as simam_module


class jongchan:
    """Jongchan/attention-module: MODELS/bam.py and MODELS/cbam.py."""

    class ChannelGate(nn.Module):
        def __init__(self, channels: int, reduction: int = 16, pool_types=("avg", "max")):
            super().__init__()
            hidden = channels // reduction
            self.mlp = nn.Sequential(Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
            self.pool_types = list(pool_types)

        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[2:]
            pools = {
                "avg": lambda: F.avg_pool2d(x, size),
                "max": lambda: F.max_pool2d(x, size),
                "lp": lambda: F.lp_pool2d(x, 2.0, size),
                "lse": lambda: x.flatten(2).logsumexp(2),
            }
            logits = sum(self.mlp(pools[name]()) for name in self.pool_types)
            return x * torch.sigmoid(logits)[:, :, None, None].expand_as(x)

    class ChannelPool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((x.max(1)[0], x.mean(1)), 1)

    class SpatialGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.compress = jongchan.ChannelPool()
            conv, bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01)
            self.spatial = nn.Sequential(OrderedDict(conv=conv, bn=bn))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.spatial(self.compress(x)))

    class CBAM(nn.Module):
        def __init__(self, channels: int, reduction: int = 16, pool_types=("avg", "max"), no_spatial: bool = False):
            super().__init__()
            self.ChannelGate = jongchan.ChannelGate(channels, reduction, pool_types)
            self.no_spatial = no_spatial
            if not no_spatial:
                self.SpatialGate = jongchan.SpatialGate()

        def forward(self, x: Tensor) -> Tensor:
            x = self.ChannelGate(x)
            return x if self.no_spatial else self.SpatialGate(x)

    BAM = BAM


class moskomule:
    """moskomule/senet.pytorch: senet/se_module.py."""

    class SELayer(nn.Module):
        def __init__(self, channel: int, reduction: int = 16):
            super().__init__()
            hidden = channel // reduction
            self.avg_pool = nn.AdaptiveAvgPool2d(1)
            layers = nn.Linear(channel, hidden, bias=False), nn.ReLU(inplace=True)
            self.fc = nn.Sequential(*layers, nn.Linear(hidden, channel, bias=False), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.fc(self.avg_pool(x).flatten(1))[:, :, None, None].expand_as(x)


class cadene:
    """Cadene/pretrained-models.pytorch: models/senet.py."""

    class SEModule(nn.Module):
        def __init__(self, channels: int, reduction: int):
            super().__init__()
            self.avg_pool = nn.AdaptiveAvgPool2d(1)
            self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
            self.relu = nn.ReLU(inplace=True)
            self.fc2 = nn.Conv2d(channels // reduction, channels, 1)
            self.sigmoid = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class openmmlab:
    """mmpretrain's and mmdetection's SELayer, with what it needs of mmcv."""

    class HSigmoid(nn.Module):
        def __init__(self, bias: float = 3.0, divisor: float = 6.0):
            super().__init__()
            self.bias, self.divisor = bias, divisor

        def forward(self, x: Tensor) -> Tensor:
            return ((x + self.bias) / self.divisor).clamp(0, 1)

    class ConvModule(nn.Module):
        def __init__(self, inputs: int, outputs: int, activate: nn.Module, norm: bool = False):
            super().__init__()
            self.conv = nn.Conv2d(inputs, outputs, 1)
            if norm:
                self.bn = nn.BatchNorm2d(outputs)
            self.activate = activate
            self.with_norm = norm

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.activate(self.bn(x) if self.with_norm else x)

    class SELayer(nn.Module):
        def __init__(self, channels: int, ratio: int = 16, gate: nn.Module | None = None, norm: bool = False):
            super().__init__()
            self.global_avgpool = nn.AdaptiveAvgPool2d(1)
            self.conv1 = openmmlab.ConvModule(channels, channels // ratio, nn.ReLU(), norm)
            self.conv2 = openmmlab.ConvModule(channels // ratio, channels, gate or nn.Sigmoid())
            self.return_weight = False

        def forward(self, x: Tensor) -> Tensor:
            gate = self.conv2(self.conv1(self.global_avgpool(x)))
            return gate if self.return_weight else x * gate


class RegNetSELayer(nn.Module):
    """huggingface/transformers: models/regnet."""

    def __init__(self, in_channels: int, reduced_channels: int):
        super().__init__()
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        down, up = nn.Conv2d(in_channels, reduced_channels, 1), nn.Conv2d(reduced_channels, in_channels, 1)
        self.attention = nn.Sequential(down, nn.ReLU(), up, nn.Sigmoid())

    def forward(self, hidden_state: Tensor) -> Tensor:
        return hidden_state * self.attention(self.pooler(hidden_state))


class seed:
    """SE-ResNet with SE's layers on the block, and pools that know the size of their maps."""

    class BasicBlock(nn.Module):
        def __init__(self, planes: int, size: int):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
            self.relu = nn.ReLU(inplace=True)
            self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
            self.downsample = None
            self.globalAvgPool = nn.AvgPool2d(size, stride=1)
            self.fc1 = nn.Linear(planes, round(planes / 4))
            self.fc2 = nn.Linear(round(planes / 4), planes)
            self.sigmoid = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            gate = self.globalAvgPool(out)
            gate = gate.view(gate.size(0), -1)
            gate = self.sigmoid(self.fc2(self.relu(self.fc1(gate))))
            gate = gate.view(gate.size(0), gate.size(1), 1, 1)
            out = gate * out
            out += x if self.downsample is None else self.downsample(x)
            return self.relu(out)
