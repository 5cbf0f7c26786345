"""The reference against the published formulas, and every decision on its semantics."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import reference
from reference.catalogue import LAYOUTS
from tests import official

POOLS = ("avg", "max", "lp", "lse")
HALF = (torch.float16, torch.bfloat16)
POOL_COMBINATIONS = [pools for k in range(1, 5) for pools in itertools.combinations(POOLS, k)]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "se": lambda: reference.SE(32),
    "channel_gate": lambda: reference.ChannelGate(32, pool_types=POOLS),
    "spatial_gate": lambda: reference.SpatialGate(),
    "cbam": lambda: reference.CBAM(32),
    "bam": lambda: reference.BAM(32),
    "simam": lambda: reference.SimAM(32),
}
every_module = pytest.mark.parametrize("name", MODULES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def randomize(module: nn.Module) -> nn.Module:
    """Weights, biases and running statistics that no formula can ignore."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module


def assert_scaled(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Close relative to the largest element, or to 1: the measure for sums whose terms cancel."""
    atol = tolerance * max(1.0, expected.detach().abs().amax().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda message: f"{name}: {message}")


def assert_published(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]) -> None:
    """Same keys; in float64 the same output, gradients and BatchNorm statistics, in training and in eval mode."""
    randomize(theirs.double())
    ours.double().load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(shape, dtype=torch.float64) + 0.5
    weight = torch.randn_like(x)
    for training in (True, False):
        results = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = module.train(training)(leaf)
            parameters = dict(module.named_parameters())
            gradients = torch.autograd.grad((y * weight).sum(), (leaf, *parameters.values()))
            results.append(
                {"y": y, **dict(zip(("x", *parameters), gradients, strict=True)), **dict(module.named_buffers())}
            )
        assert results[0].keys() == results[1].keys()
        for key, expected in results[1].items():
            assert_scaled(results[0][key], expected, 1e-11, key)


@pytest.mark.parametrize(
    "shape", [(2, 64, 56, 56), (2, 256, 14, 14), (3, 512, 7, 7), (2, 40, 9, 5), (5, 33, 1, 1)], ids=str
)
def test_se_is_published(shape):
    assert_published(reference.SE(shape[1]), official.SE(shape[1], round(shape[1] / 16)), shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", official.GATES)
@pytest.mark.parametrize("activation", official.ACTIVATIONS)
def test_se_variants_are_published(activation, gate, bias):
    ours = reference.SE(24, hidden_channels=10, bias=bias, mlp_activation=activation, gate=gate)
    nn.init.normal_(ours.fc2.weight, std=4)  # far enough out to reach the flat ends of the hard sigmoid
    theirs = official.SE(24, 10, bias, activation, gate)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_published(ours, theirs, (8, 24, 5, 7))


@pytest.mark.parametrize(
    ("channels", "reduction", "hidden"), [(64, 16, 4), (40, 16, 2), (56, 16, 4), (4, 16, 1), (9, 2, 4)]
)
def test_se_hidden_channels(channels, reduction, hidden):
    assert reference.SE(channels, reduction).fc1.weight.shape == (hidden, channels)
    assert reference.SE(channels, hidden_channels=3).fc2.weight.shape == (channels, 3)


@pytest.mark.parametrize("pools", POOL_COMBINATIONS, ids="+".join)
def test_channel_gate_is_published(pools):
    assert_published(reference.ChannelGate(48, 8, pools), official.ChannelGate(48, 8, pools), (3, 48, 9, 6))


def test_channel_gate_without_biases():
    x, w1, w2 = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 8, 5, 4), (3, 8), (8, 3)))
    zeros = torch.zeros(3, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    y = reference.channel_gate(x, w1, None, w2, None)
    torch.testing.assert_close(y, reference.channel_gate(x, w1, zeros[0], w2, zeros[1]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 64, 28, 28), (3, 5, 6, 11), (4, 1, 3, 2)], ids=str)
def test_spatial_gate_is_published(shape):
    assert_published(reference.SpatialGate(), official.SpatialGate(), shape)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_spatial_gate_kernel_sizes(kernel):
    x, w = torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.randn(1, 2, kernel, kernel, dtype=torch.float64)
    z = F.conv2d(torch.stack((x.amax(1), x.mean(1)), 1), w, padding=kernel // 2)
    y = reference.spatial_gate(x, w, lambda z: 2 * z - 1)
    torch.testing.assert_close(y, x * official.sigmoid(2 * z - 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("no_spatial", [False, True])
@pytest.mark.parametrize("pools", [("avg", "max"), ("lse",), POOLS], ids="+".join)
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (2, 512, 7, 7), (3, 32, 5, 12)], ids=str)
def test_cbam_is_published(shape, pools, no_spatial):
    assert_published(
        reference.CBAM(shape[1], 16, pools, no_spatial), official.CBAM(shape[1], 16, pools, no_spatial), shape
    )


@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (2, 256, 14, 14), (3, 32, 7, 7)], ids=str)
def test_bam_is_published(shape):
    assert_published(reference.BAM(shape[1]), official.BAM(shape[1]), shape)


def test_bam_options_are_published():
    ours = reference.BAM(24, reduction_ratio=4, dilation_conv_num=3, dilation_val=2)
    assert_published(ours, official.BAM(24, reduction=4, dilations=3, dilation=2), (3, 24, 11, 11))


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (1, 6)], ids=str)
def test_bam_pools_the_whole_of_a_non_square_map(size):
    theirs = randomize(official.BAM(32).double().eval())
    ours = reference.BAM(32).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    expected = theirs.from_average(x, x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("e_lambda", [1e-4, 0.1])
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (2, 512, 7, 7), (3, 5, 2, 9), (2, 3, 1, 2)], ids=str)
def test_simam_is_published(shape, e_lambda):
    assert_published(reference.SimAM(shape[1], e_lambda), official.SimAM(e_lambda), shape)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_simam_on_a_single_pixel(dtype):
    x = torch.randn(3, 5, 1, 1).to(dtype).requires_grad_()
    y = reference.simam(x)
    y.sum().backward()
    gate = torch.tensor(0.5, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(y.double(), x.double() * gate, rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(x.grad.double(), gate.expand_as(x), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_simam_does_not_overflow(dtype):
    x = (torch.randn(2, 4, 56, 56) * 4000 + 30000).clamp(max=60000).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, y64 = reference.simam(x), reference.simam(x64)
    y.sum().backward()
    y64.sum().backward()
    torch.testing.assert_close(y.double(), y64, rtol=torch.finfo(dtype).eps, atol=0)
    assert_scaled(x.grad.double(), x64.grad, 2 * torch.finfo(dtype).eps)


@every_module
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogue(name, with_residual, activation):
    module, x = MODULES[name]().double().eval(), torch.randn(2, 32, 6, 5, dtype=torch.float64)
    residual = torch.randn_like(x) if with_residual else None
    expected = module(x)
    if with_residual:
        expected = expected + residual
    if activation == "relu":
        expected = expected.clamp(min=0)
    torch.testing.assert_close(module(x, residual, activation), expected, rtol=0, atol=0)


# Sizes at which a numerical Jacobian with respect to every input and every parameter is quick.
TINY: dict[str, Callable[[], nn.Module]] = {
    **{
        f"se-{activation}-{gate}": lambda a=activation, g=gate: reference.SE(4, 2, mlp_activation=a, gate=g)
        for activation, gate in itertools.product(official.ACTIVATIONS, official.GATES)
    },
    **{f"channel_gate-{pool}": lambda p=pool: reference.ChannelGate(4, 2, (p,)) for pool in POOLS},
    "spatial_gate": lambda: reference.SpatialGate(),
    "cbam": lambda: reference.CBAM(4, 2, POOLS),
    "bam": lambda: reference.BAM(4, 2, dilation_conv_num=1, dilation_val=1),
    "simam": lambda: reference.SimAM(),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(name, training):
    module = randomize(TINY[name]().double().train(training))
    parameters = dict(module.named_parameters())
    x, residual = (torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x: Tensor, residual: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(parameters, values, strict=True)), (x, residual, "relu"))

    leaves = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(function, (x, residual, *leaves))


def pool_gradient(pool: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a channel gate: what reaches ``x`` through the pool alone, and what reaches the (N, C) pooled values."""
    channels = x.shape[1]
    fc1, fc2 = (torch.rand(channels, channels, dtype=x.dtype) + 0.1 for _ in range(2))  # positive: every ReLU passes
    x = x.clone().requires_grad_()
    y = reference.channel_gate(x, fc1, None, fc2, None, pool_types=(pool,))
    pooled = official.POOLS[pool](x.detach()).flatten(1).requires_grad_()
    scale = torch.sigmoid(F.linear(F.linear(pooled, fc1).relu(), fc2))[:, :, None, None]
    weight = torch.rand_like(y) + 0.1
    (through_pool,) = torch.autograd.grad((x.detach() * scale * weight).sum(), pooled)
    (total,) = torch.autograd.grad((y * weight).sum(), x)
    return total - weight * scale.detach(), through_pool


def with_ties(layout: torch.memory_format) -> Tensor:
    """(2, 3, 4, 5) after a ReLU: plane 0 is all zeros, plane 1 has two maxima, at (1, 3) and (2, 0), plane 2 one."""
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    x[:, 0] = 0
    x[:, 1, 1, 3] = x[:, 1, 2, 0] = 1.5
    return x.to(memory_format=layout)


@every_layout
def test_max_pool_gradient_goes_to_the_first_maximum(layout):
    x = with_ties(layout)
    through_x, through_pool = pool_gradient("max", x)
    expected = torch.zeros_like(x)
    expected[:, 0, 0, 0], expected[:, 1, 1, 3] = through_pool[:, 0], through_pool[:, 1]
    expected[:, 2].flatten(1).scatter_(1, x[:, 2].flatten(1).argmax(1, keepdim=True), through_pool[:, 2:])
    assert (through_pool > 1e-4).all()
    torch.testing.assert_close(through_x, expected, rtol=1e-9, atol=1e-12)


@every_layout
def test_lp_pool_gradient_is_zero_on_a_zero_plane(layout):
    x = with_ties(layout)
    through_x, through_pool = pool_gradient("lp", x)
    expected = x * (through_pool / official.POOLS["lp"](x).flatten(1).clamp(min=1e-30))[:, :, None, None]
    assert (through_pool > 1e-4).all()
    torch.testing.assert_close(through_x, expected, rtol=1e-9, atol=1e-12)
    assert not through_x[:, 0].any()


@every_layout
def test_channel_max_gradient_goes_to_the_lowest_channel(layout):
    x = torch.rand(1, 4, 3, 3, dtype=torch.float64)
    x[:, :, 0] = 0  # every channel ties
    x[:, 1, 1] = x[:, 3, 1] = 1.5
    first = x.argmax(1)
    first[:, 0], first[:, 1] = 0, 1
    conv_weight = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    conv_weight[:, 0] = 1  # the maximum alone
    leaf = x.to(memory_format=layout).requires_grad_()
    (through_x,) = torch.autograd.grad(reference.spatial_gate(leaf, conv_weight, nn.Identity()).sum(), leaf)
    scale = x.amax(1, keepdim=True).sigmoid()
    through_max = x.sum(1, keepdim=True) * scale * (1 - scale) + torch.zeros_like(x)
    expected = scale + through_max * F.one_hot(first, 4).movedim(3, 1)
    torch.testing.assert_close(through_x, expected, rtol=1e-12, atol=1e-12)


def test_gradient_at_zero_is_finite():
    x = torch.zeros(2, 32, 6, 5, dtype=torch.float64, requires_grad=True)
    y = randomize(reference.CBAM(32, pool_types=POOLS).double().eval())(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.any()


def poisoned(value: float) -> Tensor:
    x = torch.rand(2, 32, 16, 15, dtype=torch.float64) + 0.1
    x[0, 5, 2, 3] = value
    return x


@pytest.mark.parametrize("pool", POOLS)
def test_nan_reaches_what_it_should_through_the_channel_gate(pool):
    y = reference.ChannelGate(32, pool_types=(pool,)).double()(poisoned(torch.nan))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("name", ["se", "bam", "cbam"])
def test_nan_reaches_its_sample(name):
    y = MODULES[name]().double().eval()(poisoned(torch.nan))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_nan_reaches_the_window_of_the_spatial_gate():
    x = poisoned(torch.nan)
    nan = torch.zeros_like(x, dtype=torch.bool)
    nan[0, :, :6, :7] = True  # 3 pixels around (2, 3)
    assert torch.equal(reference.SpatialGate().double().eval()(x).isnan(), nan)
    assert reference.SpatialGate().double().train()(x).isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_simam_poison_stays_in_its_plane(value):
    y = reference.simam(poisoned(value))
    nan = torch.zeros_like(y, dtype=torch.bool)
    nan[0, 5] = True
    assert torch.equal(y.isnan(), nan)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["se", "spatial_gate", "cbam", "bam"])
def test_infinity_propagates_as_published(name, value):
    theirs = {
        "se": lambda: official.SE(32, 2),
        "spatial_gate": lambda: official.SpatialGate(),
        "cbam": lambda: official.CBAM(32, pool_types=("avg", "max", "lp")),
        "bam": lambda: official.BAM(32),
    }[name]()
    ours = MODULES[name]() if name != "cbam" else reference.CBAM(32, pool_types=("avg", "max", "lp"))
    theirs.double().eval().load_state_dict(ours.double().eval().state_dict())
    x = poisoned(value)[:, :, :15]
    expected = theirs(x)
    assert not expected.isfinite().all()
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@every_module
@every_layout
@pytest.mark.parametrize("residual_layout", [None, *LAYOUTS.values()], ids=["none", *LAYOUTS])
def test_layout_is_kept(name, layout, residual_layout):
    x = torch.randn(2, 32, 5, 7)
    module = MODULES[name]().eval()
    residual = None if residual_layout is None else torch.randn_like(x).to(memory_format=residual_layout)
    y = module(x.to(memory_format=layout), residual, "relu")
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, module(x, residual, "relu"), rtol=1e-5, atol=1e-6)


