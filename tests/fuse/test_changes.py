"""What is done to a model after fuse_ has its effect, and is seen: options, patches, hooks, other layers."""

import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from attn_kernels import explain, fuse_
from tests.fuse.cases import Block, C, SEModule, resnet_block, tensor, timm
from tests.peers import jongchan, moskomule, simam_module


class SE(nn.Module):
    """With everything that can be changed: an option, a list, a function, a class attribute, a method, layers."""

    temperature = 1.0

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(C, 4), nn.Linear(4, C), nn.LeakyReLU(0.01)
        self.gate_fn, self.residual, self.pools = torch.sigmoid, False, ["avg"]

    def squeeze(self, x):
        return sum(x.mean((2, 3)) for _ in self.pools)

    def forward(self, x):
        y = x * self.gate_fn(self.fc2(self.act(self.fc1(self.squeeze(x)))) * self.temperature)[:, :, None, None]
        return y + x if self.residual else y


class Lora(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def patched_method(module):
    module.squeeze = types.MethodType(lambda self, x: x.amax((2, 3)), module)


def patched_class(module):
    cls = getattr(module, "_original", type(module))
    original, cls.forward = cls.forward, lambda self, x: 2 * original(self, x)


def patched_code(module):
    function = type(module).squeeze
    function.__code__ = (lambda self, x: x.amax((2, 3))).__code__


def replaced_child(module):
    torch.manual_seed(1)
    module.fc1 = Lora(module.fc1)


def hooked(module):
    module.fc1.register_forward_hook(lambda m, x, y: 2 * y)


CHANGES = {
    "an option": lambda m: setattr(m, "residual", True),
    "a list in place": lambda m: m.pools.append("avg"),
    "a function": lambda m: setattr(m, "gate_fn", torch.tanh),
    "an option of a layer": lambda m: setattr(m.act, "negative_slope", 0.5),
    "a class attribute": lambda m: setattr(type(m), "temperature", 3.0),
    "a class attribute on the instance": lambda m: setattr(m, "temperature", 3.0),
    "a method of the instance": patched_method,
    "a forward of the class": patched_class,
    "a function's code": patched_code,
    "a forward of a layer": lambda m: setattr(m.fc1, "forward", lambda x: 2 * F.linear(x, m.fc1.weight)),
    "LoRA": replaced_child,
    "a hook": hooked,
    "a hook before": lambda m: m.fc2.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "pruning": lambda m: prune.l1_unstructured(m.fc1, "weight", 0.5),
    "weight_norm": lambda m: parametrizations.weight_norm(m.fc1) and m.fc1.parametrizations.weight[0],
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m.fc2) and None,
    "no bias": lambda m: setattr(m.fc1, "bias", None),
    "another activation": lambda m: setattr(m, "act", nn.ReLU6()),
    "dropout in place of an activation": lambda m: setattr(m, "act", nn.Dropout(1.0)),
}


@pytest.fixture
def classes():
    """A class of its own per test, since some change it: from the same source."""
    return lambda: type("SE", (SE,), {"forward": _copy(SE.forward), "squeeze": _copy(SE.squeeze)})


def _copy(function):
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


