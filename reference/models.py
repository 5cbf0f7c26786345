"""ResNet-18 to 152 with SE, BAM, CBAM or SimAM where their authors put them.

Keys and shapes are those of the published networks: ``layer1.0.fc1.weight`` (SE, the layers on the block itself),
``layer1.0.cbam.*``, ``bam1.*`` after layer1, ``layer1.0.conv2.0.weight`` (SimAM after conv2, before its BatchNorm).
The stride of a bottleneck is on its 3x3 convolution; pooling is global, so any input size of at least 32 works.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reference._common import check_choice, check_positive, is_plain_layer
from reference.bam import BAM
from reference.cbam import CBAM
from reference.se import SE, se, se_by_layers
from reference.simam import SimAM

ATTENTIONS = (None, "se", "bam", "cbam", "simam")


class Kit(NamedTuple):
    """What a network is built from, so that one builder serves the reference and the fused modules."""

    se: Callable[..., Tensor]
    SE: type[nn.Module]
    BAM: type[nn.Module]
    CBAM: type[nn.Module]
    SimAM: type[nn.Module]


REFERENCE = Kit(se, SE, BAM, CBAM, SimAM)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class _Block(nn.Module):
    """A residual block: convolutions, then attention, the addition of the identity and ReLU as one epilogue."""

    expansion: int

    def add_attention(self, out_channels: int, attention: str | None, kit: Kit) -> None:
        self.attention = attention
        if attention == "se":
            gate = kit.SE(out_channels)
            self.fc1, self.fc2 = gate.fc1, gate.fc2
            self.se = kit.se
        elif attention == "cbam":
            self.cbam = kit.CBAM(out_channels)

    def epilogue(self, out: Tensor, identity: Tensor) -> Tensor:
        if self.attention == "se":
            fc1, fc2 = self.fc1, self.fc2
            if not (is_plain_layer(fc1, nn.Linear) and is_plain_layer(fc2, nn.Linear)):
                return se_by_layers(out, fc1, fc2, residual=identity, activation="relu")
            return self.se(out, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual=identity, activation="relu")
        if self.attention == "cbam":
            return self.cbam(out, identity, "relu")
        return torch.relu(out + identity)


class BasicBlock(_Block):
    """3x3, 3x3."""

    expansion = 1

    def __init__(self, in_channels, width, stride, downsample, attention, kit):
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        if attention == "simam":
            self.conv2 = nn.Sequential(self.conv2, kit.SimAM(width))
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.add_attention(width, attention, kit)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.epilogue(out, x if self.downsample is None else self.downsample(x))


class Bottleneck(_Block):
    """1x1, 3x3, 1x1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels, width, stride, downsample, attention, kit):
        super().__init__()
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        if attention == "simam":
            self.conv2 = nn.Sequential(self.conv2, kit.SimAM(width))
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * 4, 1)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.downsample = downsample
        self.add_attention(width * 4, attention, kit)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.epilogue(out, x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """A ResNet for (N, 3, H, W) images.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        layers: number of blocks in each of the four stages.
        attention: None, "se", "bam", "cbam" or "simam".
        num_classes: number of logits.
        kit: the modules to build from.

    Raises:
        ValueError: an unknown attention or fewer than 1 class.
    """

    def __init__(
        self,
        block: type[_Block],
        layers: tuple[int, int, int, int],
        attention: str | None = None,
        num_classes: int = 1000,
        kit: Kit = REFERENCE,
    ):
        super().__init__()
        check_choice("attention", attention, ATTENTIONS)
        check_positive("num_classes", num_classes)
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), layers, strict=True), start=1):
            stride, out_channels = 1 if stage == 1 else 2, width * block.expansion
            downsample = None
            if stride != 1 or channels != out_channels:
                downsample = nn.Sequential(_conv(channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
            first = block(channels, width, stride, downsample, attention, kit)
            rest = (block(out_channels, width, 1, None, attention, kit) for _ in range(blocks - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            if attention == "bam" and stage < 4:
                self.add_module(f"bam{stage}", kit.BAM(out_channels))
            channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.attention = attention
        self._initialize()

    def _initialize(self) -> None:
        for name, m in self.named_modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
            elif isinstance(m, nn.BatchNorm2d):
                # CBAM's official networks start with the spatial gate at sigmoid(0) everywhere.
                nn.init.constant_(m.weight, 0 if "SpatialGate" in name else 1)
                nn.init.zeros_(m.bias)

    def stem(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 64, H/4, W/4)."""
        return self.maxpool(torch.relu(self.bn1(self.conv1(x))))

    def features(self, x: Tensor) -> list[Tensor]:
        """The outputs of the four stages."""
        x, maps = self.stem(x), []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            if self.attention == "bam" and stage < 4:
                x = self.get_submodule(f"bam{stage}")(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, num_classes)."""
        return self.fc(self.avgpool(self.features(x)[-1]).flatten(1))


LAYERS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def resnet(depth: int, attention: str | None = None, num_classes: int = 1000, *, kit: Kit = REFERENCE) -> ResNet:
    """ResNet-``depth`` with the named attention.

    Args:
        depth: 18, 34, 50, 101 or 152.
        attention: None, "se", "bam", "cbam" or "simam".
        num_classes: number of logits.
        kit: the modules to build from.

    Raises:
        ValueError: another depth or attention.
    """
    check_choice("depth", depth, LAYERS)
    block, layers = LAYERS[depth]
    return ResNet(block, layers, attention, num_classes, kit)


se_resnet_18 = partial(resnet, 18, "se")
se_resnet_34 = partial(resnet, 34, "se")
se_resnet_50 = partial(resnet, 50, "se")
se_resnet_101 = partial(resnet, 101, "se")
se_resnet_152 = partial(resnet, 152, "se")
bam_resnet_18 = partial(resnet, 18, "bam")
bam_resnet_34 = partial(resnet, 34, "bam")
bam_resnet_50 = partial(resnet, 50, "bam")
bam_resnet_101 = partial(resnet, 101, "bam")
bam_resnet_152 = partial(resnet, 152, "bam")
cbam_resnet_18 = partial(resnet, 18, "cbam")
cbam_resnet_34 = partial(resnet, 34, "cbam")
cbam_resnet_50 = partial(resnet, 50, "cbam")
cbam_resnet_101 = partial(resnet, 101, "cbam")
cbam_resnet_152 = partial(resnet, 152, "cbam")
simam_resnet_18 = partial(resnet, 18, "simam")
simam_resnet_34 = partial(resnet, 34, "simam")
simam_resnet_50 = partial(resnet, 50, "simam")
simam_resnet_101 = partial(resnet, 101, "simam")
simam_resnet_152 = partial(resnet, 152, "simam")
