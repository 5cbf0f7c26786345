"""BatchNorm + ReLU of BAM's branch, and the convolution behind them, against PyTorch's layers."""

import copy
import math
import re

import pytest
import torch
from torch import library, nn
from torch.autograd import gradcheck, gradgradcheck

import attn_kernels
import reference
from attn_kernels.ops.bam.norm import (
    backward_op,
    batch_norm_relu,
    can_add,
    forward_op,
    is_fusable,
)
from attn_kernels.ops.bam.norm.forward import norm_tile
from attn_kernels.ops.common import device as gpu
from attn_kernels.ops.common import tiling
from reference.bam import spatial_layer
from reference.catalogue import DTYPES, LAYOUTS
from tests.fuse.cases import timm
from tests.harness import assert_close, pair, run

SHAPES = {"odd": (3, 5, 7, 9), "one pixel": (4, 3, 1, 1), "one channel": (2, 1, 6, 5), "wide": (2, 70, 3, 11)}
NORMS = {
    "plain": {},
    "momentum, eps": {"momentum": 0.3, "eps": 1e-3},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no buffers": {"track_running_stats": False},
}


@pytest.fixture(params=[1, 5], ids=["one multiprocessor", "five"])
def programs(request, monkeypatch):
    """Few programs, or more than one that walks along several tiles and merges what many leave."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda x: request.param)
    monkeypatch.setattr(tiling, "TILE", 128)
    norm_tile.cache_clear()
    yield
    norm_tile.cache_clear()


def _norm(channels, device, **options):
    norm = nn.BatchNorm2d(channels, **options)
    for p in norm.parameters():
        nn.init.normal_(p)
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm.to(device)


def _eager(c, norm, conv):
    for layer in (norm, nn.ReLU(), *([] if conv is None else [conv])):
        c = spatial_layer(c, layer)
    return c


def _results(function, c, norm, conv, dr, steps=2):
    """Output, gradients and buffers after some steps."""
    c = c.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    for _ in range(steps):
        r = function(c, norm, conv)
    parameters = [*norm.parameters(), *([] if conv is None else conv.parameters())]
    return [r, *torch.autograd.grad(r, [c, *parameters], dr.to(r.dtype)), *norm.buffers()]


def _map(shape, dtype, layout, device):
    c = torch.randn(shape, dtype=torch.float64) * 2 + 0.5
    return c.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])


def _dr(c, with_conv):
    return torch.randn((c.shape[0], 1, *c.shape[2:]) if with_conv else c.shape, dtype=torch.float64, device=c.device)


@pytest.mark.parametrize("with_conv", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_pytorchs_in_float64(shape, layout, training, with_conv, programs, device):
    c = _map(SHAPES[shape], torch.float64, layout, device)
    norm = _norm(c.shape[1], device).double().train(training)
    conv = nn.Conv2d(c.shape[1], 1, 1).to(c) if with_conv else None
    dr = _dr(c, with_conv)
    got, want = (_results(f, c, copy.deepcopy(norm), conv, dr) for f in (batch_norm_relu, _eager))
    assert with_conv or got[0].stride() == want[0].stride()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("with_conv", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", NORMS)
def test_options(options, training, with_conv, programs, device):
    c = _map((3, 6, 5, 7), torch.float32, "channels_last", device)
    norm = _norm(6, device, **NORMS[options]).train(training)
    conv = nn.Conv2d(6, 1, 1, bias=options != "no bias").to(device) if with_conv else None
    dr = _dr(c, with_conv)
    got, want = (_results(f, c, copy.deepcopy(norm), conv, dr, steps=3) for f in (batch_norm_relu, _eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.fast
@pytest.mark.device
@pytest.mark.parametrize("with_conv", [False, True])
@pytest.mark.parametrize("parameter_dtype", ["fp32", "same"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_accuracy_rule(dtype, parameter_dtype, with_conv, device):
    c = _map((6, 9, 8, 6), DTYPES[dtype], "contiguous", device)
    kind = torch.float32 if parameter_dtype == "fp32" else c.dtype
    norm, conv = _norm(9, device).to(kind), nn.Conv2d(9, 1, 1).to(device, kind) if with_conv else None
    oracle, oracle_conv = copy.deepcopy(norm).double(), None if conv is None else copy.deepcopy(conv).double()
    dr = _dr(c, with_conv).to(c.dtype)
    got, want = (_results(f, c, copy.deepcopy(norm), conv, dr, 1) for f in (batch_norm_relu, _eager))
    exact = _results(_eager, c.double(), oracle, oracle_conv, dr.double(), 1)
    assert got[0].dtype == c.dtype
    names = ["r", "dc", "dweight", "dbias", "dconv.weight", "dconv.bias"][: 6 if with_conv else 4]
    for name, *results in zip(names, got, want, exact, strict=False):
        assert_close(name, *results)


def test_statistics_of_a_far_mean_are_exact(programs, device):
    c = 1000 + torch.randn(3, 4, 19, 21, device=device)  # E[c^2] - E[c]^2 would leave one digit
    norm = _norm(4, device, affine=False)
    norms = norm, copy.deepcopy(norm)
    got, want = batch_norm_relu(c, norms[0]), _eager(c.double(), norms[1].double(), None)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norms[0].running_var.double(), norms[1].running_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("with_conv", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity_land_where_pytorchs_do(training, value, with_conv, device):
    c = _map((2, 5, 4, 3), torch.float64, "contiguous", device)
    c[1, 2, 3, 1] = value
    norm = _norm(5, device).double().train(training)
    norm.weight.data.abs_()
    conv = nn.Conv2d(5, 1, 1).to(c) if with_conv else None
    dr = _dr(c, with_conv)
    got, want = (_results(f, c, copy.deepcopy(norm), conv, dr, 1) for f in (batch_norm_relu, _eager))
    assert not want[0].isfinite().all() or value == -math.inf
    for ours, theirs in zip((got[0], got[1], *got[-3:-1]), (want[0], want[1], *want[-3:-1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, equal_nan=True)


def test_a_dead_channel_passes_no_gradient(device):
    c = _map((2, 3, 4, 4), torch.float64, "contiguous", device).requires_grad_()
    norm = nn.BatchNorm2d(3).double().to(device)
    nn.init.zeros_(norm.bias)
    norm.weight.data.zero_()  # relu'(0) is 0
    gradients = torch.autograd.grad(batch_norm_relu(c, norm).sum(), [c, norm.weight, norm.bias])
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("with_conv", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, training, with_conv, device):
    c = _map((3, 2, 1, 3), torch.float64, layout, device).requires_grad_()
    norm, conv = _norm(2, device).double().train(training), nn.Conv2d(2, 1, 1).to(c)
    parameters = [*norm.parameters(), *(conv.parameters() if with_conv else ())]

    def function(c, *_):
        return batch_norm_relu(c, norm, conv if with_conv else None)

    norm.momentum = 0.0  # the numerical derivative calls again and again
    whole = layout == "channels_last" and training and with_conv  # elsewhere random projections of the Jacobian
    assert gradcheck(function, [c, *parameters], fast_mode=not whole)
    assert gradgradcheck(function, [c, *parameters], fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_double_backward_is_pytorchs(training, device):
    c = _map((3, 4, 5, 3), torch.float64, "channels_last", device).requires_grad_()
    norm, conv = _norm(4, device).double().train(training), nn.Conv2d(4, 1, 1).to(c)
    seconds = []
    for function in (batch_norm_relu, _eager):
        parameters = [c, *norm.parameters(), *conv.parameters()]
        first = torch.autograd.grad(function(c, norm, conv).square().sum(), parameters, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_reproducible(layout, programs, device):
    c = _map((4, 6, 9, 7), torch.float32, layout, device)
    norm, conv, dr = _norm(6, device), nn.Conv2d(6, 1, 1).to(device), _dr(c, True)
    first = _results(batch_norm_relu, c, copy.deepcopy(norm), conv, dr)
    for _ in range(50 if device.type == "cuda" else 2):
        again = _results(batch_norm_relu, c, copy.deepcopy(norm), conv, dr)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradient_of_any_strides_is_left_as_it_is(device):
    c = _map((3, 4, 5, 7), torch.float64, "channels_last", device)
    norm, wide = _norm(4, device).double(), torch.randn(3, 8, 5, 7, dtype=torch.float64, device=device)
    for dr in (wide[:, ::2], wide[:, :4].contiguous(), torch.ones((), dtype=c.dtype, device=device).expand(c.shape)):
        before = dr.clone()
        got, want = (_results(f, c, copy.deepcopy(norm), None, dr) for f in (batch_norm_relu, _eager))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
        assert torch.equal(dr, before)


def test_buffers_are_counted_once_and_their_versions_too(device):
    norm, c = _norm(4, device), _map((2, 4, 3, 3), torch.float32, "contiguous", device)
    versions = [b._version for b in norm.buffers()]
    batch_norm_relu(c, norm)
    assert norm.num_batches_tracked.item() == 1
    assert all(b._version > v for b, v in zip(norm.buffers(), versions, strict=True))
    before = [b.clone() for b in norm.eval().buffers()]
    batch_norm_relu(c, norm)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))


def _column(t):
    """The values of ``t`` in memory that it shares with its neighbours; the matrix itself."""
    matrix = torch.stack([t, torch.full_like(t, 9)], -1)
    return matrix[:, 0], matrix


@pytest.mark.fast
@pytest.mark.parametrize("with_conv", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_states_of_any_stride(training, with_conv, device):
    """Buffers and parameters that are columns of matrices: neighbours in memory are neither read nor written."""
    c = _map((3, 5, 4, 6), torch.float64, "channels_last", device)
    norm = _norm(5, device).double().train(training)
    conv = nn.Conv2d(5, 1, 1).to(c) if with_conv else None
    strided, matrices = copy.deepcopy(norm), []
    for states in (strided._buffers, strided._parameters):
        for name in ("running_mean", "running_var", "weight", "bias"):
            if name in states:
                column, matrix = _column(states[name].detach())
                states[name] = column if states is strided._buffers else nn.Parameter(column)
                matrices.append(matrix)
    assert not strided.running_mean.is_contiguous()
    assert not strided.weight.is_contiguous()
    dr = _dr(c, with_conv)
    got, want = (_results(batch_norm_relu, c, n, conv, dr) for n in (strided, norm))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all((matrix[:, 1] == 9).all() for matrix in matrices)
    versions = [b._version for b in strided.buffers()]
    batch_norm_relu(c, strided.train())
    assert all(b._version > v for b, v in zip(strided.buffers(), versions, strict=True))


def _with_state(name, state, channels=4):
    norm = nn.BatchNorm2d(channels)
    (norm._buffers if name in norm._buffers else norm._parameters)[name] = state
    return norm


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("running_mean", torch.zeros(1).expand(4)),
        ("running_var", torch.ones(3)),
        ("running_var", torch.ones(5)),
        ("weight", nn.Parameter(torch.ones(3))),
        ("bias", nn.Parameter(torch.ones(4, 1))),
        ("num_batches_tracked", torch.zeros(2, dtype=torch.long)),
        ("num_batches_tracked", torch.zeros((), dtype=torch.long, device="meta")),
    ],
)
def test_other_states_are_pytorchs(name, state):
    assert not is_fusable(_with_state(name, state), nn.ReLU())


@pytest.mark.parametrize(("name", "state"), [("running_mean", torch.zeros(2)), ("bias", nn.Parameter(torch.ones(2)))])
def test_other_states_of_cbams_norm_are_pytorchs(name, state, device):
    module = attn_kernels.SpatialGate()
    module.spatial.bn = _with_state(name, state, channels=1)
    with pytest.raises(RuntimeError, match=f"{name} should contain 1 elements not 2"):
        module.to(device)(torch.randn(2, 3, 4, 5, device=device))


def test_saves_the_map_and_little_else(device):
    c = torch.randn(4, 8, 16, 16, device=device).requires_grad_()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t) if t.numel() else t, lambda t: t
    ):
        batch_norm_relu(c, nn.BatchNorm2d(8).to(device))
    assert sum(t.numel() for p, t in saved.items() if p != c.data_ptr()) <= 4 * 8


class _Norm(nn.BatchNorm2d):
    pass


def _hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def _patched(layer):
    layer.forward = lambda t: t
    return layer


def _with_weight(weight):
    conv = nn.Conv2d(4, 1, 1)
    conv.weight = nn.Parameter(weight)
    return conv


def test_stands_for_plain_layers_only():
    assert is_fusable(nn.BatchNorm2d(4), nn.ReLU())
    norms = (_Norm(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), _hooked(nn.BatchNorm2d(4)))
    for norm in (*norms, _patched(nn.BatchNorm2d(4))):
        assert not is_fusable(norm, nn.ReLU())
    for activation in (nn.ReLU6(), nn.GELU(), nn.Identity(), _hooked(nn.ReLU()), _patched(nn.ReLU())):
        assert not is_fusable(nn.BatchNorm2d(4), activation)
    assert can_add(nn.Conv2d(4, 1, 1), 4)
    for conv in (
        nn.Conv2d(4, 2, 1),
        nn.Conv2d(4, 1, 3, padding=1),
        nn.Conv2d(4, 1, 1, padding=1),
        nn.Conv2d(4, 1, 1, stride=2),
        nn.Linear(4, 1),
        _hooked(nn.Conv2d(4, 1, 1)),
        _patched(nn.Conv2d(4, 1, 1)),
        _with_weight(torch.ones(1, 3, 1, 1)),
        _with_weight(torch.ones(4)),
    ):
        assert not can_add(conv, 4)
    assert not can_add(nn.Conv2d(4096, 1, 1), 4096)


class _Branches(nn.Module):
    """BAM on branches of one's own."""

    def __init__(self, kit, *layers):
        super().__init__()
        self.function, bam = getattr(kit, "functional", kit).bam, kit.BAM(12, 4)
        self.gate_c, self.gate_s = bam.channel_att.gate_c, nn.Sequential(nn.Conv2d(12, 3, 1), *layers)

    def forward(self, x):
        return self.function(x, self.gate_c, self.gate_s)


