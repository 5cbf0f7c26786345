"""What a user relies on beyond accuracy: ties, NaN, layouts, gradients asked for in any way, memory, determinism."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_kernels
from benchmarks.shapes import RESNET_50
from benchmarks.speed import saved_bytes
from reference.catalogue import LAYOUTS
from reference.simam import simam as formula
from tests.harness import MODULES, pair, real_input, run


@pytest.fixture(params=MODULES)
def modules(request, device):
    """The fused module and the reference's in float64, for 12 channels."""
    fused, eager = pair(lambda kit: MODULES[request.param](kit, 12), device)
    return fused.double(), eager.double()


def _x(device, layout="contiguous", shape=(3, 12, 5, 7)):
    return real_input(shape, torch.float64, layout, device)


def _same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_give_the_references_gradient_element_for_element(modules, layout, device):
    fused, eager = modules
    x = _x(device, layout)
    x[0] = 0  # a dead sample: every pool ties everywhere
    x[1, :, 2] = 0  # a dead row: the channel maximum ties
    x[2, 3] = 1.5  # a constant plane
    x = x.round()  # and ties between equal numbers everywhere else
    dy = torch.randn_like(x)
    got, want = run(fused, x, None, "relu", dy), run(eager, x, None, "relu", dy)
    _same(got.y, want.y)
    for name in want.gradients:
        _same(got.gradients[name], want.gradients[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_land_where_the_references_do(modules, layout, value, device):
    fused, eager = (m.eval() for m in modules)
    x = _x(device, layout)
    x[1, 3, 2, 4] = value
    x[1, 3, 4, 4] = value
    dy = torch.randn_like(x)
    got, want = run(fused, x, None, None, dy), run(eager, x, None, None, dy)
    torch.testing.assert_close(got.y, want.y, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert want.y.isfinite()[0].all()
    torch.testing.assert_close(
        got.gradients["x"].isnan(), want.gradients["x"].isnan(), msg="NaN in dx where the reference has none"
    )


def test_relu_keeps_nan_and_its_gradient(device):
    x = torch.tensor([[[[float("nan"), -1.0, 0.0, 2.0]]]], dtype=torch.float64, device=device)
    fused, eager = attn_kernels.SimAM(), attn_kernels.SimAM.__mro__[1]()
    residual = torch.tensor([[[[0.0, -1.0, float("nan"), -9.0]]]], dtype=torch.float64, device=device)
    got, want = (run(m, x, residual, "relu", torch.ones_like(x)) for m in (fused, eager))
    torch.testing.assert_close(got.y, want.y, equal_nan=True)
    torch.testing.assert_close(got.gradients["residual"], want.gradients["residual"])


@pytest.mark.device
def test_fp16_variance_does_not_overflow(device):
    x = (200 * torch.randn(1, 2, 56, 56, device=device)).half()
    y = attn_kernels.SimAM()(x)
    expected = attn_kernels.SimAM()(x.double())
    torch.testing.assert_close(y, expected.half(), rtol=2e-3, atol=0)


def test_variance_of_a_far_mean_is_exact(device):
    x = 1000 + torch.randn(1, 3, 31, 33, device=device)  # E[x^2] - E[x]^2 would leave one digit
    torch.testing.assert_close(attn_kernels.SimAM()(x).double(), attn_kernels.SimAM()(x.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [4, 40])  # a plane that a program holds, and in channels_last one that it walks
@pytest.mark.parametrize(("scale", "e_lambda"), [(1e-11, 0.0), (1e11, 1e-4)])
def test_simam_of_tiny_and_huge_deviations(size, scale, e_lambda, device):
    """1 / variance^2 would be no float32."""
    x = (torch.randn(1, 8, size, size, device=device) * scale).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(attn_kernels.SimAM(e_lambda=e_lambda)(x), x, dy)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formula(wide, e_lambda), wide, dy.double())
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [4, 40])
def test_simam_of_a_mean_whose_square_is_infinite(size, device):
    """A power of 2, whose sums are exact, so that no deviation is left."""
    x = torch.full((1, 8, size, size), 2.0**66, device=device).to(memory_format=torch.channels_last)
    torch.testing.assert_close(attn_kernels.SimAM()(x), x * torch.sigmoid(torch.tensor(0.5, device=device)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_any_strides(modules, layout, device):
    fused, eager = modules
    x = _x(device, layout)
    wide = torch.randn(3, 24, 5, 7, dtype=torch.float64, device=device)
    for dy in (
        torch.ones((), dtype=torch.float64, device=device).expand(x.shape),  # y.sum().backward()
        wide[:, ::2],
        wide[:, :12].contiguous(memory_format=torch.channels_last),
        torch.randn(3, 12, 7, 5, dtype=torch.float64, device=device).transpose(2, 3),
    ):
        before = dy.clone()
        got, want = run(fused, x, None, "relu", dy), run(eager, x, None, "relu", dy)
        _same(got.gradients["x"], want.gradients["x"])
        assert torch.equal(dy, before)


def test_input_of_any_strides(modules, device):
    fused, eager = (m.eval() for m in modules)
    wide = torch.randn(3, 24, 10, 7, dtype=torch.float64, device=device)
    for x in (
        wide[:, ::2, ::2],
        wide[:, :12].transpose(2, 3),
        wide[:, :12].contiguous(memory_format=torch.channels_last)[:, :, 1:6],
        wide[:1, :12, :5].expand(3, -1, -1, -1),
    ):
        residual = torch.randn_like(x).contiguous(memory_format=torch.channels_last)
        _same(fused(x, residual, "relu"), eager(x, residual, "relu"))


def test_nothing_is_modified(modules, device):
    fused, _ = modules
    x, residual = _x(device), _x(device)
    dy = torch.randn_like(x)
    before = [t.clone() for t in (x, residual, dy)]
    run(fused, x, residual, "relu", dy)
    assert all(torch.equal(t, b) for t, b in zip((x, residual, dy), before, strict=True))


def test_residual_of_another_dtype(modules, device):
    fused, eager = (m.eval() for m in modules)
    x = _x(device)
    residual = torch.randn_like(x).float().requires_grad_()
    y = fused(x, residual)
    _same(y, eager(x, residual))
    assert torch.autograd.grad(y.sum(), residual)[0].dtype == torch.float32


@pytest.mark.device
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_wider_residual_is_added_before_anything_is_rounded(modules, wide, device):
    """Rounded to x's dtype it would be infinite, and so would the sum."""
    fused, eager = (m.eval().float() for m in modules)
    x = torch.full((2, 12, 5, 7), -60.0, dtype=torch.float16, device=device)
    residual = torch.full(x.shape, 65522.0, dtype=wide, device=device).requires_grad_()
    assert residual.half().isinf().all()
    y, expected = fused(x, residual, "relu"), eager(x, residual, "relu")
    assert expected.isfinite().any()
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=0)
    (dresidual,) = torch.autograd.grad(y.sum(), residual)
    assert dresidual.dtype == wide
    assert (dresidual == 1).all()


@pytest.mark.fast
def test_only_what_is_asked_for_is_differentiated(modules, device):
    fused, eager = modules
    x, dy = _x(device), torch.randn_like(_x(device))
    expected = run(eager, x, None, "relu", dy).gradients
    # x alone
    frozen = copy.deepcopy(fused).requires_grad_(False)
    leaf = x.clone().requires_grad_()
    frozen(leaf, None, "relu").backward(dy)
    _same(leaf.grad, expected["x"])
    # the parameters alone
    if parameters := dict(fused.named_parameters()):
        fused(x, None, "relu").backward(dy)
        for name, p in parameters.items():
            _same(p.grad, expected[name])
    # the residual alone
    leaf = torch.randn_like(x).requires_grad_()
    y = frozen(x, leaf, "relu")
    y.backward(dy)
    _same(leaf.grad, dy * (y > 0))
    # nothing
    eager.load_state_dict(frozen.state_dict())
    with torch.no_grad():
        _same(frozen.eval()(leaf, None, "relu"), eager.eval()(leaf, None, "relu"))
    with torch.inference_mode():
        _same(frozen(x), eager(x))


def saved_share(module, x, residual=None, activation=None) -> float:
    """What autograd keeps beside x and the parameters, in units of x."""
    return saved_bytes(lambda: module(x, residual, activation), [x, *module.parameters()]) / x.nbytes


def test_saves_x_and_little_else(device):
    x = torch.randn(2, 256, 14, 14, device=device).requires_grad_()
    for name in ("SE", "CBAM", "BAM", "SimAM"):
        share = saved_share(getattr(attn_kernels, name)(256).to(device), x, torch.randn_like(x), "relu")
        # One bit per element is 1/32 of fp32; BAM's branches keep five maps of a sixteenth of the channels.
        assert share < 1 / 32 + (0.34 if name == "BAM" else 0.01), f"{name} saves {share:.1%} of x"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", RESNET_50)
@pytest.mark.parametrize("name", ["SE", "CBAM", "SimAM"])
def test_saves_x_and_two_percent_in_half_precision(name, stage, layout, device):
    channels, side, _ = stage
    with FakeTensorMode(), device:
        x = torch.empty(32, channels, side, side, dtype=torch.bfloat16)
        module = getattr(attn_kernels, name)(channels)
        share = saved_share(module, x.to(memory_format=LAYOUTS[layout]).requires_grad_())
    assert share < 0.02, f"{name} saves {share:.1%} of x"


@pytest.mark.device
def test_bitwise_reproducible(modules, device):
    fused, _ = modules
    x, dy = _x(device, shape=(3, 12, 19, 23)), torch.randn(3, 12, 19, 23, dtype=torch.float64, device=device)
    x, dy, fused = x.float(), dy.float(), fused.float()
    first = run(copy.deepcopy(fused), x, x, "relu", dy)
    for _ in range(50 if device.type == "cuda" else 2):
        again = run(copy.deepcopy(fused), x, x, "relu", dy)
        assert torch.equal(first.y, again.y)
        assert all(torch.equal(first.gradients[k], again.gradients[k]) for k in first.gradients)
        assert all(torch.equal(first.buffers[k], again.buffers[k]) for k in first.buffers)


def test_batch_of_zero(modules, device):
    fused = modules[0].eval()
    x = torch.zeros(0, 12, 5, 7, dtype=torch.float64, device=device).requires_grad_()
    y = fused(x, x, "relu")
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in fused.parameters())


def test_batch_statistics_are_counted_once(device):
    fused, eager = pair(lambda kit: kit.CBAM(12, 4), device)
    for module in (fused, eager):
        module.SpatialGate.spatial.bn.momentum = None  # the cumulative average
    for step in range(3):
        x = real_input((3, 12, 5, 7), torch.float32, "contiguous", device)
        version = fused.SpatialGate.spatial.bn.running_mean._version
        fused(x).sum().backward()
        eager(x)
        assert fused.SpatialGate.spatial.bn.num_batches_tracked.item() == step + 1
        assert fused.SpatialGate.spatial.bn.running_mean._version > version
        for got, want in zip(fused.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(got, want)


def test_double_backward_of_the_residual_alone(modules, device):
    fused = modules[0].requires_grad_(False)
    x, residual = _x(device), torch.randn_like(_x(device)).requires_grad_()
    y = fused(x, residual, "relu")
    (gradient,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), residual)
    _same(second, 2 * (y > 0).double())


def test_parameters_of_any_strides(device):
    fused, eager = pair(lambda kit: kit.SE(12, 4), device)
    x = _x(device).float()
    for module in (fused, eager):
        for name in ("weight", "bias"):
            p = getattr(module.fc1, name)
            setattr(module.fc1, name, nn.Parameter(torch.stack((p, p.neg()), dim=-1).detach()[..., 0]))
        module.fc2.bias = nn.Parameter(module.fc2.bias.detach()[:1].expand(12))
    torch.testing.assert_close(fused(x), eager(x))
    fused, eager = (m.eval() for m in pair(lambda kit: kit.BAM(12, 4), device))
    conv = [m.spatial_att.gate_s.gate_s_conv_reduce0 for m in (fused, eager)]
    for c in conv:
        c.weight = nn.Parameter(c.weight.detach().flatten(1).t().contiguous().t()[:, :, None, None])
    got, want = (run(m, x, None, None, torch.ones_like(x)) for m in (fused, eager))
    torch.testing.assert_close(got.gradients, want.gradients)


def test_channels_last_network_weights(device):
    fused, eager = pair(lambda kit: kit.CBAM(12, 4), device)
    fused = fused.to(memory_format=torch.channels_last)
    assert not fused.SpatialGate.spatial.conv.weight.is_contiguous()
    x, dy = _x(device).float(), torch.randn(3, 12, 5, 7, device=device)
    got, want = (run(m, x, None, "relu", dy) for m in (fused, eager))
    torch.testing.assert_close(got.y, want.y)
    torch.testing.assert_close(got.gradients, want.gradients, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_norm_run(device):
    module, calls = attn_kernels.CBAM(12).to(device), []
    module.SpatialGate.spatial.bn.register_forward_hook(lambda *_: calls.append(1))
    module(_x(device).float())
    assert calls


def test_sync_batch_norm_falls_back(device):
    fused, eager = pair(lambda kit: kit.CBAM(12, 4), device)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused).eval()
    assert isinstance(fused.SpatialGate.spatial.bn, nn.SyncBatchNorm)
    x = real_input((3, 12, 5, 7), torch.float32, "contiguous", device)
    torch.testing.assert_close(fused(x), eager.eval()(x))
