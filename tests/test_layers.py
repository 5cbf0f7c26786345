"""Own modules whose layers are not plain: hooks run, wrappers and parametrizations have their effect."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import attn_kernels
import reference
import reference.models
from attn_kernels import explain
from attn_kernels import models as fused_models

C = 16
BUILD = {
    "SE": lambda package: package.SE(C, 4, mlp_activation="silu", gate="hardsigmoid"),
    "ChannelGate": lambda package: package.ChannelGate(C, 4, ("avg", "max", "lse")),
    "SpatialGate": lambda package: package.SpatialGate(),
    "CBAM": lambda package: package.CBAM(C, 4),
    "CBAM no_spatial": lambda package: package.CBAM(C, 4, no_spatial=True),
    "BAM": lambda package: package.BAM(C, 4),
}
PACKAGES = {"reference": reference, "attn_kernels": attn_kernels}
# The layers that compute something; the holder of the spatial gate's layers is never called.
LAYERS = [
    (name, path)
    for name, build in BUILD.items()
    for path, _ in build(reference).named_modules()
    if path and not path.endswith("spatial")
]


class Lora(nn.Module):
    """Adds to a layer, and pretends to be it."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(0.5))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        y = self.base(x)
        return y + self.scale * y.tanh()


class Doubled:
    """A subclass of a layer that does something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def build(package: str, name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return BUILD[name](PACKAGES[package]).to(device).eval()


def inputs(device: torch.device) -> torch.Tensor:
    return torch.randn(3, C, 5, 4, device=device)


@pytest.mark.fast
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("name", "path"), LAYERS)
def test_hook(package, name, path, device):
    module, x, seen = build(package, name, device), inputs(device), []
    expected = module(x)
    handle = module.get_submodule(path).register_forward_hook(lambda m, args, y: seen.append(path))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert set(seen) == {path}
    assert not explain(module, x).fused
    handle.remove()
    torch.testing.assert_close(module(x), expected)


def layers(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Each layer with a weight: its parent, its name and itself."""
    return [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | nn.Conv2d)
    ]


@pytest.mark.fast
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("change", ["LoRA", "weight_norm", "pruning", "old weight_norm", "forward", "subclass"])
def test_layer_in_place_of_a_plain_one(package, name, change, device):
    """Beside the same module whose layers' weights were set to what the change makes of them."""
    module, x = build(package, name, device), inputs(device)
    untouched = module(x)
    for parent, child_name, layer in layers(module):
        if change == "LoRA":
            setattr(parent, child_name, Lora(layer))
        elif change == "weight_norm":
            parametrizations.weight_norm(layer)
            layer.parametrizations.weight.original0.data.mul_(2)
        elif change == "pruning":
            prune.l1_unstructured(layer, "weight", 0.5)
            layer.weight_orig.data.mul_(2)  # the weight is computed anew in a hook before the next call
        elif change == "old weight_norm":
            nn.utils.weight_norm(layer)
            layer.weight_g.data.mul_(2)
        elif change == "forward":
            layer.forward = lambda t, forward=layer.forward: 2 * forward(t)
        else:
            layer.__class__ = type("Doubled", (Doubled, type(layer)), {})
    changed = module(x)
    assert not torch.allclose(changed, untouched, atol=1e-4)
    other = build("reference" if package == "attn_kernels" else "attn_kernels", name, device)
    assert other is not module
    if change in ("weight_norm", "pruning", "old weight_norm"):
        for (_, _, ours), (_, _, theirs) in zip(layers(module), layers(other), strict=True):
            theirs.weight = nn.Parameter(ours.weight.detach().clone())
        torch.testing.assert_close(changed, other(x), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(changed, copy.deepcopy(module)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", BUILD)
def test_forward_of_any_layers_instance(package, name, device):
    for path, layer in build(package, name, device).named_modules():
        if not path or not isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d | nn.ReLU):
            continue
        module, x = build(package, name, device), inputs(device)
        untouched, layer = module(x), module.get_submodule(path)
        layer.forward = lambda t, forward=layer.forward: 2 * forward(t)
        changed = module(x)
        assert not torch.allclose(changed, untouched, atol=1e-5), path
        torch.testing.assert_close(changed, copy.deepcopy(module)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("name", "kind"), [("SE", nn.Linear), ("CBAM", nn.Conv2d), ("BAM", nn.ReLU)])
def test_forward_of_a_class(package, name, kind, device, monkeypatch):
    module, x = build(package, name, device), inputs(device)
    untouched = module(x)
    monkeypatch.setattr(kind, "forward", lambda self, t, forward=kind.forward: 2 * forward(self, t))
    assert not torch.allclose(module(x), untouched, atol=1e-5)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", BUILD)
def test_hooks_on_every_module(package, name, device):
    module, x, seen = build(package, name, device), inputs(device), set()
    expected = module(x)
    with nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.add(m)):
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        assert not explain(module, x).fused
    holders = {m for n, m in module.named_modules() if n.endswith("spatial")}  # never called
    assert seen == {*module.modules()} - holders
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("package", PACKAGES)
def test_gradients_of_lora(package, device):
    module, x = build(package, "CBAM", device), inputs(device)
    module.requires_grad_(False)
    for parent, name, layer in layers(module):
        setattr(parent, name, Lora(layer).to(device))
    module(x).square().sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if name.endswith("scale")}
    assert len(found) == 3
    assert all(g is not None and g.abs() > 0 for g in found.values())


@pytest.mark.parametrize("models", [reference.models, fused_models], ids=["reference", "attn_kernels"])
def test_se_on_a_block(models, device):
    """SE's layers stand on the blocks of SE-ResNet."""
    network = models.se_resnet_18(num_classes=3).to(device).eval()
    block, x = network.layer1[0], torch.randn(2, 64, 5, 4, device=device)
    expected, seen = block(x), []
    block.fc1.register_forward_hook(lambda m, args, y: seen.append(m))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [block.fc1]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["SE", "CBAM", "BAM"])
def test_half_precision_and_autocast(package, name, device):
    module = build(package, name, device)
    x = inputs(device).bfloat16()
    expected = module(x)
    for parent, child_name, layer in layers(module):
        setattr(parent, child_name, nn.Sequential(layer))
    with torch.autocast(device.type, torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