BRANCHES = {
    "norm twice": lambda: [nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1)],
    "no relu": lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)],
    "relu in place": lambda: [nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 1, 1)],
    "norm last": lambda: [nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.ReLU()],
    "a wide last convolution": lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1)],
    "subclass": lambda: [_Norm(3), nn.ReLU(), nn.Conv2d(3, 1, 1)],
    "relu alone": lambda: [nn.ReLU(), nn.Conv2d(3, 1, 1)],
}


@pytest.mark.parametrize("layers", BRANCHES)
def test_branches_of_any_layers(layers, device):
    fused, eager = (m.double() for m in pair(lambda kit: _Branches(kit, *BRANCHES[layers]()), device))
    x, dy = (torch.randn(6, 12, 4, 5, dtype=torch.float64, device=device) for _ in range(2))
    got, want = (run(m, x, None, None, dy) for m in (fused, eager))
    torch.testing.assert_close(got.y, want.y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got.gradients, want.gradients, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got.buffers, want.buffers)


def test_hooks_in_the_branch_run(device):
    module, calls = attn_kernels.BAM(12, 4).to(device), []
    layers = [m for m in module.spatial_att.modules() if isinstance(m, nn.BatchNorm2d | nn.ReLU | nn.Conv2d)][1:]
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    module(torch.randn(3, 12, 4, 4, device=device))
    assert calls == layers


