"""Python and PyTorch as the interpreter has them: what a careless one would read wrong, and what changes later."""

import copy
import types
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attn_kernels
from attn_kernels import fuse_
from tests import soundness
from tests.fuse.cases import C, fused, randomized


class SE(nn.Module):
    """SE by two layers, its gate by methods that can be varied."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, 4), nn.Linear(4, C)

    def act(self, y):
        return F.relu(y)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(x.mean((2, 3))))))[:, :, None, None]


class ListIsNoTuple(SE):
    def __init__(self):
        super().__init__()
        self.pools = ["avg"]

    def act(self, y):
        return F.relu6(y) if self.pools == ["avg"] else F.relu(y)


class PartialPool(SE):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d((3, 1))

    def forward(self, x):
        pooled = self.pool(x.mean(3, keepdim=True))
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(pooled[:, :, :1].flatten(1)))))[:, :, None, None]


class NormOfOne(SE):
    def forward(self, x):
        m = F.adaptive_max_pool2d(x, 1)
        m = F.lp_pool2d(m, 2, (m.size(2), m.size(3))).flatten(1)
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(m))))[:, :, None, None]


class Bounds(SE):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6()
        self.relu.max_val = 0.3

    def act(self, y):
        return self.relu(y)


class LateLambda(SE):
    def act(self, y):
        y = F.relu(y)
        functions = [lambda: y for _ in range(1)]
        y = F.relu6(10 * y) / 10
        return functions[0]()


class LazyGenerator(SE):
    def forward(self, x):
        pools = [x.mean((2, 3))]
        gates = (self.fc2(F.relu(self.fc1(p))) for p in pools)
        pools.append(x.amax((2, 3)))
        return x * torch.sigmoid(sum(gates))[:, :, None, None]


class Mangled(SE):
    def __init__(self):
        super().__init__()
        self.__scale = 3.0
        setattr(self, "__scale", 1.0)

    def act(self, y):
        return F.relu(y) * self.__scale


class Mix:
    def __getattribute__(self, name):
        return F.relu6 if name == "function" else super().__getattribute__(name)


class MixedIn(nn.Module, Mix):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.function = nn.Linear(C, 4), nn.Linear(4, C), F.relu

    def forward(self, x):
        y = 10 * self.fc1(x.mean((2, 3)))
        return x * torch.sigmoid(self.fc2(self.function(y)))[:, :, None, None]


class OpenGate(SE):
    """The gradient of a clamp is not 0 at its bounds."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, 3.0)

    def forward(self, x):
        y = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
        return x * ((y + 3) / 6).clamp(0, 1)[:, :, None, None]


class Mid(SE):
    pass


class OverMid(Mid):
    def act(self, y):
        return super().act(y)


