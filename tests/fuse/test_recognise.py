"""What fuse_ takes for attention and what not: attacks, spellings, and the instrument that looks for more of them."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from attn_kernels import fuse_
from attn_kernels.fuse import check
from attn_kernels.fuse.recognise import recognise
from attn_kernels.fuse.registry import METHODS, PRISTINE_METHODS
from attn_kernels.fuse.terms import Refused, Term, unordered
from tests import soundness
from tests.fuse.attacks import ATTACKS, SE, C
from tests.fuse.cases import BUILD, randomized


@pytest.mark.fast
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    """Refused as a module; what stands on it may be fused as a block only if it is exactly what it was."""
    module = ATTACKS[name]()
    with pytest.raises(Refused):
        recognise(module)
    model = nn.Sequential(copy.deepcopy(module)).double()
    module = module.double()
    fused = fuse_(model).fused
    x = torch.randn(3, C, 5, 4, dtype=torch.float64)
    for training in (True, False) if fused else ():
        results = []
        for m in (module.train(training), model.train(training)):
            torch.manual_seed(0)
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            results += [y, torch.autograd.grad(y.square().sum(), leaf)[0]]
        torch.testing.assert_close(results[:2], results[2:])


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(C, 4), nn.Linear(4, C)])
        self.gate_fn = torch.sigmoid

    def forward(self, x):
        y = x.flatten(2).mean(-1)
        for i, layer in enumerate(self.layers):
            y = layer(y)
            y = torch.relu(y) if i == 0 else y
        return self.gate_fn(y).unsqueeze(-1).unsqueeze(-1) * x


class Optional(SE):
    def forward(self, x, mask=None):
        y = super().forward(x)
        return y if mask is None else y * mask


class ClassOption(SE):
    on = True

    def forward(self, x):
        return super().forward(x) if self.on else x


SPELLINGS = {cls.__name__: cls for cls in (Functional, Loops, Optional, ClassOption)}


@pytest.mark.fast
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    assert recognise(SPELLINGS[name]()).plan.kind == "SE"


@pytest.mark.parametrize("name", [name for name in BUILD if not name.startswith("reference")])
def test_the_check_agrees(name):
    """Beside the module: outputs, gradients and buffers, in training and in evaluation."""
    module = randomized(BUILD[name]())
    assert check.disagreement(module, recognise(module).plan) == ""


def test_operands_have_one_order():
    """It does not depend on which term was made first, so that a module and its copy get one plan and one class."""

    def order(*names):
        terms = {name: Term("mean", Term(name), frozenset("HW")) for name in names}
        return [term.args[0].op for term in unordered("add", *terms.values()).args]

    assert order("a", "b") == order("b", "a")
    plan = recognise(BUILD["Jongchan CBAM all pools"]()).plan
    assert plan.pool_types == ("avg", "max", "lp", "lse")


class TestCheck:
    """It sees what the outputs in evaluation do not show."""

    @pytest.mark.parametrize(
        ("forward", "reason"),
        [
            (lambda m, x: x * m.gate(x.detach()), "has other gradients"),
            (lambda m, x: m(x) * (1 + m.training), "computes other numbers"),
            (lambda m, x: m(x)[:1], "gives another shape"),
            (lambda m, x: x.data.mul_(2) * m.gate(x), "writes to its input"),
            (lambda m, x: m.pool(x).view(3), "could not be checked: RuntimeError"),
        ],
    )
    def test_disagreement(self, forward, reason):
        module = SE()
        assert reason in check.disagreement(module, recognise(module).plan, forward)

    def test_buffers(self):
        module = BUILD["Jongchan SpatialGate"]()
        plan = recognise(module).plan

        def twice(m, x):
            m.spatial(torch.zeros(2, 2, 4, 4, dtype=x.dtype))
            return m(x)

        assert "leaves other buffers" in check.disagreement(module, plan, twice)

    def test_random_state(self):
        states = torch.get_rng_state(), random.getstate()
        module = SE()
        check.disagreement(module, recognise(module).plan)
        torch.manual_seed(3)
        first = torch.rand(1)
        torch.manual_seed(3)
        check.disagreement(module, recognise(module).plan)
        assert torch.equal(first, torch.rand(1))
        assert random.getstate() == states[1]


def test_soundness(tmp_path):
    """A short run; `python -m tests.soundness --minutes M` runs for as long as one likes."""
    counts, faults = soundness.run(minutes=5, seed=0, folder=tmp_path, accepted=120)
    assert counts["fused"] >= 120
    assert faults == []


def test_soundness_finds_faults(tmp_path, monkeypatch):
    """An interpreter that takes detach for nothing, whose check is off."""
    monkeypatch.setitem(METHODS, "detach", lambda run, v: v)
    monkeypatch.setitem(PRISTINE_METHODS, "detach", torch.Tensor.detach)
    monkeypatch.setattr(check, "disagreement", lambda *args: "")
    monkeypatch.setattr(soundness, "STATEMENTS", "x = x.detach()")
    _, faults = soundness.run(minutes=2, seed=0, folder=tmp_path, accepted=60)
    assert any("gradient" in fault for fault in faults)


def test_reference_agrees_with_itself():
    """Modules of reference are known by their class, not by their source."""
    with pytest.raises(Refused):
        recognise(reference.SE(C))
    assert fuse_(nn.Sequential(reference.SE(C))).fused == 1
