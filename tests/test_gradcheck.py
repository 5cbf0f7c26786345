"""gradcheck in float64, and gradgradcheck, of every op and option, on maps of a few pixels.

Each op has its whole Jacobian taken once, where it takes the most ways; elsewhere random projections of it, in which a
wrong element shows as surely.
"""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import attn_kernels
from attn_kernels import functional as F
from reference.catalogue import LAYOUTS
from reference.se import ACTIVATIONS, GATES
from tests.harness import MODULES, pair

SHAPE = (2, 3, 1, 2)


def _leaf(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def _x(layout, device):
    return torch.randn(SHAPE, dtype=torch.float64, device=device).contiguous(memory_format=LAYOUTS[layout])


def _mlp(device, bias=True):
    shapes = ((2, 3), (2,), (3, 2), (3,))
    return [_leaf(*s).to(device).detach().requires_grad_() if bias or len(s) == 2 else None for s in shapes]


def _check(function, *inputs, whole=False):
    assert gradcheck(function, inputs, fast_mode=not whole)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "residual", "parameters"])
@pytest.mark.parametrize("name", MODULES)
def test_second_gradients_of_some(name, wanted, device):
    """Where not everything needs a gradient, an x or a branch that the first pass skips is no error in the second."""
    fused, eager = (m.double() for m in pair(lambda kit: MODULES[name](kit, 12), device))
    if wanted == "parameters" and name == "simam":
        return
    x, residual = torch.randn(2, 3, 12, 5, 4, dtype=torch.float64, device=device).unbind()
    found = []
    for module in (fused, eager):
        leaves = x.clone().requires_grad_(wanted == "x"), residual.clone().requires_grad_(wanted == "residual")
        module.requires_grad_(wanted == "parameters")
        inputs = [*module.parameters()] if wanted == "parameters" else [leaves[wanted == "residual"]]
        first = torch.autograd.grad(module(*leaves, "relu").square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_se(layout, activation, device):
    x, residual = (_x(layout, device).requires_grad_() for _ in range(2))
    whole = layout == "contiguous" and activation == "relu"
    _check(lambda x, r, *mlp: F.se(x, *mlp, residual=r, activation=activation), x, residual, *_mlp(device), whole=whole)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mlp_activation", ACTIVATIONS)
def test_se_options(mlp_activation, gate, device):
    x, (w1, _, w2, _) = _x("contiguous", device).requires_grad_(), _mlp(device, bias=False)
    _check(lambda x, w1, w2: F.se(x, w1, None, w2, None, mlp_activation=mlp_activation, gate=gate), x, w1, w2)


@pytest.mark.parametrize("pools", ["avg", "max", "lp", "lse", "avg max lp lse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_gate(layout, pools, device):
    x, whole = _x(layout, device).requires_grad_(), layout == "channels_last" and " " in pools
    _check(lambda x, *mlp: F.channel_gate(x, *mlp, pool_types=pools.split()), x, *_mlp(device), whole=whole)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("pools", ["avg", "max", "max avg"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_attention(layout, pools, activation, device):
    x, residual = (_x(layout, device).requires_grad_() for _ in range(2))
    w = _leaf(3, 3).to(device).detach().requires_grad_()

    def function(x, residual, w):
        def gate(*pooled):
            return torch.sigmoid(sum((i + 1) * p for i, p in enumerate(pooled)) @ w)

        return F.channel_attention(x, gate, pool_types=pools.split(), residual=residual, activation=activation)

    whole = layout == "contiguous" and pools == "max avg" and activation == "relu"
    _check(function, x, residual, w, whole=whole)


def _functional_norm(norm, weight, bias):
    """A BatchNorm2d of the kind that the kernels take, whose parameters gradcheck can move."""
    norm = nn.BatchNorm2d(1, momentum=0.1, track_running_stats=norm.track_running_stats).to(weight).train(norm.training)
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias
    return norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_spatial_gate(layout, training, device):
    x, residual = (_x(layout, device).requires_grad_() for _ in range(2))
    conv, weight, bias = (t.to(device).detach().requires_grad_() for t in (_leaf(1, 2, 3, 3), _leaf(1), _leaf(1)))
    norm = nn.BatchNorm2d(1).train(training)

    def function(x, residual, conv, weight, bias):
        norm_now = _functional_norm(norm, weight, bias)
        return F.spatial_gate(x, conv, norm_now, residual=residual, activation="relu")

    _check(function, x, residual, conv, weight, bias, whole=layout == "contiguous" and training)


@pytest.mark.parametrize(
    ("layout", "pools", "training"),
    [
        ("contiguous", "avg max", True),
        ("contiguous", "avg max lp lse", False),
        ("channels_last", "avg max lp lse", True),
        ("channels_last", "avg max", False),
    ],
)
def test_cbam(layout, pools, training, device):
    x = _x(layout, device).requires_grad_()
    conv, weight, bias = (t.to(device).detach().requires_grad_() for t in (_leaf(1, 2, 3, 3), _leaf(1), _leaf(1)))
    norm = nn.BatchNorm2d(1).train(training)

    def function(x, conv, weight, bias, *mlp):
        return F.cbam(x, *mlp, conv, _functional_norm(norm, weight, bias), pool_types=pools.split())

    whole = layout == "contiguous" and training and pools == "avg max"
    _check(function, x, conv, weight, bias, *_mlp(device), whole=whole)


@pytest.mark.parametrize(("layout", "activation"), [("contiguous", "relu"), ("channels_last", None)])
def test_bam(layout, activation, device):
    # 3 samples: BatchNorm over 2 leaves nothing but signs, whose derivative is 0.
    module = attn_kernels.BAM(2, 2, num_layers=1, dilation_conv_num=1, dilation_val=1).double().to(device)
    x = torch.randn(3, 2, 1, 2, dtype=torch.float64, device=device).contiguous(memory_format=LAYOUTS[layout])
    residual = torch.randn_like(x).requires_grad_()
    parameters = list(module.parameters())
    whole = layout == "contiguous" and activation == "relu"
    _check(lambda x, r, *_: module(x, r, activation), x.requires_grad_(), residual, *parameters, whole=whole)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_simam(layout, activation, device):
    x, residual = (_x(layout, device).requires_grad_() for _ in range(2))
    whole = activation == "relu"
    _check(lambda x, r: F.simam(x, 1e-2, residual=r, activation=activation), x, residual, whole=whole)
