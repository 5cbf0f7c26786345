"""Whole networks: a training step with and without fuse_."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import reference
import reference.models
from attn_kernels import fuse_
from tests.fuse.cases import (
    timm,
)


class TestNetworks:
    @pytest.fixture(params=["timm", "torchvision", "reference"])
    def network(self, request, device) -> nn.Module:
        if request.param == "timm":
            layers = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
            block = {"block": timm.models.resnet.BasicBlock, "block_args": {"attn_layer": "se"}}
            network = timm.models.resnet.ResNet(**block, **layers, num_classes=5)
        elif request.param == "torchvision":
            import torchvision.models

            network = torchvision.models.mobilenet_v3_small(num_classes=5, width_mult=0.25)
        else:
            block = partial(reference.models.BasicBlock, kit=reference.models.REFERENCE, downsample=None, stride=1)
            blocks = [block(8, 8, attention=attention) for attention in ("se", "cbam", "simam")]
            stem = nn.Conv2d(3, 8, 7, 8, 3), reference.BAM(8, 2)
            network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        return network.to(device)

    def test_a_training_step(self, network, device):
        eager = copy.deepcopy(network).double()  # fp32 and 2 samples amplify rounding through BatchNorm
        network = network.double()
        before = list(network.state_dict())
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (network, eager)]
        report = fuse_(network)
        assert report.left == 0
        assert report.fused > 0
        assert list(network.state_dict()) == before
        x = torch.randn(2, 3, 64, 64, device=device, dtype=torch.float64)
        for model, optimizer in zip((network, eager), optimizers, strict=True):
            torch.manual_seed(3)  # of the dropout
            torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 4], device=device)).backward()
            optimizer.step()
        report.restore()
        for (name, got), want in zip(network.state_dict().items(), eager.state_dict().values(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=name)
