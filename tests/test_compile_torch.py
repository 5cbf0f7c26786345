"""torch.compile: no graph break, no specialised batch, the eager numbers; Inductor's code around the operators."""

import itertools
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from triton.runtime.interpreter import GridExecutor

import attn_kernels
import reference
from tests.harness import MODULES, assert_same_gradients, pair, real_input, registered_operators

ATTENTIONS = ("se", "cbam", "bam", "simam", "channel_attention")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _step(module, x, residual):
    """Output and gradients of ``relu(module(x) + residual)``."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
    y = module(*leaves, "relu")
    return y, torch.autograd.grad(y.square().sum(), [*leaves, *module.parameters()])


def _check_step(compiled, eager, shape, layout, device):
    x = real_input(shape, torch.float32, layout, device)
    residual = torch.randn_like(x)
    (y, *got), (expected, *want) = _step(compiled, x, residual), _step(eager, x, residual)
    torch.testing.assert_close(y, expected)
    assert y.stride() == x.stride()
    assert_same_gradients(*got, *want)


@pytest.mark.parametrize("kit", [reference, attn_kernels], ids=lambda kit: kit.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_one_graph_in_training_inference_and_autocast(name, kit, device, monkeypatch):
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)  # what kernels compute, other tests see
    x = real_input((2, 12, 5, 7), torch.float32, "contiguous", device).requires_grad_()
    for training, autocast in itertools.product((True, False), repeat=2):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")  # what autograd makes of a graph, the tests below compile too
        module = MODULES[name](kit, 12).to(device).train(training)
        compiled = torch.compile(module, backend=counter, fullgraph=True)  # raises where the graph breaks
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = compiled(x, x, "relu")
        torch.autograd.grad(y.sum(), [x, *module.parameters()])
        (graph,) = counter.graphs
        assert ("torch.ops.attn_kernels." in graph.print_readable(print_output=False)) == (kit is attn_kernels)


@pytest.mark.parametrize(("dynamic", "layout"), [(None, "contiguous"), (True, "channels_last")])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_graph_serves_every_batch_and_size(name, dynamic, layout, device):
    fused, eager = pair(lambda kit: MODULES[name](kit, 12), device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=dynamic)
    _check_step(compiled, eager, (2, 12, 5, 7), layout, device)
    if dynamic is None:  # the first change of the batch makes it a variable
        _check_step(compiled, eager, (3, 12, 5, 7), layout, device)
    compiles = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (3, 5):
            _check_step(compiled, eager, (n, 12, 5, 7), layout, device)
        if dynamic:
            _check_step(compiled, eager, (3, 12, 8, 6), layout, device)
    assert counter.frame_count == compiles
    for got, want in zip(fused.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["cbam", "simam"])
def test_sizes_of_which_backward_keeps_other_things_take_another_graph(name, device):
    fused, eager = pair(lambda kit: MODULES[name](kit, 12), device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for side in (6, 9, 34, 36):  # 34x34: an index of two bytes; in channels_last more than a program holds
        _check_step(compiled, eager, (2, 12, side, side), "channels_last", device)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] < graphs[2] == graphs[3]


def test_marked_batch_is_not_specialised(device):
    fused, eager = pair(lambda kit: kit.CBAM(12, 4), device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    for n in (2, 3, 5):
        x = real_input((n, 12, 5, 7), torch.float32, "contiguous", device)
        torch._dynamo.mark_dynamic(x, 0)  # raises where a guard specialises it
        torch.testing.assert_close(compiled(x), eager(x))
    assert counter.frame_count == 1


def test_input_as_its_own_residual(device):
    for name in ("cbam", "simam"):
        fused, eager = pair(lambda kit, name=name: MODULES[name](kit, 12), device)
        x = real_input((2, 12, 5, 7), torch.float32, "contiguous", device).requires_grad_()
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        got, want = (torch.autograd.grad(m(x, x, "relu").square().sum(), x) for m in (compiled, eager))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=name)


class _All(nn.Module):
    """A convolution, then every kind of attention."""

    def __init__(self, kit):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.attentions = nn.ModuleList(MODULES[name](kit, 12) for name in ATTENTIONS)

    def forward(self, x):
        x = self.stem(x)
        for attention in self.attentions:
            x = attention(x, x, "relu")
        return x


@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU"
)
def test_inductor_calls_every_operator_in_channels_last(device):
    fused, eager = pair(_All, device)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    for n in (2, 3):
        x = torch.randn(n, 3, 8, 6, device=device).contiguous(memory_format=torch.channels_last)
        with torch._dynamo.config.patch(error_on_recompile=True), torch.profiler.profile() as profile:
            y, want = compiled(x), eager(x)
            dy = torch.randn_like(y)
            got = torch.autograd.grad(y, list(fused.parameters()), dy)
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
                compiled(x)  # by the operators that save nothing
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        assert y.stride() == want.stride()
        assert_same_gradients(got, torch.autograd.grad(want, list(eager.parameters()), dy))
    called = {e.key for e in profile.key_averages() if e.key.startswith("attn_kernels::")}
    assert called == registered_operators()