def test_a_map_that_a_layer_resized_is_pytorchs(device):
    """Kernels take nobody's word for the channels of a map: PyTorch's norm raises where they are not its own."""
    layers = [nn.ZeroPad2d(1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 3)]
    fused, eager = (m.eval() for m in pair(lambda kit: _Branches(kit, *copy.deepcopy(layers)), device))
    x = torch.randn(2, 12, 4, 5, device=device)
    torch.testing.assert_close(fused(x), eager(x))
    fused.gate_s.insert(1, nn.PixelUnshuffle(2))
    with pytest.raises((ValueError, RuntimeError)):
        fused(torch.randn(2, 12, 4, 4, device=device))


@pytest.mark.parametrize("size", [1, (1, None)])
@pytest.mark.parametrize("training", [True, False])
def test_a_smaller_spatial_map_is_broadcast(training, size, device):
    layers = [nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(size), nn.Conv2d(3, 1, 1)]
    modules = pair(lambda kit: _Branches(kit, *copy.deepcopy(layers)), device)
    fused, eager = (m.double().train(training) for m in modules)
    x, dy = (torch.randn(6, 12, 4, 5, dtype=torch.float64, device=device) for _ in range(2))
    got, want = (run(m, x, None, None, dy) for m in (fused, eager))
    torch.testing.assert_close(got.y, want.y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got.gradients, want.gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.fast
@pytest.mark.parametrize("kit", [reference, attn_kernels])
@pytest.mark.parametrize(
    ("last", "shape"),
    [
        ([nn.Conv2d(3, 1, 3)], (2, 1, 2, 3)),
        ([nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 1)], (2, 1, 8, 10)),
        ([nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d((2, None))], (2, 1, 2, 5)),
        ([nn.Conv2d(3, 1, 1), nn.ConvTranspose2d(1, 12, 1)], (2, 12, 4, 5)),
    ],
    ids=["unpadded", "upsampled", "a row", "channels"],
)
def test_a_spatial_map_of_another_size_is_refused(kit, last, shape, device):
    module = _Branches(kit, nn.BatchNorm2d(3), nn.ReLU(), *last).to(device)
    expected = re.escape(f"gate_s: expected to return (N, 1, H, W), (2, 1, 4, 5), got {shape}")
    with pytest.raises(ValueError, match=expected):
        module(torch.randn(2, 12, 4, 5, device=device))


