"""Where NaN and infinities land: in outputs, gradients and buffers exactly where the reference has them.

The table in docs/numerics.md says it in words.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attn_kernels
import reference
from attn_kernels.ops.bam.norm import batch_norm_relu
from reference.catalogue import LAYOUTS, POOLS
from reference.se import ACTIVATIONS, GATES
from tests.harness import MODULES, Run, pair

C = 12
NAN, INF = float("nan"), float("inf")
VALUES = {"nan": NAN, "inf": INF, "-inf": -INF}
# name: module
BUILDS = {name: build for name, build in MODULES.items() if name not in ("se", "channel_gate")}
BUILDS |= {
    f"se {activation} {gate}": lambda kit, c, activation=activation, gate=gate: kit.SE(
        c, 4, mlp_activation=activation, gate=gate
    )
    for activation, gate in itertools.product(ACTIVATIONS, GATES)
}
BUILDS |= {f"channel_gate {pool}": lambda kit, c, pool=pool: kit.ChannelGate(c, 4, (pool,)) for pool in POOLS}
WALKED = ("simam", "cbam", "bam", "spatial_gate", "channel_gate max", "channel_gate lse")


@pytest.fixture(autouse=True)
def as_of_few_numbers(monkeypatch):
    """On GPUs, and of few numbers on the CPU, ReLU6's gradient at NaN is dy, and gelu at infinity is infinite.

    Of many numbers PyTorch's vectorised code makes 0 of the one, and with AVX512 NaN of the other.
    """

    def hardsigmoid(x):
        return torch.where(x + 3 >= 6, 6.0, torch.relu(x + 3)) / 6

    def gelu(x):
        return torch.where(x == INF, x, F.gelu(x))

    monkeypatch.setitem(GATES, "hardsigmoid", hardsigmoid)
    monkeypatch.setitem(ACTIVATIONS, "gelu", gelu)


def _kinds(t):
    """0 of finite numbers, 1, 2 and 3 of -infinity, infinity and NaN."""
    return torch.where(t.isnan(), 3, torch.where(t == INF, 2, torch.where(t == -INF, 1, 0)))


def _results(module, x, residual, activation, dy, create_graph):
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual)]
    y = module(*leaves, activation)
    names = ["x", "residual", *dict(module.named_parameters())]
    gradients = torch.autograd.grad(y, [*leaves, *module.parameters()], dy, create_graph=create_graph)
    return Run(y, dict(zip(names, gradients, strict=True)), dict(module.named_buffers()))


def assert_same_kinds(fused, eager, *arguments, create_graph=False):
    """Assert that all results are finite, infinite or NaN at the same places."""
    got, want = (_results(module, *arguments, create_graph) for module in (fused, eager))
    assert torch.equal(_kinds(got.y), _kinds(want.y)), "y"
    for name, gradient in want.gradients.items():
        if name.endswith("conv.weight") and gradient.shape[-1] > 1:
            # The CPU's convolution multiplies padding as well, and 0 times infinity is NaN: others need not.
            assert not (gradient.isfinite() & ~got.gradients[name].isfinite()).any(), f"d{name}"
        else:
            assert torch.equal(_kinds(got.gradients[name]), _kinds(gradient)), f"d{name}"
    for name in want.buffers:
        assert torch.equal(_kinds(got.buffers[name].float()), _kinds(want.buffers[name].float())), name


def _planted(place, value, shape, layout, device):
    """x, residual and dy, of which one has the value at three places."""
    tensors = {name: torch.randn(shape) for name in ("x", "residual", "dy")}
    if place in tensors:
        for index in ((1, 3, 2, 4), (1, 3, 4, 4), (0, -1, -1, -1)):
            tensors[place][index] = value
    return [t.to(device).contiguous(memory_format=LAYOUTS[layout]) for t in tensors.values()]


@pytest.mark.fast
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", BUILDS)
def test_as_the_reference(name, value, device):
    training = (False, True) if name in ("cbam", "spatial_gate", "bam") else (True,)
    cases = itertools.product(("x", "residual", "dy"), training, ((None, "contiguous"), ("relu", "channels_last")))
    for place, train, (activation, layout) in cases:
        fused, eager = pair(lambda kit: BUILDS[name](kit, C), device)
        x, residual, dy = _planted(place, VALUES[value], (3, C, 5, 7), layout, device)
        assert_same_kinds(fused.train(train), eager.train(train), x, residual, activation, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", WALKED)
def test_planes_larger_than_a_tile(name, value, layout, device):
    for place in ("x", "dy"):
        fused, eager = pair(lambda kit: BUILDS[name](kit, C), device)
        x, residual, dy = _planted(place, VALUES[value], (2, C, 41, 41), layout, device)
        assert_same_kinds(fused, eager, x, residual, None, dy)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", MODULES)
def test_gradients_that_are_differentiated(name, value, device):
    for place, activation in itertools.product(("x", "dy"), (None, "relu")):
        fused, eager = pair(lambda kit: MODULES[name](kit, C), device)
        x, residual, dy = _planted(place, VALUES[value], (3, C, 5, 7), "channels_last", device)
        assert_same_kinds(fused, eager, x, residual, activation, dy, create_graph=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("branch", ["channel", "spatial"])
def test_infinite_logits_of_bam(branch, layout, device):
    """Times the zeros that stand outside a tile's map they would be NaN."""
    fused, eager = (m.eval() for m in pair(lambda kit: kit.BAM(C, 4), device))
    for module in (fused, eager):
        last = (module.channel_att.gate_c if branch == "channel" else module.spatial_att.gate_s)[-1]
        last.bias.data[0] = INF
    x, residual, dy = _planted(None, 0, (3, C, 5, 7), layout, device)
    assert_same_kinds(fused, eager, x, residual, None, dy)


