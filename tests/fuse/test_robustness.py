"""fuse_ leaves a model as it was when something goes wrong, works on models without numbers, and is undone anywhere."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_kernels
import reference
from attn_kernels import fuse_, register_adapter, unfuse_
from attn_kernels.fuse.adapters import ADAPTERS
from attn_kernels.fuse.modules import Fused
from tests.fuse.cases import BLOCKS, BUILD, Block, C, SEModule, fused, randomized, tensor, timm
from tests.peers import jongchan, moskomule


def network() -> nn.Module:
    return nn.Sequential(
        SEModule(C), Block(moskomule.SELayer(C, 4)), jongchan.CBAM(C, 4), reference.SE(C, 4), BLOCKS["the seed's"]()
    )


def objects(model: nn.Module) -> list:
    return [(name, id(m), dict(vars(m))) for name, m in model.named_modules()]


@pytest.mark.fast
class TestNothingHalfDone:
    @pytest.mark.parametrize("at", range(4))
    def test_filter_that_raises(self, at):
        model, calls = network(), []
        before = objects(model)

        def filter_fn(module, name):
            calls.append(name)
            if len(calls) > at:
                raise KeyError(name)
            return True

        with pytest.raises(KeyError):
            fuse_(model, filter_fn)
        assert objects(model) == before

    def test_adapter_that_raises(self, monkeypatch):
        monkeypatch.setattr("attn_kernels.fuse.adapters.ADAPTERS", dict(ADAPTERS))

        def adapter(module):
            raise KeyError("path")

        monkeypatch.setitem(ADAPTERS, "CBAM", adapter)
        register_adapter("CBAM", adapter)
        model = network()
        before = objects(model)
        try:
            fuse_(model)
        except KeyError:
            assert objects(model) == before

    def test_nothing_is_touched(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        versions = [t._version for t in (*model.parameters(), *model.buffers())]
        state = torch.get_rng_state()
        fuse_(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
        assert all(map(torch.equal, before.values(), model.state_dict().values()))


class TestModelsWithoutNumbers:
    def test_fake_tensors(self):
        with FakeTensorMode():
            model = network()
            assert fuse_(model).fused == 5
            y = model[0](torch.randn(2, C, 5, 5))
        assert y.shape == (2, C, 5, 5)

    def test_under_other_modes(self):
        with torch.inference_mode(), torch.device("meta"):
            model = network()
            assert fuse_(model).fused == 5

    @pytest.mark.parametrize("shape", [(2, C, 0, 4), (0, C, 5, 5), (2, C, 4, 0)])
    def test_empty_map(self, shape):
        eager = SEModule(C)
        assert fused(copy.deepcopy(eager))(torch.randn(shape)).shape == eager(torch.randn(shape)).shape

    def test_other_shapes_raise_what_they_raised(self):
        eager = SEModule(C).eval()
        for x in (torch.randn(2, C + 1, 5, 5), torch.randn(2, C), torch.ones(2, C, 5, 5, dtype=torch.int64)):
            errors = []
            for module in (eager, fused(copy.deepcopy(eager))):
                with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is
                    module(x)
                errors.append((error.type, str(error.value)))
            assert errors[0] == errors[1]


class TestUnfuse:
    def test_without_the_report(self):
        model = network()
        kinds = [type(m) for m in model.modules()]
        parameters = [id(p) for p in model.parameters()]
        fuse_(model)
        assert any(isinstance(m, Fused) for m in model.modules())
        assert unfuse_(model) is model
        assert [type(m) for m in model.modules()] == kinds
        assert [id(p) for p in model.parameters()] == parameters
        assert unfuse_(model) is model

    def test_of_a_copy(self):
        model = network()
        kinds = [type(m) for m in model.modules()]
        fuse_(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in unfuse_(other).modules()] == kinds

    def test_bad_argument(self):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
            unfuse_(3)

    def test_own_modules_stay(self):
        model = nn.Sequential(attn_kernels.SE(C))
        assert type(unfuse_(model)[0]) is attn_kernels.SE


class TestFx:
    @pytest.mark.parametrize("build", [network, lambda: timm.create_model("seresnet18", num_classes=2)])
    def test_node_names(self, build):
        model = build().eval()
        before = [node.name for node in fx.symbolic_trace(model).graph.nodes]
        fuse_(model)
        assert [node.name for node in fx.symbolic_trace(model).graph.nodes] == before

    @pytest.mark.parametrize("package", [reference, attn_kernels])
    @pytest.mark.parametrize("name", ["SE", "CBAM", "BAM", "SimAM", "ChannelGate", "SpatialGate"])
    def test_own_modules_are_leaves(self, package, name, device):
        module = getattr(package, name)(*(() if name == "SpatialGate" else (C,))).to(device).eval()
        model = nn.Sequential(module)
        traced = fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]
        x = tensor(2, C, 5, 5).to(device)
        assert torch.equal(traced(x), model(x))

    def test_script(self):
        with pytest.raises(TypeError, match=r"torch.jit.script cannot read attn_kernels.SE: use torch.compile"):
            torch.jit.script(nn.Sequential(attn_kernels.SE(C)))
        model = nn.Sequential(SEModule(C))
        fuse_(model)
        with pytest.raises(TypeError, match=r"a fused SEModule: call unfuse_\(model\) or report"):
            torch.jit.script(model)
        torch.jit.script(unfuse_(model))


@pytest.mark.parametrize("name", ["timm SEModule", "Jongchan CBAM", "Jongchan BAM"])
def test_replicas_of_data_parallel(name):
    """Their parameters are no parameters: they run the original forward."""
    eager = randomized(BUILD[name]()).eval()
    ours = fused(copy.deepcopy(eager))
    x = tensor(2, C, 5, 5)
    replica = ours._replicate_for_data_parallel()
    replicas = {id(m): m._replicate_for_data_parallel() for m in ours.modules()}
    for m in ours.modules():
        twin = replicas[id(m)]
        for key, child in m._modules.items():
            twin._modules[key] = None if child is None else replicas[id(child)]
        for key, p in m._parameters.items():
            setattr(twin, key, None if p is None else p.detach().clone())
    replica = replicas[id(ours)]
    with pytest.warns(RuntimeWarning, match="runs its own forward"):
        torch.testing.assert_close(replica(x), eager(x))