@pytest.mark.parametrize("kit", [reference, attn_kernels])
def test_channel_logits_of_another_shape_are_refused(kit, device):
    module = _Branches(kit, nn.Conv2d(3, 1, 1))
    module.gate_c.append(nn.Unflatten(1, (12, 1, 1)))
    with pytest.raises(ValueError, match=re.escape("gate_c: expected to return (N, C), (2, 12), got (2, 12, 1, 1)")):
        module.to(device)(torch.randn(2, 12, 4, 5, device=device))


@pytest.mark.parametrize("kit", [reference, attn_kernels])
def test_hooks_on_the_spatial_branch_itself_run(kit, device):
    module, x = _Branches(kit, nn.Conv2d(3, 1, 1)).to(device), torch.randn(2, 12, 4, 5, device=device)
    expected, calls = module(x), []
    module.gate_s.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert calls == [1]


def test_timms_norm_with_hooks_is_a_module(device):
    norm = timm.layers.BatchNormAct2d(4, apply_act=False)
    assert is_fusable(norm, nn.ReLU())
    norm.act.register_forward_hook(lambda *_: None)
    assert not is_fusable(norm, nn.ReLU())


@pytest.mark.parametrize("kit", [reference, attn_kernels])
@pytest.mark.parametrize("mixed", [False, True])
def test_hooks_on_the_reducing_convolution_run(kit, mixed, device):
    module, calls = _Branches(kit, nn.Conv2d(3, 1, 1)).to(device), []
    x = torch.randn(2, 12, 4, 5, device=device, dtype=torch.bfloat16 if mixed else torch.float32)
    expected = module(x)
    for layer in module.gate_s:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    torch.testing.assert_close(module(x), expected, rtol=0.05 if mixed else 1e-4, atol=0.05 if mixed else 1e-5)
    assert calls == [*module.gate_s]


def test_opcheck(device):
    """Of a layer whose buffers are updated; tests/test_dispatch.py checks what modules call."""
    c, norm = torch.randn(2, 4, 3, 3, device=device), _norm(4, device)
    args = c, norm.weight.detach(), norm.bias.detach(), None, None, *norm.buffers(), True, True, 0.1, 1e-5
    library.opcheck(forward_op, args, test_utils=("test_schema", "test_faketensor"))
    _, statistics = forward_op(*args)
    backward = torch.randn_like(c), c, *args[1:5], statistics, True
    library.opcheck(backward_op, backward, test_utils=("test_schema", "test_faketensor"))