@every_module
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [*HALF, torch.float32, torch.float64, "autocast"], ids=str)
def test_dtype_is_kept(name, dtype, parameters):
    autocast = parameters == "autocast"
    parameters = torch.float32 if autocast else parameters
    module = MODULES[name]().to(parameters)
    x = torch.randn(2, 32, 5, 7).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x, torch.randn(2, 32, 5, 7), "relu")
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert {p.grad.dtype for p in module.parameters()} <= {parameters}


@pytest.mark.parametrize("name", ["se", "channel_gate", "spatial_gate", "cbam"])
def test_autocast_leaves_the_gate_alone(name):
    module, x = MODULES[name]().eval(), torch.randn(2, 32, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    torch.testing.assert_close(y, module(x), rtol=0, atol=0)


def assert_rounded_once(y: Tensor, expected: Tensor) -> None:
    """The same half-precision numbers, but for a few on the other side of a midpoint."""
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(y.dtype).eps, atol=0)
    assert (y != expected).float().mean() < 0.1


@pytest.mark.parametrize("pool", ["se", *POOLS])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_pools(pool, dtype):
    """Pools and MLP are float32: a pool rounded to half precision would move most of these gates."""
    x = (torch.rand(2, 32, 28, 28) + 1).to(dtype)
    pooled = official.POOLS["avg" if pool == "se" else pool](x.double()).flatten(1)
    std, mean = torch.std_mean(pooled)
    parameters = torch.eye(32) / std.float(), None, torch.eye(32), (-mean / std).float().expand(32)
    gate = official.sigmoid((pooled - mean) / std).to(dtype)[:, :, None, None]
    if pool == "se":
        y = reference.se(x, *parameters)
    else:
        y = reference.channel_gate(x, *parameters, pool_types=(pool,))
    assert_rounded_once(y, x * gate)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_channel_mean(dtype):
    x = (torch.rand(2, 32, 28, 28) + 1).to(dtype)
    pooled = x.double().mean(1, keepdim=True)
    std, mean = torch.std_mean(pooled)
    conv_weight = torch.tensor([0, 1 / std.item()]).view(1, 2, 1, 1)
    gate = official.sigmoid((pooled - mean) / std).to(dtype)
    assert_rounded_once(reference.spatial_gate(x, conv_weight, lambda z: z - (mean / std).float()), x * gate)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_energy(dtype):
    x = (torch.rand(2, 32, 28, 28) + 1).to(dtype)
    assert_rounded_once(reference.simam(x), reference.simam(x.double()).to(dtype))


