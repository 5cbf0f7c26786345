"""Hooks on saved tensors may give them back in another form than they were saved in: layout, dtype, shape or device."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import attn_kernels
from reference.catalogue import LAYOUTS
from tests.harness import MODULES, ChannelAttention, pair, real_input, run

C = 12


@pytest.fixture(params=MODULES)
def modules(request, device):
    """The fused module and the reference's in float64."""
    fused, eager = pair(lambda kit: MODULES[request.param](kit, C), device)
    return fused.double(), eager.double()


def _contiguous(t):
    """What ``save_on_cpu`` packs with pinned memory, which there is none of without a GPU."""
    packed = torch.empty(t.size(), dtype=t.dtype, layout=t.layout, device=t.device)
    return packed.copy_(t)


def _channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _strided(t):
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t


def _wider(t):
    return t.double() if t.is_floating_point() else t


def _same(t):
    return t


@pytest.mark.fast
@pytest.mark.parametrize("unpack", [_contiguous, _channels_last, _strided, _wider])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_form(modules, layout, unpack, device):
    fused, eager = modules
    dtype = torch.float64
    if unpack is _wider:
        if isinstance(fused, ChannelAttention | attn_kernels.BAM):
            pytest.skip("PyTorch's own layers, which this one has, take no other dtype")
        fused, eager, dtype = fused.float(), eager.float(), torch.float32
    x = real_input((3, C, 5, 7), dtype, layout, device)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    want = run(eager, x, residual, "relu", dy)
    with saved_tensors_hooks(_same, unpack):
        got = run(fused, x, residual, "relu", dy)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    for name, gradient in want.gradients.items():
        torch.testing.assert_close(got.gradients[name], gradient, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offloading(modules, layout, device):
    fused, _ = modules
    x = real_input((3, C, 5, 7), torch.float64, layout, device)
    dy = torch.randn_like(x)
    want = run(fused, x, x, "relu", dy)
    with save_on_cpu(pin_memory=device.type == "cuda"):
        got = run(fused, x, x, "relu", dy)
    for name, gradient in want.gradients.items():
        if not name.endswith("running_mean"):
            torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-12, atol=1e-12)


def test_second_gradients(modules, device):
    fused, eager = modules
    x = torch.randn(3, C, 5, 7, dtype=torch.float64, device=device).to(memory_format=torch.channels_last)
    found = []
    for module in (fused, eager):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with saved_tensors_hooks(_same, _contiguous):
            (dx,) = torch.autograd.grad(module(leaf, None, "relu").square().sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_what_cannot_be_restored_is_refused(modules, device):
    fused, _ = modules
    x = real_input((3, C, 5, 7), torch.float64, "contiguous", device).requires_grad_()
    with saved_tensors_hooks(_same, lambda t: t[..., :1] if t.dim() == 4 else t):
        y = fused(x)
    with pytest.raises(ValueError, match=r"saved tensor: expected shape \(3, 12, 5, 7\), .*, got \(3, 12, 5, 1\)"):
        y.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hook_on_any_node(modules, layout, device):
    """One that is set on a node's tensor afterwards is not there when it is saved."""
    fused, _ = modules
    x = real_input((3, C, 5, 7), torch.float64, layout, device)
    dy = torch.randn_like(x)
    want = run(fused, x, None, "relu", dy)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = fused(leaf, None, "relu")
    for tensor in y.grad_fn._raw_saved_tensors:
        with contextlib.suppress(RuntimeError):  # of None, which has no hooks
            tensor.register_hooks(_same, _strided)
    gradients = torch.autograd.grad(y, [leaf, *fused.parameters()], dy)
    expected = [want.gradients[name] for name in ("x", *dict(fused.named_parameters()))]
    torch.testing.assert_close(gradients, tuple(expected), rtol=1e-9, atol=1e-10)


def test_batch_norm_relu(device):
    """BAM's operator by itself."""
    from attn_kernels.ops.bam.norm import batch_norm_relu

    norm = nn.BatchNorm2d(5).double().to(device)
    c = torch.randn(2, 5, 3, 4, dtype=torch.float64, device=device).to(memory_format=torch.channels_last)
    found = []
    for function in (lambda c: batch_norm_relu(c, norm), lambda c: torch.relu(norm(c))):
        leaf = c.clone(memory_format=torch.preserve_format).requires_grad_()
        with saved_tensors_hooks(_same, _contiguous):
            r = function(leaf)
        found.append(torch.autograd.grad(r.sum(), [leaf, *norm.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