@pytest.mark.fast
@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_module(change, classes, device):
    cls = classes()
    eager = cls().to(device)
    model = nn.Sequential(copy.deepcopy(eager))
    assert fuse_(model).fused == 1
    x = tensor(3, C, 5, 4).to(device)
    assert model[0].is_fused(x)
    with torch.random.fork_rng(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        CHANGES[change](model[0])
        y = model(x)
        model(x)
        assert not model[0].is_fused(x)
        if change not in ("a forward of the class", "a function's code"):  # which are shared
            torch.manual_seed(0)
            CHANGES[change](eager)
        torch.testing.assert_close(y, eager(x))
    ours = [w for w in caught if "runs its own forward" in str(w.message)]
    assert len(ours) == 1
    assert explain(model[0], x).reasons


@pytest.mark.fast
@pytest.mark.parametrize("change", ["conv", "_scale", "forward", "drop", "relu"])
def test_change_of_a_block(change, device):
    class Scaled(Block):
        def __init__(self, gate):
            super().__init__(gate)
            self._scale = 1.0

        def forward(self, x):
            return super().forward(x) * self._scale

    eager = Scaled(moskomule.SELayer(C, 4)).to(device).eval()
    model = nn.Sequential(copy.deepcopy(eager))
    assert fuse_(model).rows[0].epilogue
    x = tensor(2, C, 5, 4).to(device)
    torch.testing.assert_close(model(x), eager(x))
    for block in (model[0], eager):
        torch.manual_seed(0)
        if change == "conv":  # called as it is, whatever it is
            block.conv = nn.Conv2d(C, C, 1).to(device)
        elif change == "_scale":
            block._scale = 3.0
        elif change == "drop":
            block.drop_path = nn.Hardtanh()
        elif change == "relu":
            block.act.inplace = False
        elif block is eager:
            Scaled.forward = lambda self, x: self.gate(x)
    torch.testing.assert_close(model(x), eager(x))
    assert model[0].is_fused(x) == (change == "conv")


def test_no_spatial(device):
    """An ablation that is made after fuse_."""
    eager = jongchan.CBAM(C, 4).to(device).eval()
    model = nn.Sequential(copy.deepcopy(eager))
    fuse_(model)
    model[0].no_spatial = eager.no_spatial = True
    x = tensor(2, C, 5, 4).to(device)
    assert torch.equal(model(x), eager(x))


def test_lambda_of_simam(device):
    eager = simam_module().to(device)
    model = nn.Sequential(copy.deepcopy(eager))
    fuse_(model)
    model[0].e_lambda = eager.e_lambda = 1.0
    x = tensor(2, C, 5, 4).to(device)
    torch.testing.assert_close(model(x), eager(x))


@pytest.mark.parametrize("function", ["linear", "relu", "sigmoid"])
def test_functions_of_pytorch(function, monkeypatch, device):
    """Patched everywhere, before and after."""
    eager = moskomule.SELayer(C, 4).to(device)
    model = nn.Sequential(copy.deepcopy(eager))
    fuse_(model)
    module = torch if function == "sigmoid" else F
    original = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args, **kwargs: 0.5 * original(*args, **kwargs))
    x = tensor(2, C, 5, 4).to(device)
    torch.testing.assert_close(model(x), eager(x))
    assert f"another {function} than PyTorch's" in fuse_(nn.Sequential(eager)).rows[0].reason


class TestCompiled:
    """Under torch.compile."""

    def changed(self, model, change, x):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x)
        change(model)
        return compiled(x)

    @pytest.mark.parametrize("change", ["an option", "a list in place", "a function", "a class attribute", "LoRA"])
    def test_change_of_a_module(self, change, classes, device):
        eager = classes()().to(device)
        model = nn.Sequential(copy.deepcopy(eager))
        fuse_(model)
        x = tensor(3, C, 5, 4).to(device)
        y = self.changed(model, lambda m: CHANGES[change](m[0]), x)
        torch.testing.assert_close(y, nn.Sequential.forward(model, x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y, moved(eager, x), atol=1e-5) or change == "a class attribute"

    def test_one_graph_for_modules_that_are_alike(self, device):
        """Blocks of one shape share a graph, as they did before."""
        counts = []
        for fuse in (False, True):
            blocks = [resnet_block(timm.models.resnet.BasicBlock, "se", False).to(device).eval() for _ in range(3)]
            model = nn.Sequential(*blocks)
            if fuse:
                assert all(row.epilogue for row in fuse_(model).rows)
                assert len({type(block) for block in model}) == 1
            torch._dynamo.reset()
            graphs = []
            compiled = torch.compile(lambda b, x: b(x), backend=lambda g, _, graphs=graphs: graphs.append(g) or g)
            x = tensor(2, C, 5, 4).to(device)
            with torch.no_grad():
                for block in model:
                    compiled(block, x)
            counts.append(len(graphs))
        assert counts[1] <= counts[0]


def moved(eager: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return eager(x)


class TestStaysFused:
    """What does not change the formula leaves a module fused."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.double().float(),
            lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
            lambda m: m.requires_grad_(False),
            lambda m: m.train(),
            lambda m: m.apply(lambda child: None),
            lambda m: copy.deepcopy(m),
        ],
        ids=["dtype", "assign", "frozen", "train", "apply", "copy"],
    )
    def test_module_and_block(self, change, device):
        block = resnet_block(timm.models.resnet.BasicBlock, "se", False)
        model = nn.Sequential(SEModule(C), jongchan.CBAM(C, 4), block).to(device).eval()
        fuse_(model)
        changed = change(model)
        model = changed if isinstance(changed, nn.Module) else model
        x = tensor(2, C, 5, 4).to(device)
        assert [m.is_fused(x) for m in (*model, model[2].se)] == [True] * 4

    def test_under_ddp(self, device, tmp_path):
        block = resnet_block(timm.models.resnet.BasicBlock, "se", False)
        model = nn.Sequential(SEModule(C), block).to(device)
        eager = copy.deepcopy(model)
        fuse_(model)
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            x = tensor(2, C, 5, 4).to(device)
            assert [m.is_fused(x) for m in (*model, model[1].se)] == [True] * 3
            for module in (parallel, eager):
                module(x).square().sum().backward()
        finally:
            torch.distributed.destroy_process_group()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