def test_a_dead_elements_infinite_gradient_is_dropped(device):
    """A mask that is multiplied with makes NaN of it."""
    x = torch.tensor([[[[-1.0, 2.0]]]], device=device).requires_grad_()
    dy = torch.tensor([[[[INF, 1.0]]]], device=device)
    for create_graph in (False, True):
        (dx,) = torch.autograd.grad(attn_kernels.SimAM()(x, None, "relu"), x, dy, create_graph=create_graph)
        assert dx.isfinite().all()


def _finite_as(formula, fused, *tensors):
    """Assert that the fused results are finite where the reference's are."""
    for got, want in zip(fused(*tensors), formula(*tensors), strict=True):
        assert (got.isfinite() | ~want.isfinite()).all()


@pytest.mark.device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [5, 41])  # a plane that a program holds, and one that it walks
@pytest.mark.parametrize("deviation", [0.0, 1e19, 1.5e19])  # the last one's squares have an infinite sum
def test_simam_of_a_mean_whose_square_is_infinite(deviation, side, layout, device):
    x = 5e19 + deviation * (torch.randint(0, 2, (1, 8, side, side)) * 2 - 1)
    x = x.to(device).contiguous(memory_format=LAYOUTS[layout])

    def both(function):
        def results(x):
            x = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = function(x)
            return y, *torch.autograd.grad(y.sum(), x)

        return results

    _finite_as(both(reference.simam), both(attn_kernels.functional.simam), x)


@pytest.mark.device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [5, 41])
def test_padding_of_simams_planes_takes_no_part(side, layout, device):
    """(0 - mean) / (4 * lambda) is infinite there."""
    x = torch.full((1, 8, side, side), 2.0**117, device=device).contiguous(memory_format=LAYOUTS[layout])
    x.requires_grad_()
    (dx,) = torch.autograd.grad(attn_kernels.SimAM()(x).sum(), x)
    (expected,) = torch.autograd.grad(reference.simam(x).sum(), x)
    assert expected.isfinite().all()
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("weight", [1.0, -1.0])
@pytest.mark.parametrize("with_conv", [False, True])
def test_padding_of_batch_norms_maps_takes_no_part(with_conv, weight, device):
    """(0 - mean) / deviation is infinite there, of a channel whose values are equal."""
    norm, conv = nn.BatchNorm2d(2).to(device), nn.Conv2d(2, 1, 1).to(device) if with_conv else None
    nn.init.constant_(norm.weight, weight)
    c = torch.full((2, 2, 3, 5), 2.0**122, device=device).requires_grad_()
    r = batch_norm_relu(c, norm, conv)
    gradients = torch.autograd.grad(r.sum(), [c, *norm.parameters(), *(conv.parameters() if with_conv else ())])
    assert all(g.isfinite().all() for g in gradients)


def test_padding_of_cbams_maps_takes_no_part(device):
    fused, eager = pair(lambda kit: kit.SpatialGate(), device)
    for module in (fused, eager):
        nn.init.zeros_(module.spatial.conv.weight).data[0, 0, 3, 3] = 1
    x = torch.full((2, 4, 3, 5), 2.0**122, device=device)

    def both(module):
        def results(x):
            x = x.clone().requires_grad_()
            y = module(x)
            return y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])

        return results

    assert all(t.isfinite().all() for t in both(eager)(x))
    _finite_as(both(eager), both(fused), x)


@pytest.mark.device
@pytest.mark.parametrize("name", ["cbam", "spatial_gate", "bam"])
def test_batch_norms_of_a_mean_whose_square_is_infinite(name, device):
    fused, eager = pair(lambda kit: MODULES[name](kit, 4), device)
    x = torch.full((2, 4, 9, 9), 3e20, device=device)
    _finite_as(lambda x: (eager(x), *eager.buffers()), lambda x: (fused(x), *fused.buffers()), x)
