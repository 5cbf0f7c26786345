"""The reference's networks: published sizes, keys and placements, and the same logits as torchvision's."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from reference import models
from tests import official

Shapes = dict[str, tuple[int, ...]]

DEPTHS = (18, 34, 50, 101, 152)
ATTENTIONS = (None, "se", "bam", "cbam", "simam")
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
PLAIN = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
PARAMETERS = {
    None: PLAIN,
    "simam": PLAIN,
    "se": {18: 11_778_592, 34: 21_958_868, 50: 28_088_024, 101: 49_326_872, 152: 66_821_848},
    "bam": {18: 11_712_503, 34: 21_820_663, 50: 25_915_099, 101: 44_907_227},
    "cbam": {18: 11_779_392, 34: 21_960_468, 50: 28_089_624, 101: 49_330_172, 152: 66_826_848},
}


def build(depth: int, attention: str | None) -> nn.Module:
    """The network under its public name, without memory for its parameters."""
    with torch.device("meta"):
        if attention is None:
            return models.resnet(depth)
        return getattr(models, f"{attention}_resnet_{depth}")()


@pytest.mark.parametrize(
    ("attention", "depth", "count"),
    [(attention, depth, count) for attention, counts in PARAMETERS.items() for depth, count in counts.items()],
)
def test_parameter_count(attention, depth, count):
    assert sum(p.numel() for p in build(depth, attention).parameters()) == count


def batchnorm(name: str, channels: int) -> Shapes:
    per_channel = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": (channels,) for key in per_channel} | {f"{name}.num_batches_tracked": ()}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def convolution(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def bam_shapes(name: str, channels: int) -> Shapes:
    hidden = channels // 16
    gate_c, gate_s = f"{name}.channel_att.gate_c.gate_c", f"{name}.spatial_att.gate_s.gate_s"
    return {
        **linear(f"{gate_c}_fc_0", channels, hidden),
        **batchnorm(f"{gate_c}_bn_1", hidden),
        **linear(f"{gate_c}_fc_final", hidden, channels),
        **convolution(f"{gate_s}_conv_reduce0", channels, hidden, 1),
        **batchnorm(f"{gate_s}_bn_reduce0", hidden),
        **convolution(f"{gate_s}_conv_di_0", hidden, hidden, 3),
        **batchnorm(f"{gate_s}_bn_di_0", hidden),
        **convolution(f"{gate_s}_conv_di_1", hidden, hidden, 3),
        **batchnorm(f"{gate_s}_bn_di_1", hidden),
        **convolution(f"{gate_s}_conv_final", hidden, 1, 1),
    }


def block_attention_shapes(attention: str | None, name: str, channels: int) -> Shapes:
    hidden = channels // 16
    if attention == "se":
        return linear(f"{name}.fc1", channels, hidden) | linear(f"{name}.fc2", hidden, channels)
    if attention == "cbam":
        return {
            **linear(f"{name}.cbam.ChannelGate.mlp.1", channels, hidden),
            **linear(f"{name}.cbam.ChannelGate.mlp.3", hidden, channels),
            f"{name}.cbam.SpatialGate.spatial.conv.weight": (1, 2, 7, 7),
            **batchnorm(f"{name}.cbam.SpatialGate.spatial.bn", 1),
        }
    return {}


def network_shapes(depth: int, attention: str | None) -> Shapes:
    """The state dict of the published ResNet with ``attention``."""
    expansion = 1 if depth < 50 else 4
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **batchnorm("bn1", 64)}
    inputs = 64
    for stage, (blocks, width) in enumerate(zip(BLOCKS[depth], (64, 128, 256, 512), strict=True), start=1):
        outputs = width * expansion
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            kernels = (3, 3) if expansion == 1 else (1, 3, 1)
            widths = (inputs, width, outputs) if expansion == 1 else (inputs, width, width, outputs)
            for k, (kernel, (a, b)) in enumerate(zip(kernels, itertools.pairwise(widths), strict=True), start=1):
                # SimAM stands between conv2 and its BatchNorm, which makes conv2 the first of a sequence.
                conv = f"{name}.conv2.0" if attention == "simam" and k == 2 else f"{name}.conv{k}"
                shapes[f"{conv}.weight"] = (b, a, kernel, kernel)
                shapes |= batchnorm(f"{name}.bn{k}", b)
            if i == 0 and (stage > 1 or inputs != outputs):
                shapes[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                shapes |= batchnorm(f"{name}.downsample.1", outputs)
            shapes |= block_attention_shapes(attention, name, outputs)
            inputs = outputs
        if attention == "bam" and stage < 4:
            shapes |= bam_shapes(f"bam{stage}", outputs)
    return shapes | linear("fc", inputs, 1000)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_state_dict_is_published(depth, attention):
    state = {key: tuple(t.shape) for key, t in build(depth, attention).state_dict().items()}
    assert state == network_shapes(depth, attention)


def randomized(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, no BatchNorm an identity or a zero."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                nn.init.normal_(t, 0.5, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module.double().eval()


def published_attention(attention: str, block: nn.Module, channels: int) -> nn.Module:
    """The published module with the block's own attention weights."""
    if attention == "simam":
        return official.SimAM()
    if attention == "se":
        theirs, ours = official.SE(channels, channels // 16), nn.ModuleDict({"fc1": block.fc1, "fc2": block.fc2})
    else:
        theirs, ours = official.CBAM(channels), block.cbam
    theirs.double().eval().load_state_dict(ours.state_dict(), strict=True)
    return theirs


@pytest.mark.parametrize("index", [0, 1], ids=["downsample", "identity"])
@pytest.mark.parametrize("attention", ["se", "cbam", "simam"])
@pytest.mark.parametrize("depth", [18, 50])
def test_block_placement(depth, attention, index):
    """SE and CBAM act between the last BatchNorm and the addition, SimAM between conv2 and its BatchNorm."""
    block = randomized(models.resnet(depth, attention).layer2[index])
    convolutions = 2 if depth == 18 else 3
    x = torch.randn(2, block.conv1.in_channels, 8, 6, dtype=torch.float64)
    attend = published_attention(attention, block, block.get_submodule(f"bn{convolutions}").num_features)

    out: Tensor = x
    for k in range(1, convolutions + 1):
        conv, bn = block.get_submodule(f"conv{k}"), block.get_submodule(f"bn{k}")
        if attention == "simam" and k == 2:
            conv = nn.Sequential(conv[0], attend)
        out = bn(conv(out))
        out = out.relu() if k < convolutions else out
    if attention != "simam":
        out = attend(out)
    identity = x if block.downsample is None else block.downsample(x)
    torch.testing.assert_close(block(x), (out + identity).relu(), rtol=1e-10, atol=1e-10)


def test_bam_placement():
    """After each of the first three stages."""
    network, image = randomized(models.resnet(18, "bam")), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x = network.stem(image)
    for stage, expected in enumerate(network.features(image), start=1):
        x = network.get_submodule(f"layer{stage}")(x)
        if stage < 4:
            bam = official.BAM(x.shape[1]).double().eval()
            bam.load_state_dict(network.get_submodule(f"bam{stage}").state_dict(), strict=True)
            x = bam(x)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_training_step(attention):
    network = models.resnet(18, attention, num_classes=10).train()
    logits = network(torch.randn(2, 3, 64, 48))
    assert logits.shape == (2, 10)
    nn.functional.cross_entropy(logits, torch.tensor([3, 7])).backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert network.conv1.weight.grad.any()
    assert all(b == 1 for name, b in network.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("size", [(32, 32), (33, 71), (97, 40), (224, 224)], ids=str)
def test_any_input_size(attention, size):
    network = models.resnet(18, attention, num_classes=3).eval()
    with torch.no_grad():
        logits = network(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_initialization(attention):
    """CBAM's spatial gates start as sigmoid(0) everywhere, every other BatchNorm as the identity."""
    for name, m in models.resnet(18, attention).named_modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == (0 if "SpatialGate" in name else 1)).all(), name
            assert not m.bias.any(), name
        elif isinstance(m, nn.Conv2d) and m.weight.numel() > 4096:
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name


def torchvision_models() -> ModuleType:
    """torchvision's networks. Beside a CPU build of torch its compiled operators do not register: none is needed."""
    if torch.version.cuda is None:
        sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    import torchvision.models

    return torchvision.models


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchvision_checkpoint(training):
    theirs = torchvision_models().resnet50()
    ours = models.resnet(50)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=0, atol=0)
