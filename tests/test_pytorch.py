"""PyTorch around the modules: autocast, layouts, CUDA graphs, checkpointing, torch.func, copies, tensor subclasses."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import attn_kernels
import reference
from attn_kernels import models
from attn_kernels.functional import is_fused
from reference.catalogue import LAYOUTS
from tests.harness import MODULES, assert_same_gradients, networks, pair, real_input

SHAPE = (2, 8, 5, 4)
WITH_PARAMETERS = [name for name, build in MODULES.items() if any(True for _ in build(reference, 8).parameters())]


@pytest.fixture(params=MODULES)
def name(request):
    return request.param


@pytest.fixture
def modules(name, device):
    return pair(lambda kit: MODULES[name](kit, 8), device)


def _x(device, layout="contiguous"):
    return real_input(SHAPE, torch.float32, layout, device)


def _images(device):
    return torch.randn(2, 3, 6, 5, device=device)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("se", torch.float16), ("cbam", torch.float16), ("cbam", torch.bfloat16), ("bam", torch.float16)],
)
def test_training_under_autocast_with_a_gradient_scaler(name, dtype, device):
    losses = []
    for network in networks(name, device):
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)  # overflows at first: steps are skipped
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        torch.manual_seed(1)
        images, goal = _images(device), torch.randn(2, 4, device=device)
        for _ in range(3):
            with torch.autocast(device.type, dtype):
                y = network(images)
                loss = nn.functional.mse_loss(y.float(), goal)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(None if scaler.get_scale() < 2.0**40 else 2.0**8)
            optimizer.zero_grad()
        losses.append(loss.item())
        assert scaler.get_scale() == 2.0**8
        assert all(p.isfinite().all() for p in network.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


class _ChannelsLast(TorchDispatchMode):
    """Fails where an activation is copied or is not channels_last, also on its way into a kernel."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        outputs = op(*args, **(kwargs or {}))
        seen = outputs if isinstance(outputs, tuple | list) else [outputs]
        if op.namespace == "attn_kernels":
            seen = [*seen, *args]
        for t in seen:
            if isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[1] >= 64:
                assert t.is_contiguous(memory_format=torch.channels_last), f"{op} on strides {t.stride()}"
                assert op.overloadpacket.__name__ not in ("clone", "copy_", "contiguous", "_to_copy"), op
        return outputs


