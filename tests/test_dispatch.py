"""Which calls are fused, and that the others run the reference formula, silently and correctly."""

import pytest
import torch
from torch import library, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attn_kernels
import reference
from attn_kernels import functional, models
from attn_kernels.functional import is_fused
from benchmarks.accuracy import compare
from reference.catalogue import LAYOUTS, OPERATORS
from tests.harness import MODULES, pair, real_input, registered_operators


@pytest.fixture(params=MODULES)
def modules(request, device):
    fused, eager = pair(lambda kit: MODULES[request.param](kit, 12), device)
    return fused.eval(), eager.eval()


def _x(device, shape=(2, 12, 5, 7)):
    return real_input(shape, torch.float32, "contiguous", device)


def test_functional_forms_have_the_references_signatures():
    import inspect

    for name in functional.__all__:
        ours, theirs = getattr(functional, name), getattr(reference, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__doc__ == theirs.__doc__


@pytest.mark.fast
@pytest.mark.device
def test_the_tests_run_the_kernels(modules, device, monkeypatch):
    fused, _ = modules
    assert is_fused(_x(device))
    for name in functional.__all__:
        monkeypatch.setattr(reference, name, None)  # the reference formula would raise
    fused(_x(device), _x(device), "relu")


@pytest.mark.parametrize("name", ["se", "channel_gate", "cbam", "spatial_gate", "simam"])
def test_gradients_that_are_differentiated_under_autocast_are_not_rounded(name, device):
    fused, _ = pair(lambda kit: MODULES[name](kit, 12), device)
    x, found = _x(device), []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            y = fused(leaf)
            found.append(torch.autograd.grad(y.square().sum(), [leaf, *fused.parameters()], create_graph=True))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["se", "channel_gate", "cbam"])
def test_weights_of_1x1_convolutions(name, device):
    """Taken as they are, and so are their gradients."""
    form = getattr(functional, name)
    x, w1, b1, w2, b2 = (torch.randn(s, device=device) for s in ((2, 12, 5, 4), (3, 12), (3,), (12, 3), (12,)))
    rest = () if name != "cbam" else (torch.randn(1, 2, 7, 7, device=device), torch.nn.BatchNorm2d(1).to(device))
    found = []
    for kit in (form, getattr(reference, name)):
        for shape in ((), (1, 1)):
            weights = [w.clone().reshape(*w.shape, *shape).requires_grad_() for w in (w1, w2)]
            y = kit(x, weights[0], b1, weights[1], b2, *rest)
            gradients = torch.autograd.grad(y.square().sum(), weights)
            assert [g.shape for g in gradients] == [w.shape for w in weights]
            found.append([y, *(g.flatten(1) for g in gradients)])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_x(modules, dtype, device):
    fused, _ = modules
    with torch.autocast(device.type, dtype):
        for x in (_x(device), _x(device).to(dtype)):
            x.requires_grad_()
            y = fused(x, x, "relu")
            assert y.dtype == x.dtype
            y.sum().backward()
            assert x.grad.dtype == x.dtype


def test_half_module(modules, device):
    fused, eager = modules
    x = _x(device).bfloat16()
    y, want = fused.bfloat16()(x), eager.bfloat16()(x)
    assert compare(y, want, eager.double()(x.double())).ok


def test_vmap_and_grad_of_torch_func(modules, device):
    fused, eager = modules
    x = torch.randn(3, 2, 12, 5, 7, device=device)
    torch.testing.assert_close(torch.func.vmap(fused)(x), torch.func.vmap(eager)(x))
    got, want = (torch.func.grad(lambda x, m=m: m(x).square().sum())(x[0]) for m in (fused, eager))
    torch.testing.assert_close(got, want)


def test_forward_mode(modules, device):
    fused, eager = modules
    x, tangent = _x(device), _x(device)
    got, want = (torch.func.jvp(m, (x,), (tangent,)) for m in (fused, eager))
    torch.testing.assert_close(got, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        outputs = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (fused, eager)]
    torch.testing.assert_close(*outputs)