@pytest.mark.parametrize("name", ["se", "channel_gate", "spatial_gate", "cbam", "bam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_another_dtype(name, dtype):
    """The parameters' values count, not their dtype."""
    module = randomize(MODULES[name]()).eval().to(dtype)
    x = torch.randn(2, 32, 7, 7)
    expected = copy.deepcopy(module).double()(x.double())
    # In BAM, and in the spatial gate's BatchNorm, bfloat16 parameters compute in bfloat16.
    rounds = dtype == torch.bfloat16 and name in ("spatial_gate", "cbam", "bam")
    rtol = 4 * torch.finfo(torch.bfloat16).eps if rounds else 1e-5
    torch.testing.assert_close(module(x).double(), expected, rtol=rtol, atol=1e-6)


@every_module
@every_layout
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_of_zero(name, layout, training):
    module = MODULES[name]().train(training)
    x = torch.randn(0, 32, 5, 7).to(memory_format=layout).requires_grad_()
    y = module(x, x.detach(), "relu")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert all(not p.grad.any() for p in module.parameters())
    assert all(b.isfinite().all() for b in module.buffers())


@every_module
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_every_parameter_gets_a_gradient(name, training, dtype):
    module = MODULES[name]().train(training).to(dtype)
    x = torch.randn(4, 32, 6, 5).to(dtype).requires_grad_()
    (module(x) * torch.randn_like(x)).sum().backward()
    for key, leaf in (("x", x), *module.named_parameters()):
        assert leaf.grad is not None, key
        assert leaf.grad.isfinite().all(), key
        assert leaf.grad.shape == leaf.shape, key
    assert x.grad.any()


BATCHNORMS = {
    "default": {},
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "eps": {"eps": 0.5},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("options", BATCHNORMS.values(), ids=BATCHNORMS)
def test_batchnorm_state(options):
    """Two training steps, then eval, against the definition written out on the convolution's output."""
    norm = nn.BatchNorm2d(1, dtype=torch.float64, **options)
    gamma, beta = 1.0, 0.0
    if norm.affine:
        gamma, beta = 1.5, -0.25
        nn.init.constant_(norm.weight, gamma)
        nn.init.constant_(norm.bias, beta)
    conv_weight = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    running_mean, running_var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for step in (1, 2, 3):
        training = step < 3
        x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
        z = F.conv2d(torch.stack((x.amax(1), x.mean(1)), 1), conv_weight, padding=1)
        mean, var = z.mean(), z.var(correction=0)
        if training:
            rate = 1 / step if norm.momentum is None else norm.momentum
            running_mean = (1 - rate) * running_mean + rate * mean
            running_var = (1 - rate) * running_var + rate * z.var(correction=1)
        elif norm.track_running_stats:
            mean, var = running_mean, running_var
        expected = x * official.sigmoid(gamma * (z - mean) / (var + norm.eps).sqrt() + beta)
        y = reference.spatial_gate(x, conv_weight, norm.train(training))
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    if norm.track_running_stats:
        assert norm.num_batches_tracked == 2
        torch.testing.assert_close(norm.running_mean, running_mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, running_var, rtol=1e-10, atol=1e-12)
    else:
        assert not list(norm.buffers())


@pytest.mark.parametrize("name", ["cbam", "bam"])
def test_eval_mode_leaves_the_statistics_alone(name):
    module = randomize(MODULES[name]().eval())
    before = {key: b.clone() for key, b in module.named_buffers()}
    module(torch.randn(2, 32, 6, 5))
    module(torch.randn(1, 32, 1, 1))  # one value per channel is enough in eval mode
    assert all(torch.equal(b, before[key]) for key, b in module.named_buffers())
