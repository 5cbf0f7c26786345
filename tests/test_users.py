"""The code that people run computes what the reference computes: they are compared for what it costs."""

import pytest
import torch
from torch import nn

import reference
from benchmarks import users
from benchmarks.shapes import KERNELS


def pair(kernel: str, channels: int, side: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A kernel of the reference and of users' code, with the same parameters."""
    ours = KERNELS[kernel].build(reference, channels, side)
    theirs = KERNELS[kernel].build(users, channels, side)
    if kernel == "cbam":  # timm's MLP has no biases, and its convolution takes the mean first
        ours.ChannelGate.mlp[1].bias = ours.ChannelGate.mlp[3].bias = None
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        p.data = q.data.reshape(p.shape).clone()
    if kernel == "cbam":
        theirs.spatial.conv.conv.weight.data = ours.SpatialGate.spatial.conv.weight.data.flip(1)
    return ours.double().eval(), theirs.double().eval()


@pytest.mark.parametrize(
    ("kernel", "channels", "side"),
    [
        ("se", 64, None),
        ("se_efficientnet_b0", 144, 28),
        ("se_mobilenet_v3", 72, 28),
        ("cbam", 64, None),
        ("bam", 64, None),
        ("simam", 3, None),
    ],
)
def test_computes_what_the_reference_computes(kernel, channels, side):
    ours, theirs = pair(kernel, channels, side)
    x = torch.randn(2, channels, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(theirs(x), ours(x))


def test_ends_a_residual_block():
    ours, theirs = pair("se", 32)
    x, residual, dy = (torch.randn(2, 32, 5, 5, dtype=torch.float64) for _ in range(3))
    results = []
    for module in (ours, users.AddReLU(theirs)):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = module(*leaves, activation="relu")
        results.append((y, *torch.autograd.grad(y, [*leaves, *module.parameters()], dy)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.view_as(want), want)
    with pytest.raises(ValueError, match="activation"):
        users.AddReLU(theirs)(x, residual, None)


@pytest.mark.parametrize("module", ["SE", "SimAM"])
def test_widens_nothing(module):
    x = torch.randn(2, 32, 5, 5).bfloat16().requires_grad_()
    saved = {}
    for kit in (users, reference):
        dtypes = saved[kit] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, dtypes=dtypes: dtypes.add(t.dtype) or t, lambda t: t):
            y = getattr(kit, module)(32).bfloat16()(x)
        assert y.dtype == torch.bfloat16
    assert saved[users] == {torch.bfloat16}
    assert torch.float32 in saved[reference]


def test_says_what_is_not_installed(monkeypatch):
    assert all(map(users.is_available, ("SE", "BAM", "CBAM", "SimAM")))
    monkeypatch.setattr(users, "find_spec", lambda name: None)
    assert [name for name in ("SE", "BAM", "CBAM", "SimAM") if users.is_available(name)] == ["BAM", "SimAM"]