class _Opcheck(TorchDispatchMode):
    """Checks every operator of ``attn_kernels`` on the arguments that the modules call it with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "attn_kernels":
            detached = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))
            self.seen.add(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.fast
def test_opcheck(device):
    with _Opcheck() as checked:
        for build in MODULES.values():
            module = build(attn_kernels, 12).to(device)
            for layout in LAYOUTS.values():
                x, residual = (_x(device).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
                module.train()(x, residual, "relu").sum().backward()
                module.eval()(x.detach())
                with torch.no_grad():
                    module(x)
    assert checked.seen == registered_operators()  # a new operator is checked or fails here


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(op.name())
        return op(*args, **(kwargs or {}))


def test_profilers_and_dispatch_modes_see_operators(device):
    module, x = attn_kernels.SE(12).to(device), _x(device)
    with torch.profiler.profile() as profile:
        module(x).sum().backward()
    ours = {name for name in registered_operators() if name.startswith("attn_kernels::channel_gate_")}
    assert ours <= {event.name for event in profile.events()}
    with _Names() as names:
        module(x).sum().backward()
    assert ours <= names.seen


def test_gradients_in_a_batch(modules, device):
    """The backward of a fused call under vmap."""
    fused, eager = modules
    x, dys = _x(device).requires_grad_(), torch.randn(3, 2, 12, 5, 7, device=device)
    got, want = (torch.autograd.grad(m(x), x, dys, is_grads_batched=True)[0] for m in (fused, eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_tensors_whose_sign_is_pending(modules, device):
    """PyTorch's imaginary parts of conjugates, whose memory holds the negative of their values."""
    fused, eager = modules
    x, dy = torch._neg_view(_x(device)).requires_grad_(), torch._neg_view(_x(device))
    results = []
    for module in (fused, eager):
        y = module(x, x, "relu")
        results.append((y, *torch.autograd.grad(y, x, dy)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break(modules, device):
    fused, eager = modules
    x, residual = _x(device).requires_grad_(), _x(device).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for training in (False, True):
        fused.train(training)
        eager.train(training)
        y, want = compiled(x, residual, "relu"), eager(x, residual, "relu")
        torch.testing.assert_close(y, want)
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, residual), dy),
            torch.autograd.grad(want, (x, residual), dy),
            rtol=1e-4,
            atol=1e-5,
        )
        for got, expected in zip(fused.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(got, expected)


def test_norm_of_another_kind_falls_back(device):
    fused, eager = pair(lambda kit: kit.SpatialGate(), device)
    for module in (fused, eager):
        module.spatial.bn = nn.Identity()
    x = _x(device)
    torch.testing.assert_close(fused(x), eager(x))


def test_an_empty_batch_is_the_one_reason(device):
    """A residual is empty with it, and no parameter is."""
    x = _x(device)[:0]
    assert functional.why_not(x, (x, torch.ones(1, device=device))) == ["x has no element"]


@pytest.mark.parametrize("name", ["se", "channel_gate"])
def test_an_mlp_without_hidden_units_falls_back(name, device):
    """Whose gate is that of the second layer's bias."""
    x = _x(device).requires_grad_()
    shapes = (0, 12), (0,), (12, 0), (12,)
    parameters = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    got, want = (getattr(kit, name)(x, *parameters) for kit in (functional, reference))
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, parameters[3]), dy) for y in (got, want)))


@pytest.mark.parametrize("attention", models.ATTENTIONS[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_agree(attention, layout, device):
    eager = reference.models.resnet(18, attention, 10).to(device).eval()
    fused = models.resnet(18, attention, 10).to(device).eval()
    fused.load_state_dict(eager.state_dict(), strict=True)
    ours = {m.__module__ for m in fused.modules() if m.__module__.startswith("attn_kernels")}
    assert ours or attention == "se"  # whose layers stand on the block
    x = torch.randn(2, 3, 64, 48, device=device).contiguous(memory_format=LAYOUTS[layout])
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-4)


def test_named_networks():
    for attention in models.ATTENTIONS[1:]:
        for depth in models.LAYERS:
            with torch.device("meta"):
                ours = getattr(models, f"{attention}_resnet_{depth}")()
                theirs = getattr(reference.models, f"{attention}_resnet_{depth}")()
            assert {k: v.shape for k, v in ours.state_dict().items()} == {
                k: v.shape for k, v in theirs.state_dict().items()
            }


def test_modules_are_the_references():
    for name in OPERATORS:
        assert issubclass(getattr(attn_kernels, name), getattr(reference, name))
        assert getattr(attn_kernels, name).__doc__
    cbam = attn_kernels.CBAM(16)
    assert isinstance(cbam.ChannelGate, attn_kernels.ChannelGate)
    assert isinstance(cbam.SpatialGate, attn_kernels.SpatialGate)