@pytest.mark.parametrize("attention", models.ATTENTIONS[1:])
def test_no_layout_change_in_a_channels_last_network(attention, device):
    network = models.ResNet(models.BasicBlock, (1, 1, 1, 1), attention, 10, models.FUSED).to(device)
    network = network.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    with _ChannelsLast():
        y = network.features(images)[-1]
        y.backward(torch.ones_like(y))
    assert network.conv1.weight.grad.any()


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph_of_a_training_step(modules, layout, device):
    fused, eager = modules
    x, residual, dy = (torch.randn_like(_x(device, layout)) for _ in range(3))
    x.requires_grad_()
    residual.requires_grad_()

    def step(module, x, residual, dy):
        y = module(x, residual, "relu")
        return y, torch.autograd.grad(y, [x, residual, *module.parameters()], dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled before the capture
        for _ in range(2):
            step(fused, x, residual, dy)
    torch.cuda.current_stream().wait_stream(side)
    fused.load_state_dict(eager.state_dict())  # in place: the statistics as before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step(fused, x, residual, dy)
    for _ in range(3):
        with torch.no_grad():
            for t in (x, residual, dy):
                t.copy_(torch.randn_like(t))
        graph.replay()
        want, expected = step(eager, x, residual, dy)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        assert_same_gradients(gradients, expected)
        for got, buffer in zip(fused.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(got, buffer)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(modules, use_reentrant, device):
    """Recomputation updates running statistics a second time, as that of PyTorch's own BatchNorm does."""
    x, residual, dy = (torch.randn_like(_x(device)) for _ in range(3))
    results = []
    for module in modules:
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = checkpoint(module, *leaves, "relu", use_reentrant=use_reentrant)
        y.backward(dy)
        results.append([y.detach(), *(t.grad for t in leaves), *(p.grad for p in module.parameters())])
    assert_same_gradients(*results)
    fused, eager = modules
    for got, want in zip(fused.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_jacobians(modules, device):
    x = _x(device)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        got, want = (jacobian(lambda x, m=m: m.eval()(x).mean((0, 2, 3)))(x) for m in modules)
        torch.testing.assert_close(got, want)


def test_gradients_a_sample(modules, device):
    x = _x(device)
    results = []
    for module in modules:
        module.eval()

        def loss(parameters, x, module=module):
            return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
    torch.testing.assert_close(*results)


def test_copies_and_files(modules, name, device):
    fused, eager = modules
    x = _x(device)
    fused(x)
    eager(x)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    loaded = MODULES[name](attn_kernels, 8).to(device)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    whole = io.BytesIO()
    torch.save(fused, whole)
    whole.seek(0)
    copies = loaded, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(whole, weights_only=False)
    want = eager.eval()(x)
    for module in copies:
        assert type(module) is type(fused)
        assert name == "channel_attention" or attn_kernels.explain(module, x).fused
        torch.testing.assert_close(module.eval()(x), want)
    for p in itertools.chain(copies[1].parameters(), copies[1].buffers()):
        p.detach().zero_()
    torch.testing.assert_close(fused.eval()(x), want)  # a copy shares nothing


def test_built_on_no_device_then_given_one(modules, name, device):
    eager, x = modules[1], _x(device)
    with torch.device("meta"):
        module = MODULES[name](attn_kernels, 8)
    assert module(torch.empty(SHAPE, device="meta")).shape == SHAPE
    module.to_empty(device=device).load_state_dict(eager.state_dict())
    torch.testing.assert_close(module.eval()(x), eager.eval()(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_and_channels_last_after_construction(modules, layout, device):
    fused, eager = (m.half().to(memory_format=LAYOUTS[layout]) for m in modules)
    x = _x(device, layout).half().requires_grad_()
    y, want = (m(x, x, "relu") for m in (fused, eager))
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float16 for t in (x, *fused.parameters()))


def test_deterministic_algorithms(name, device):
    torch.use_deterministic_algorithms(True)
    try:
        fused, _ = pair(lambda kit: MODULES[name](kit, 8), device)
        x = _x(device).requires_grad_()
        fused(x, x, "relu").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


class Quantized(torch.Tensor):
    """Eight bits per element and a scale, dequantised by whatever operator takes it, as torchao's weights are."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, t):
        scale = t.abs().amax() / 127
        return cls((t / scale).round().to(torch.int8), scale)

    def dequantize(self):
        return self.values * self.scale

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        args, kwargs = tree_map_only(Quantized, Quantized.dequantize, (args, kwargs or {}))
        return op(*args, **kwargs)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_quantised_parameters(modules, name, device):
    fused, eager = (m.eval() for m in modules)
    paths = [path for path, p in fused.named_parameters() if p.dim() > 1]
    for path in paths:
        owner, _, attribute = path.rpartition(".")
        quantised = Quantized.of(fused.get_parameter(path).detach())
        setattr(fused.get_submodule(owner), attribute, nn.Parameter(quantised, requires_grad=False))
        setattr(eager.get_submodule(owner), attribute, nn.Parameter(quantised.dequantize(), requires_grad=False))
    x, residual, dy = (torch.randn_like(_x(device)) for _ in range(3))
    if name != "channel_attention":  # whose layers are PyTorch's
        assert any("Quantized" in reason for reason in attn_kernels.explain(fused, x).reasons)
    results = []
    for module in (fused, eager):
        leaf = x.clone().requires_grad_()
        y = module(leaf, residual, "relu")
        y.backward(dy)
        results.append([y.detach(), leaf.grad])
    torch.testing.assert_close(*results)


def test_input_of_a_subclass(modules, device):
    fused, eager = (m.eval() for m in modules)
    x = _x(device)
    quantised = Quantized.of(x)
    assert not is_fused(quantised)
    torch.testing.assert_close(fused(quantised), eager(quantised.dequantize()))
    torch.testing.assert_close(fused(x, quantised, "relu"), eager(x, quantised.dequantize(), "relu"))


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.namespace)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_are_fused(modules, layout, device):
    fused, _ = modules
    x = _x(device, layout)
    y = fused(x, x)
    mode = FakeTensorMode()
    state = {key: mode.from_tensor(t) for key, t in fused.state_dict(keep_vars=True).items()}
    fake_x = mode.from_tensor(x)
    with mode, _Operators() as seen:
        fake = torch.func.functional_call(fused, state, (fake_x, fake_x))
    assert "attn_kernels" in seen.names
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (y.shape, y.stride(), y.dtype, y.device)
