"""Every fused op, forward and every gradient, against the float64 reference by the accuracy rule."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attn_kernels
import reference
from attn_kernels.ops.cbam import convolution
from attn_kernels.ops.common import scalar, tiling
from reference.catalogue import DTYPES, LAYOUTS, POOLS
from reference.se import ACTIVATIONS, GATES
from tests.differential import CACHED
from tests.harness import MODULES, check

# (shape, with the residual + ReLU epilogue)
CASES = {
    "7x7": ((3, 37, 7, 7), True),
    "prime, H != W": ((3, 16, 5, 11), False),
    "one channel": ((2, 1, 4, 6), True),
    "batch of one": ((1, 24, 8, 6), False),
}


def _marks(dtype, case):
    if (dtype, case) in {("bf16", "7x7"), ("fp32", "prime, H != W")}:
        yield pytest.mark.fast
    if dtype in ("bf16", "fp32"):
        yield pytest.mark.device


@pytest.mark.parametrize(
    ("dtype", "case"), [pytest.param(*both, marks=[*_marks(*both)]) for both in itertools.product(DTYPES, CASES)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", MODULES)
def test_against_reference(module, layout, dtype, case, device):
    shape, epilogue = CASES[case]
    if module == "bam" and shape[0] == 3:
        # BatchNorm over few samples makes of half a unit in x 3 to 50 units in its branch's gradients, in eager as
        # well, whose error is then a matter of luck.
        shape = (16, *shape[1:])
    check(
        lambda kit: MODULES[module](kit, shape[1]),
        shape,
        DTYPES[dtype],
        layout,
        device,
        activation="relu" if epilogue else None,
        with_residual=epilogue,
        training=module != "bam" or shape[0] > 1,  # BatchNorm1d refuses a training batch of one
    )


@pytest.mark.device
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", MODULES)
def test_one_pixel(module, layout, dtype, device):
    check(lambda kit: MODULES[module](kit, 8), (3, 8, 1, 1), DTYPES[dtype], layout, device, activation="relu")


@pytest.mark.device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", MODULES)
def test_planes_and_channels_larger_than_a_tile(module, layout, device, monkeypatch):
    for configuration in CACHED:
        configuration.cache_clear()
    monkeypatch.setattr(tiling, "TILE", 512)
    monkeypatch.setattr(convolution, "PROGRAMS", 3)
    # BatchNorm over 2 samples, in BAM, leaves little but signs.
    shape = (2, 5, 45, 47) if module == "simam" else (3 if module == "bam" else 2, 19, 17, 31)
    build = lambda kit: MODULES[module](kit, shape[1])  # noqa: E731
    check(build, shape, torch.float32, layout, device, activation="relu", with_residual=True)
    for configuration in CACHED:
        configuration.cache_clear()


@pytest.mark.parametrize("module", MODULES)
def test_a_real_plane(module, device):
    check(lambda kit: MODULES[module](kit, 4), (1, 4, 56, 56), torch.float32, "contiguous", device, training=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_se_options(activation, gate, bias, device):
    def build(kit):
        return kit.SE(20, hidden_channels=35, bias=bias, mlp_activation=activation, gate=gate)

    check(build, (3, 20, 5, 7), torch.float32, "channels_last", device)
    check(build, (3, 20, 5, 7), torch.float64, "contiguous", device)


@pytest.mark.parametrize("pools", range(1, 16))
def test_pool_types(pools, device):
    pool_types = tuple(reversed([p for i, p in enumerate(POOLS) if pools >> i & 1]))
    layout = "channels_last" if pools % 2 else "contiguous"
    check(lambda kit: kit.ChannelGate(10, 3, pool_types), (2, 10, 7, 5), torch.float32, layout, device)
    check(lambda kit: kit.CBAM(10, 3, pool_types), (2, 10, 5, 6), torch.float64, layout, device, activation="relu")


def _norm(**kwargs):
    def build(kit):
        module = kit.CBAM(9, 3)
        module.SpatialGate.spatial.bn = nn.BatchNorm2d(1, **kwargs)
        return module

    return build


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"momentum": 0.3, "eps": 1e-3},
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_batch_norm_of_cbam(dtype, kwargs, training, device):
    check(
        _norm(**kwargs),
        (2, 9, 6, 5),
        DTYPES[dtype],
        "contiguous",
        device,
        activation="relu",
        with_residual=True,
        training=training,
    )


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("module", MODULES)
def test_epilogue(module, with_residual, activation, device):
    check(
        lambda kit: MODULES[module](kit, 12),
        (2, 12, 7, 9),
        torch.bfloat16,
        "channels_last",
        device,
        activation=activation,
        with_residual=with_residual,
    )


@pytest.mark.parametrize("parameter_dtype", ["fp16", "bf16", "fp64"])
@pytest.mark.parametrize("module", MODULES)
def test_parameters_of_another_dtype(module, parameter_dtype, device):
    dtype = DTYPES[parameter_dtype]
    x_dtype = dtype if parameter_dtype == "bf16" else torch.float32
    check(
        lambda kit: MODULES[module](kit, 12),
        (2, 12, 5, 5),
        x_dtype,
        "contiguous",
        device,
        training=False,
        parameter_dtype=dtype,
    )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    module=st.sampled_from(sorted(MODULES)),
    n=st.integers(2, 3),
    c=st.integers(1, 70),
    h=st.integers(1, 17),
    w=st.integers(1, 17),
    layout=st.sampled_from(sorted(LAYOUTS)),
    epilogue=st.booleans(),
)
def test_any_shape(module, n, c, h, w, layout, epilogue, device):
    build = lambda kit: MODULES[module](kit, c)  # noqa: E731
    check(
        build,
        (n, c, h, w),
        torch.float64,
        layout,
        device,
        activation="relu" if epilogue else None,
        with_residual=epilogue,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-4, 0.1, 0.0, 1e-50, 1e300, -0.1, 1])
def test_numbers_are_exact_arguments(value, dtype):
    """As bits, since a float argument is a float32; the interpreter does not round it."""
    bits = scalar.number_bits(value, torch.empty(0, dtype=dtype))
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    assert torch.iinfo(integer).min <= bits <= torch.iinfo(integer).max
    assert (
        torch.tensor(bits, dtype=integer).view(dtype).item()
        == torch.tensor(value, dtype=torch.float64).to(dtype).item()
    )


@pytest.mark.device
@pytest.mark.parametrize("module", ["channel_gate", "cbam", "bam"])
# In the other layout neither makes a narrow tile.
@pytest.mark.parametrize(("shape", "layout"), [((2, 1024, 1, 1), "contiguous"), ((2, 3, 40, 40), "channels_last")])
def test_tiles_at_their_narrowest(module, shape, layout, device):
    build = lambda kit: MODULES[module](kit, shape[1])  # noqa: E731
    check(build, shape, torch.bfloat16, layout, device, activation="relu", training=False)


class _Calls(TorchDispatchMode):
    """The operators that are called inside, with the shapes of what they take."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, [t.shape for t in tree_leaves(args) if isinstance(t, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def test_bam_casts_its_convolutions_in_one_launch_and_their_gradients_in_another(device):
    bam = attn_kernels.BAM(32).to(device)
    x = torch.randn(2, 32, 6, 6, device=device, dtype=torch.bfloat16, requires_grad=True)
    with _Calls() as calls:
        bam(x).sum().backward()
    casts = [shapes for func, shapes in calls.seen if func is torch.ops.aten._foreach_copy_.default]
    assert [len(shapes) for shapes in casts] == [8, 8]  # weights and biases of two convolutions, to and from
    kernels = [t.shape for t in bam.parameters() if t.shape[2:] == (3, 3)]
    assert len(kernels) == 2
    alone = [shapes for func, shapes in calls.seen if func is torch.ops.aten._to_copy.default]
    assert not [shapes for shapes in alone if shapes[0] in kernels]


def _second(module, x, weight):
    (first,) = torch.autograd.grad(module(x).square().mean(), weight, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [x, weight])


def _in_a_batch(module, x, weight):
    dys = torch.linspace(-1, 1, 3 * x.numel(), device=x.device).view(3, *x.shape)
    return torch.autograd.grad(module(x), weight, dys, is_grads_batched=True)


def _frozen(module, x, weight):
    module.requires_grad_(False)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().mean(), weight)
    return (gradient,)


@pytest.mark.parametrize("take", [_second, _in_a_batch, _frozen])
def test_gradients_by_way_of_bams_casts(take, device):
    """In float32 with parameters in float64: casts lose nothing that a tolerance would hide."""
    torch.manual_seed(0)
    fused, plain = attn_kernels.BAM(32), reference.BAM(32)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 32, 6, 6, device=device)
    found = []
    for module in (fused, plain):
        module.to(device, torch.float64)
        weight = next(p for p in module.parameters() if p.shape[2:] == (3, 3))
        found.append(take(module, x.clone().requires_grad_(), weight))
    for got, want in zip(*found, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