class InPlaceBehindItself(nn.Module):
    """The shortcut writes to what attention reads, by way of a module that returns its argument."""

    class Maybe(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    class Doubles(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.se = nn.Conv2d(C, C, 1), nn.ReLU(inplace=True), SE()
        self.maybe, self.down = self.Maybe(), self.Doubles()

    def forward(self, x):
        x = self.conv(x)
        z = self.se(self.act(self.maybe(x)))
        return F.relu(z + self.down(x))


class Infinity(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.se, self.limit = nn.Conv2d(C, C, 1), SE(), float("inf")

    def forward(self, x):
        return F.relu(self.se(self.conv(x).clamp(max=self.limit)) + x)


class Verbatim(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(C, C, 1), SE()

    def forward(self, x):
        y = F.dropout(self.conv(x), 0.5, self.training)
        y = F.interpolate(F.pad(y, (0, 0)), scale_factor=1.0)
        return F.relu(self.se(y) + sum([x, x]))


class TwoModes(nn.Module):
    """Random numbers in a fixed order."""

    def __init__(self):
        super().__init__()
        self.conv, self.se, self.drop = nn.Conv2d(C, C, 1), SE(), nn.Dropout(0.5)

    def forward(self, x):
        y = self.se(self.conv(x))
        s = self.drop(x)
        return F.relu(y + s)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(C, C, 1), SE()

    def forward(self, x):
        return F.relu(self.se(x=self.conv(input=x)) + x)


class TakenNames(SE):
    def __init__(self):
        super().__init__()
        self.is_fused, self._plan = False, nn.Linear(1, 1)


MODULES = {
    cls.__name__: cls
    for cls in (
        *(
            ListIsNoTuple,
            PartialPool,
            NormOfOne,
            Bounds,
            LateLambda,
            LazyGenerator,
            Mangled,
            MixedIn,
            OpenGate,
            OverMid,
        ),
        *(InPlaceBehindItself, Infinity, Verbatim, TwoModes, Keywords, TakenNames),
    )
}


def compare(eager: nn.Module, model: nn.Module) -> None:
    with soundness.references():
        for training in (True, False):
            for scale in (1.0, 10.0):
                x = scale * torch.randn(3, C, 5, 4, dtype=torch.float64)
                results = []
                for module in (eager.train(training), model.train(training)):
                    torch.manual_seed(0)
                    leaf = x.clone().requires_grad_()
                    y = module(leaf)
                    gradients = ()
                    if not isinstance(eager, InPlaceBehindItself):  # which has none in eager either
                        inputs = [leaf, *module.parameters()]
                        gradients = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
                    results.append((y, *gradients))
                for ours, theirs in zip(*results, strict=True):
                    torch.testing.assert_close(ours, theirs)


@pytest.mark.fast
@pytest.mark.parametrize("name", MODULES)
def test_fused_or_not_it_is_the_same(name):
    eager = MODULES[name]().double()
    model = nn.Sequential(copy.deepcopy(eager))
    fuse_(model)
    compare(eager, model)


def attribute(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda m: setattr(m, name, value)


class Helper(nn.Module):
    scale = 1.0

    def squeeze(self, x):
        return x.mean((2, 3))


class OtherHelper(Helper):
    scale = 3.0


class Helped(SE):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        y = self.fc2(self.act(self.fc1(self.helper.squeeze(x) * self.helper.scale)))
        return x * torch.sigmoid(y)[:, :, None, None]


class Optional(SE):
    def act(self, y):
        mask = getattr(self, "mask", None)
        return F.relu(y) if mask is None else F.relu(y) * mask


class Ordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


def reorder(m: nn.Module) -> None:
    layer = m.fc._modules.pop("1")
    m.fc.add_module("1", layer)


def over_mid(m: nn.Module) -> None:
    Mid.act = lambda self, y: F.relu(3 * y)


class BAM(nn.Module):
    """Its branches are called layer by layer: what is added to them has no effect."""

    def __init__(self):
        super().__init__()
        self.c = nn.Sequential(nn.Linear(C, 4), nn.ReLU(), nn.Linear(4, C))
        self.s = nn.Sequential(nn.Conv2d(C, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, x):
        c = self.c[2](self.c[1](self.c[0](x.mean((2, 3)))))[:, :, None, None]
        return x * (1 + torch.sigmoid(c * self.s(x)))


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def patched_convolution(m: nn.Module) -> None:
    m.fc1._conv_forward = types.MethodType(lambda self, x, w, b: 3 * F.conv2d(x, w, b), m.fc1)


LATER: dict[str, tuple[type[nn.Module], Callable[[nn.Module], None]]] = {
    "a child of which a method is read": (Helped, lambda m: setattr(m, "helper", OtherHelper())),
    "a buffer that was missing": (Optional, lambda m: m.register_buffer("mask", torch.zeros(4))),
    "a parameter that was missing": (Optional, lambda m: m.register_parameter("mask", nn.Parameter(torch.ones(4)))),
    "the order of a Sequential": (Ordered, reorder),
    "a layer added to a branch": (BAM, lambda m: m.c.add_module("x", nn.Tanh())),
    "a convolution's inner forward": (Convolved, patched_convolution),
    "a parameter that broadcasts": (SE, lambda m: setattr(m.fc1, "bias", nn.Parameter(torch.ones(1)))),
    "bounds of a layer": (Bounds, lambda m: setattr(m.relu, "max_val", 5.0)),
    "dropout in a gate behind which a block drops": (TwoModes, lambda m: setattr(m.se, "fc1", _drops())),
    "a class in between": (OverMid, over_mid),
}


def _drops() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(C, 4), nn.Dropout(0.5))


@pytest.mark.fast
@pytest.mark.parametrize("name", LATER)
def test_later(name, monkeypatch):
    monkeypatch.setattr(Mid, "act", SE.act, raising=False)
    monkeypatch.delattr(Mid, "act")
    cls, change = LATER[name]
    eager = cls().double()
    model = nn.Sequential(copy.deepcopy(eager))
    fuse_(model)
    compare(eager, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (eager, model[0]):
            change(module)
            module.double()
        compare(eager, model)


@pytest.mark.parametrize(("owner", "name"), [(torch.Tensor, "mean"), (nn.ReLU, "forward"), (F, "relu")])
def test_patched_before(owner, name, monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.se, self.relu = nn.Conv2d(C, C, 1), SE(), nn.ReLU()

        def forward(self, x):
            return self.relu(self.se(self.conv(x)) + x)

    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 2 * original(*args, **kwargs))
    eager = Block().double()
    model = nn.Sequential(copy.deepcopy(eager))
    fuse_(model)
    x = torch.randn(2, C, 5, 4, dtype=torch.float64)
    with soundness.references():
        torch.testing.assert_close(model(x), eager(x))


def test_subclass_of_ours_with_a_forward_of_its_own(device):
    class Mine(attn_kernels.SE):
        def forward(self, x):
            return 2 * super().forward(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.se = nn.Conv2d(C, C, 1), Mine(C, 4)

        def forward(self, x):
            return F.relu(self.se(self.conv(x)) + x)

    eager = Block().to(device)
    model = nn.Sequential(copy.deepcopy(eager))
    fuse_(model)
    x = torch.randn(2, C, 5, 4, device=device)
    torch.testing.assert_close(model(x), eager(x))


@pytest.mark.fast
class TestNoHang:
    """What is too long is left, soon."""

    def left(self, cls):
        assert fuse_(nn.Sequential(cls())).fused == 0

    def test_long_chain(self):
        class Chain(SE):
            def act(self, y):
                for _ in range(99):
                    for _ in range(20):
                        y = y * 0.999
                return y

        self.left(Chain)

    def test_branching(self):
        class Residual(SE):
            def act(self, y):
                for _ in range(60):
                    y = y + torch.tanh(y)
                return y

        randomized(Residual())
        fuse_(nn.Sequential(Residual()))

    def test_nested_loops(self):
        class Loops(SE):
            def act(self, y):
                for _ in range(99):
                    for _ in range(99):
                        for _ in range(99):
                            pass
                return F.relu(y)

        self.left(Loops)

    def test_class_that_cannot_be_subclassed(self):
        class Base(nn.Module):
            def __init_subclass__(cls, *, key, **kwargs):
                super().__init_subclass__(**kwargs)

        class Mine(Base, SE, key=1):
            pass

        self.left(Mine)

    def test_constructor_with_arguments(self):
        class Mine(SE):
            def __new__(cls, planes):
                return super().__new__(cls)

            def __init__(self, planes):
                super().__init__()

        assert isinstance(fused(Mine(3)), Mine)


def test_compiled_on_its_own():
    module = SE()
    module.compile(backend="eager")
    assert "was compiled by itself" in fuse_(nn.Sequential(module)).rows[0].reason
    model = nn.Sequential(SE())
    with fuse_(model):
        model[0].compile(backend="eager")
    assert model[0]._compiled_call_impl is None
