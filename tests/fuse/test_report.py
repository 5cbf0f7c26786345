"""The report of fuse_, how it is undone, and what users can teach it."""

import copy

import pytest
import torch
from torch import nn

import attn_kernels
import reference
import reference.models
from attn_kernels import fuse_, register_adapter
from attn_kernels import models as fused_models
from attn_kernels.fuse import Unsupported
from attn_kernels.fuse.adapters import ADAPTERS
from attn_kernels.fuse.modules import FusedBlock, FusedModule
from attn_kernels.fuse.plans import SEPlan
from tests.fuse.cases import (
    Block,
    C,
    SEModule,
    fused,
    randomized,
    tensor,
    timm,
)
from tests.harness import judge
from tests.peers import moskomule


@pytest.mark.fast
class TestReport:
    def model(self) -> nn.Module:
        return nn.Sequential(Block(moskomule.SELayer(C, 4)), timm.layers.GlobalContext(C), nn.ReLU(), SEModule(C))

    def test_rows(self):
        model = self.model()
        report = fuse_(model)
        assert [row.name for row in report.rows] == ["0.gate", "1", "3"]
        assert [row.cls for row in report.rows] == ["SELayer", "GlobalContext", "SEModule"]
        assert (report.fused, report.left) == (2, 1)
        lines = str(report).splitlines()
        assert lines[0].split() == ["module", "class", "kind", "fused", "reason"]
        assert "SE + add + ReLU" in lines[1]
        assert lines[4] == "2 fused, 1 left"
        assert lines[5].startswith("What is left runs as before; register_adapter")

    def test_twice(self):
        model = self.model()
        fuse_(model)
        children = list(model.children())
        again = fuse_(model)
        assert [row.reason for row in again.rows] == ["already fused", again.rows[1].reason, "already fused"]
        assert again.fused == 0
        again.restore()
        assert all(map(lambda a, b: a is b, model.children(), children))

    @pytest.mark.parametrize("attention", ["se", "cbam"])
    def test_networks_of_ours_are_fused_already(self, attention):
        report = fuse_(nn.Sequential(fused_models.resnet(18, attention, 5)))
        assert {row.reason for row in report.rows} == {"already fused"}

    def test_nothing_to_fuse(self):
        report = fuse_(nn.Sequential(nn.ReLU()))
        assert report.rows == []
        assert str(report).startswith(
            "0 fused, 0 left\nNothing to fuse was found: looked for SE, ECA, CBAM, BAM and SimAM"
        )

    def test_restores_the_identical_objects(self):
        model = self.model()
        modules = {name: id(m) for name, m in model.named_modules()}
        with fuse_(model) as report:
            assert isinstance(model[3], FusedModule)
            assert isinstance(model[0], FusedBlock)
            model.eval()
        assert {name: id(m) for name, m in model.named_modules()} == modules
        assert not any(m.training for m in model.modules())
        report.restore()

    def test_restores_nothing_that_was_replaced_since(self):
        model = self.model()
        with fuse_(model):
            model[3] = other = nn.Identity()
        assert model[3] is other

    def test_a_module_in_two_places(self):
        shared, block = SEModule(C), Block(moskomule.SELayer(C, 4))
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, block), "c": block})
        report = fuse_(model)
        assert model["a"] is model["b"][0]
        assert model["c"] is model["b"][1]
        assert isinstance(model["c"], FusedBlock)
        report.restore()
        assert model["a"] is model["b"][0] is shared
        assert model["c"] is model["b"][1] is block

    def test_filter(self):
        model, seen = self.model(), []
        report = fuse_(model, lambda module, name: seen.append((type(module).__name__, name)) or name != "3")
        assert ("SELayer", "0.gate") in seen
        assert [row.fused for row in report.rows] == [True, False, False]
        assert report.rows[2].reason == "filter_fn"

    def test_bad_arguments(self):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
            fuse_(3)
        with pytest.raises(TypeError, match=r"filter_fn: expected a function .*, got str"):
            fuse_(self.model(), "se")
        with pytest.raises(TypeError, match="exact_ties: expected a bool, got int"):
            fuse_(self.model(), exact_ties=1)
        for module in (SEModule(C), reference.CBAM(C), attn_kernels.SE(C)):
            with pytest.raises(ValueError, match=rf"got one itself, {type(module).__name__}; wrap it"):
                fuse_(module)

    def test_hooks_and_forwards_that_are_there_already(self):
        hooked, replaced = SEModule(C), SEModule(C)
        hooked.fc1.register_forward_hook(lambda *_: None)
        replaced.forward = lambda x: x
        report = fuse_(nn.Sequential(hooked, replaced))
        assert [row.reason for row in report.rows] == ["has hooks on fc1", "has another forward in it than its class's"]


class MySE(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(C, 4), nn.Linear(4, C)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


@pytest.mark.fast
class TestRegister:
    @pytest.fixture(autouse=True)
    def registry(self, monkeypatch):
        monkeypatch.setattr("attn_kernels.fuse.adapters.ADAPTERS", ADAPTERS.copy())
        monkeypatch.setattr("attn_kernels.fuse.adapters.ADAPTERS", ADAPTERS)
        before = dict(ADAPTERS)
        yield
        ADAPTERS.clear()
        ADAPTERS.update(before)

    def test_a_users_adapter(self, device):
        register_adapter("MySE", lambda module: SEPlan(fc1=("down",), fc2=("up",)))
        eager = randomized(MySE()).to(device)
        x = tensor(4, C, 5, 5).to(device)
        judge(fused(copy.deepcopy(eager)), eager, copy.deepcopy(eager).double(), x, None, None, torch.randn_like(x))

    def test_a_wrong_one(self):
        @register_adapter("MySE")
        def wrong(module):
            return SEPlan(fc1=("down",), fc2=("up",), gate="hardsigmoid")

        assert "computes other numbers" in fuse_(nn.Sequential(MySE())).rows[0].reason

    def test_one_that_declines(self):
        def declines(module):
            raise Unsupported("not today")

        register_adapter("SEModule", declines)
        assert fuse_(nn.Sequential(SEModule(C))).rows[0].reason == "not today"
        register_adapter("SEModule", lambda module: None)  # it is read, then
        assert fuse_(nn.Sequential(SEModule(C))).fused == 1

    def test_bad_arguments(self):
        with pytest.raises(TypeError, match="name: expected the name of a class, got 3"):
            register_adapter(3)
        with pytest.raises(TypeError, match="adapter: expected a function of a module, got str"):
            register_adapter("SE", "no")
