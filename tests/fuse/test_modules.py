"""fuse_ and attention modules: the fused one computes what the original computes, and is it otherwise."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import reference
import reference.models
from attn_kernels import functional, fuse_
from tests.fuse.cases import (
    BUILD,
    LEFT,
    C,
    CbamModule,
    SEModule,
    fused,
    randomized,
    tensor,
    timm,
    without_ties,
)
from tests.harness import judge
from tests.peers import jongchan, moskomule, openmmlab


class TestModules:
    """Each kind of module beside its original."""

    @pytest.mark.parametrize(
        ("training", "dtype", "layout"),
        [
            pytest.param(True, torch.float32, "channels_last", id="training, fp32"),
            pytest.param(False, torch.float32, "contiguous", id="eval, fp32"),
            pytest.param(True, torch.bfloat16, "contiguous", id="training, bf16", marks=pytest.mark.fast),
        ],
    )
    @pytest.mark.parametrize("name", BUILD)
    def test_equals_the_original(self, name, training, dtype, layout, device):
        eager = randomized(BUILD[name]()).to(device, dtype).train(training)
        ours, oracle = fused(copy.deepcopy(eager)), copy.deepcopy(eager).double()
        if "Cl" in name:
            x = tensor(4, 5, 5, C, dtype=dtype).to(device)
        else:
            # BatchNorm of (N, C, 1, 1) over few samples makes several units of one, in eager as well.
            n = 8 if "BAM" in name else 16 if type(getattr(eager, "bn", None)) is nn.BatchNorm2d else 4
            x = tensor(n, C, 5, 5, layout=layout, dtype=dtype).to(device)
            x = without_ties(x) if getattr(eager, "add_maxpool", False) else x
        judge(ours, eager, oracle, x, None, None, torch.randn_like(x))

    @pytest.mark.parametrize("name", BUILD)
    def test_kernels_run(self, name, calls, device, monkeypatch):
        module = fused(BUILD[name]().to(device).eval())
        for form in functional.__all__:
            monkeypatch.setattr(reference, form, None)  # the reference formula would raise
        module(tensor(*((2, 5, 5, C) if "Cl" in name else (2, C, 5, 5))).to(device))
        # Modules of attn_kernels bound the functional forms at import.
        assert len(calls) == (not name.startswith("reference"))

    @pytest.mark.parametrize("name", BUILD)
    def test_state_is_shared(self, name):
        original = BUILD[name]()
        keys, objects = list(original.state_dict()), [*original.parameters(), *original.buffers()]
        holder = nn.Sequential(original)
        report = fuse_(holder)
        ours = holder[0]
        assert list(ours.state_dict()) == keys
        assert [*map(id, (*ours.parameters(), *ours.buffers()))] == [*map(id, objects)]
        ours.eval().half()
        assert not original.training
        assert all(p.dtype == torch.float16 for p in original.parameters())
        report.restore()
        assert holder[0] is original
        report.restore()

    @pytest.mark.parametrize("name", BUILD)
    def test_pickle_and_deepcopy(self, name, device):
        ours = fused(randomized(BUILD[name]()).to(device).eval())
        x = tensor(*((2, 5, 5, C) if "Cl" in name else (2, C, 5, 5))).to(device)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
            assert type(other) is type(ours)
            assert other.state_dict().keys() == ours.state_dict().keys()
            assert not {*map(id, other.parameters())} & {*map(id, ours.parameters())}
            assert torch.equal(other(x), ours(x))

    @pytest.mark.parametrize("name", LEFT)
    def test_left(self, name):
        build, reason = LEFT[name]
        holder = nn.Sequential(build())
        child = holder[0]
        (row,) = fuse_(holder).rows
        assert not row.fused
        assert reason in row.reason
        assert holder[0] is child

    @pytest.mark.parametrize("reduction", [4, C])  # to one hidden channel, which ReLU may stop
    def test_bam_on_a_map_that_is_not_square(self, reduction, device):
        """The published code averages a square part of it: so does the fused module."""
        eager = randomized(jongchan.BAM(C, reduction)).to(device).eval()
        x = tensor(2, C, 3, 5).to(device)
        assert torch.equal(fused(copy.deepcopy(eager))(x), eager(x))

    def test_a_class_of_the_same_name_that_computes_something_else(self, device):
        class SELayer(moskomule.SELayer):
            def forward(self, x):
                return super().forward(x) + x.mean((2, 3), keepdim=True)

        eager = SELayer(C, 4).to(device)
        model = nn.Sequential(copy.deepcopy(eager))
        fuse_(model)  # what SE computes in it may be fused
        x = tensor(2, C, 5, 5).to(device)
        torch.testing.assert_close(model(x), eager(x))

    def test_parts_of_what_is_left(self):
        """What no kernel covers as a whole may hold something that one does."""
        for build, expected in (
            (timm.layers.cbam.LightCbamModule, {"0.channel": "SE, gate by PyTorch"}),
            (
                partial(CbamModule, act_layer=nn.SiLU),
                {"0.channel": "SE, gate by PyTorch", "0.spatial": "CBAM, spatial gate"},
            ),
        ):
            rows = fuse_(nn.Sequential(build(C))).rows
            assert {row.name: row.kind for row in rows if row.fused} == expected

    def test_amax_shares_its_gradient_among_equal_maxima(self, device):
        eager = randomized(CbamModule(C)).to(device)
        model = nn.Sequential(copy.deepcopy(eager))
        fuse_(model)
        x = torch.relu(tensor(2, C, 5, 5).to(device)).round()
        with torch.no_grad():
            assert model[0].is_fused(x)
            eager(x)
        gradients = []
        for module in (eager, model):
            leaf = x.clone().requires_grad_()
            gradients.append(torch.autograd.grad(module(leaf).square().sum(), leaf)[0])
        assert torch.equal(*gradients)

    def test_weights_instead_of_the_map(self):
        module = openmmlab.SELayer(C, 4)
        module.return_weight = True
        (row,) = fuse_(nn.Sequential(openmmlab.SELayer(C, 4), module)).rows[1:]
        assert not row.fused

    def test_random_state_and_buffers_are_untouched(self):
        model = nn.Sequential(CbamModule(C), BUILD["timm SEModule BatchNorm"]())
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        fuse_(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, before.values(), model.state_dict().values()))

    @pytest.mark.parametrize("name", BUILD)
    def test_meta_device(self, name):
        with torch.device("meta"):
            holder = nn.Sequential(BUILD[name]())
        assert fuse_(holder).fused == 1
        assert all(p.is_meta for p in holder.parameters())

    @pytest.mark.parametrize(
        "name",
        ["timm SEModule", "timm SEModule all options", "timm SqueezeExciteCl", "timm CbamModule", "Jongchan BAM",
         "ZjjConan", "OpenMMLab"],
    )  # fmt: skip
    def test_compiles_without_a_graph_break(self, name, device):
        eager = randomized(BUILD[name]()).to(device)
        ours = fused(copy.deepcopy(eager))
        x = tensor(3, C, C, C).to(device).requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        for training in (True, False):
            ours.train(training), eager.train(training)
            y, want = compiled(x), eager(x)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
            dy = torch.randn_like(y)
            got, expected = (torch.autograd.grad(t, x, dy)[0] for t in (y, want))
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)

    def test_export_trace_and_fx_see_the_original(self, device):
        eager = randomized(SEModule(C)).to(device).eval()
        model, x = nn.Sequential(copy.deepcopy(eager)), tensor(2, C, 5, 5).to(device)
        fuse_(model)
        exported = torch.export.export(model, (x,)).module()
        for other in (exported, torch.jit.trace(model, x), torch.fx.symbolic_trace(model)):
            assert torch.equal(other(x), eager(x))
