"""fuse_: what it replaces, that nothing but the computation changes, and that everything can be undone."""

import copy
import io
import itertools
import pickle
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import nn

import attn_kernels
import reference
import reference.models
from attn_kernels import functional, fuse_, register_adapter
from attn_kernels import models as fused_models
from attn_kernels._adapters import ADAPTERS
from attn_kernels._fused import FusedModule
from attn_kernels._tail import FusedBlock
from attn_kernels.fuse import Unsupported
from attn_kernels.plans import SEPlan
from tests.harness import LAYOUTS, judge
from tests.peers import RegNetSELayer, cadene, jongchan, moskomule, openmmlab, seed, simam_module

if not torch.cuda.is_available():  # beside a CPU build of torch, torchvision's compiled operators do not register
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
import timm.layers
import timm.models._efficientnet_blocks
import timm.models.resnet
import timm.models.senet
from timm.layers import EffectiveSEModule, SEModule
from timm.layers.cbam import CbamModule, LightCbamModule
from timm.layers.squeeze_excite import SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from torchvision.ops import SqueezeExcitation

C = 16
# The configurations of every module that timm's and torchvision's networks hold (benchmarks/results/coverage.csv), and
# the options and the other libraries' modules that fuse_ knows.
BUILD: dict[str, Callable[[], nn.Module]] = {
    "timm SEModule": partial(SEModule, C, 1 / 4),
    "timm SEModule SiLU": partial(SEModule, C, 1 / 4, act_layer=nn.SiLU),
    "timm SEModule GELU, no bias": partial(SEModule, C, 1 / 4, act_layer=nn.GELU, bias=False),
    "timm SEModule timm's GELU": partial(SEModule, C, 1 / 4, act_layer=timm.layers.GELU, bias=False),
    "timm SEModule LeakyReLU": partial(SEModule, C, 1 / 4, act_layer=partial(nn.LeakyReLU, negative_slope=0.01)),
    "timm SEModule hard sigmoid": partial(SEModule, C, 1 / 4, gate_layer="hard_sigmoid"),
    "timm SEModule BatchNorm": partial(SEModule, C, 1 / 4, norm_layer=nn.BatchNorm2d),
    "timm SEModule add_maxpool": partial(SEModule, C, 1 / 4, add_maxpool=True),
    "timm SEModule all options": partial(
        SEModule, C, 1 / 4, add_maxpool=True, norm_layer=nn.BatchNorm2d, act_layer=nn.Tanh, gate_layer="hard_sigmoid"
    ),
    "timm SqueezeExcite SiLU": partial(SqueezeExcite, C, act_layer=nn.SiLU),
    "timm SqueezeExcite ReLU": partial(SqueezeExcite, C),
    "timm SqueezeExcite hard sigmoid": partial(SqueezeExcite, C, gate_layer="hard_sigmoid"),
    "timm SqueezeExcite Hardswish": partial(SqueezeExcite, C, act_layer=nn.Hardswish, gate_layer="hard_sigmoid"),
    "timm senet SEModule": partial(timm.models.senet.SEModule, C, 4),
    "timm EffectiveSEModule": partial(EffectiveSEModule, C),
    "timm EffectiveSEModule add_maxpool": partial(EffectiveSEModule, C, add_maxpool=True, gate_layer="sigmoid"),
    "timm SqueezeExciteCl": partial(SqueezeExciteCl, C, 1 / 4),
    "timm CbamModule": partial(CbamModule, C, 1 / 4),
    "timm CbamModule bias, 5x5": partial(CbamModule, C, 1 / 4, mlp_bias=True, spatial_kernel_size=5),
    "torchvision SiLU": partial(SqueezeExcitation, C, 4, activation=partial(nn.SiLU, inplace=True)),
    "torchvision ReLU": partial(SqueezeExcitation, C, 4),
    "torchvision hard sigmoid": partial(SqueezeExcitation, C, 4, scale_activation=nn.Hardsigmoid),
    "Jongchan CBAM": partial(jongchan.CBAM, C, 4),
    "Jongchan CBAM all pools": partial(jongchan.CBAM, C, 4, ["lse", "avg", "max", "lp"]),
    "Jongchan CBAM no_spatial": partial(jongchan.CBAM, C, 4, no_spatial=True),
    "Jongchan ChannelGate": partial(jongchan.ChannelGate, C, 4),
    "Jongchan SpatialGate": jongchan.SpatialGate,
    "Jongchan BAM": partial(jongchan.BAM, C, 4),
    "ZjjConan": partial(simam_module, e_lambda=0.1),
    "moskomule": partial(moskomule.SELayer, C, 4),
    "Cadene": partial(cadene.SEModule, C, 4),
    "OpenMMLab": partial(openmmlab.SELayer, C, 4),
    "OpenMMLab HSigmoid": partial(openmmlab.SELayer, C, 4, openmmlab.HSigmoid()),
    "HF RegNet": partial(RegNetSELayer, C, 4),
    "reference SE": partial(reference.SE, C, 4, activation="silu"),
    "reference BAM": partial(reference.BAM, C, 4),
    "reference CBAM": partial(reference.CBAM, C, 4),
    "reference SimAM": reference.SimAM,
}
LEFT = {
    "LightCbamModule": (partial(LightCbamModule, C), "no kernel"),
    "CbamModule SiLU": (partial(CbamModule, C, act_layer=nn.SiLU), "channel.act is SiLU"),
    "CbamModule hard sigmoid": (partial(CbamModule, C, gate_layer="hard_sigmoid"), "gate is Hardsigmoid"),
    "norm inside ConvModule": (partial(openmmlab.SELayer, C, 4, norm=True), "another layer between, conv1.bn"),
    "pool twice": (partial(jongchan.CBAM, C, 4, ["avg", "avg"]), "distinct names"),
    "SqueezeExciteCl Tanh": (partial(SqueezeExciteCl, C, act_layer=nn.Tanh), "NHWC"),
}


def randomized(module: nn.Module) -> nn.Module:
    """With parameters and statistics none of which is at a special value."""
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if "running_var" in name:
            nn.init.uniform_(t, 0.5, 2)
        elif t.is_floating_point():
            nn.init.normal_(t, std=0.5 if t.dim() < 2 else 0.15)  # gates that do not saturate
    return module


def fused(module: nn.Module) -> nn.Module:
    """The fused twin of one module."""
    holder = nn.Sequential(module)
    report = fuse_(holder)
    assert [row.fused for row in report.rows] == [True], report
    assert holder[0] is not module
    assert isinstance(holder[0], type(module))
    return holder[0]


def tensor(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) + 0.2).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def without_ties(x: torch.Tensor) -> torch.Tensor:
    """The planes of x in the same order, with values 1/8 apart: amax shares a gradient among equal maxima."""
    ranks = x.flatten(2).argsort(2).argsort(2).view_as(x)
    return torch.empty_like(x).copy_((ranks + torch.randint(-16, 16, (*x.shape[:2], 1, 1), device=x.device)) / 8)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The functional forms that were called and took the fused path."""
    found: list[str] = []

    def counted(x, *args, name, function, **kwargs):
        assert functional.is_fused(x)
        found.append(name)
        return function(x, *args, **kwargs)

    for name in functional.__all__:
        monkeypatch.setattr(functional, name, partial(counted, name=name, function=getattr(functional, name)))
    return found


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

    def test_a_class_of_the_same_name_that_computes_something_else(self):
        class SELayer(moskomule.SELayer):
            def forward(self, x):
                return super().forward(x) + x

        holder = nn.Sequential(SELayer(C, 4))
        (row,) = fuse_(holder).rows
        assert "computes something else than SE (off by" in row.reason
        assert type(holder[0]) is SELayer

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


class TestFallback:
    """Whatever is done to a fused module later, its original would have done the same."""

    @pytest.fixture
    def pair(self, device) -> tuple[nn.Module, nn.Module]:
        eager = randomized(SEModule(C, 1 / 4)).to(device).eval()
        return fused(copy.deepcopy(eager)), eager

    def same(self, pair, device, calls=None, expected=0):
        x = tensor(2, C, 5, 5).to(device)
        ours, eager = (module(x) for module in pair)
        assert torch.equal(ours, eager) if expected == 0 else torch.allclose(ours, eager, atol=1e-5)
        assert calls is None or len(calls) == expected

    def test_hooks_of_layers(self, pair, calls, device):
        seen = []
        handle = pair[0].fc2.register_forward_hook(lambda *_: seen.append("fc2"))
        self.same(pair, device, calls)
        assert seen == ["fc2"]
        handle.remove()
        self.same(pair, device, calls, 1)

    def test_hooks_of_every_module(self, pair, calls, device):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
        try:
            self.same(pair, device, calls)
        finally:
            handle.remove()
        assert "Conv2d" in seen

    def test_hooks_of_the_module(self, device):
        module, seen = SEModule(C).to(device), []
        module.register_forward_hook(lambda m, x, y: seen.append("before"))
        ours = fused(module)
        ours.register_forward_hook(lambda m, x, y: seen.append("after"))
        module.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
        x = tensor(2, C, 5, 5).to(device).requires_grad_()
        ours(x).sum().backward()
        assert seen == ["before", "after", "backward"]

    @pytest.mark.parametrize("change", ["child", "parametrization", "forward", "norm", "dtype", "gone"])
    def test_layers_in_place_of_others(self, pair, change, calls, device):
        class Adapted(nn.Conv2d):  # as LoRA does
            def forward(self, x):
                return 2 * super().forward(x)

        for module in pair:
            torch.manual_seed(1)
            if change == "child":
                module.fc1 = Adapted(C, module.fc1.out_channels, 1).to(device)
            elif change == "parametrization":
                nn.utils.parametrizations.weight_norm(module.fc1)
                nn.utils.parametrizations.spectral_norm(module.fc2)
            elif change == "forward":
                module.fc1.forward = lambda x, forward=module.fc1.forward: 2 * forward(x)
            elif change == "norm":
                module.bn = nn.BatchNorm2d(module.fc1.out_channels).to(device)
                module.eval()
            elif change == "dtype":
                module.fc1.weight = nn.Parameter(module.fc1.weight.as_subclass(Quantized))
            else:
                module.add_maxpool = False
        self.same(pair, device, calls, int(change == "gone"))

    def test_other_inputs(self, pair, calls, device):
        for x in (tensor(2, C, 5, 5).as_subclass(Quantized), tensor(0, C, 5, 5)):
            assert torch.equal(pair[0](x.to(device)), pair[1](x.to(device)))
        for arguments, error in (((tensor(2, C + 1, 5, 5).to(device),), RuntimeError), ((), TypeError)):
            if not arguments:
                with pytest.raises(error):
                    pair[0](*arguments)
        x = tensor(2, C, 5, 5).to(device)
        assert torch.equal(pair[0](x=x), pair[1](x=x))
        assert not calls

    def test_torch_func(self, pair, device):
        x = tensor(3, 2, C, 5, 5).to(device)
        torch.testing.assert_close(*(torch.func.vmap(module)(x) for module in pair))
        half = {k: v * 0.5 for k, v in pair[1].named_parameters()}
        torch.testing.assert_close(*(torch.func.functional_call(module, half, x[0]) for module in pair))

    def test_sync_batch_norm_has_its_own_forward(self, calls, device):
        holder = nn.Sequential(jongchan.CBAM(C, 4)).to(device)
        fuse_(holder)
        holder = nn.SyncBatchNorm.convert_sync_batchnorm(holder).eval()
        assert not holder[0].is_fused(tensor(2, C, 5, 5).to(device))


class Quantized(torch.Tensor):
    """A tensor subclass, of which kernels know nothing."""


class Block(nn.Module):
    """A user's residual block."""

    def __init__(self, gate: nn.Module, drop: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)
        self.gate = gate
        self.drop_path = timm.layers.DropPath(drop) if drop else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        shortcut = x
        x = self.drop_path(self.gate(self.norm(self.conv(x))))
        x += shortcut
        return self.act(x)


def _resnet_block(kind: type, attention: str, downsample: bool) -> nn.Module:
    planes = C // kind.expansion
    layers = nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)
    attention = partial(SEModule, rd_ratio=1 / 4) if attention == "se" else attention
    return kind(C, planes, attn_layer=attention, downsample=nn.Sequential(*layers) if downsample else None)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "a user's": lambda: Block(moskomule.SELayer(C, 4)),
    "a user's, SimAM": lambda: Block(simam_module()),
    "a user's, reference.SE": lambda: Block(reference.SE(C, 4)),
    "a user's, PyTorch's gate": lambda: Block(EffectiveSEModule(C)),
    "timm BasicBlock se": lambda: _resnet_block(timm.models.resnet.BasicBlock, "se", False),
    "timm Bottleneck se": lambda: _resnet_block(timm.models.resnet.Bottleneck, "se", True),
    "timm Bottleneck cbam": lambda: _resnet_block(timm.models.resnet.Bottleneck, "cbam", True),
    "timm senet": lambda: timm.models.senet.SEResNetBottleneck(C, C // 4, 1, 4),
    "the seed's": lambda: seed.BasicBlock(C, 5),
    "reference se": lambda: reference.models.BasicBlock(C, C, 1, None, "se", reference.models.REFERENCE),
    "reference cbam": lambda: reference.models.BasicBlock(C, C, 1, None, "cbam", reference.models.REFERENCE),
}


class TestTail:
    """The end of residual blocks."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", BLOCKS)
    def test_equals_the_original(self, name, training, device):
        eager = randomized(BLOCKS[name]()).to(device).train(training)
        model = nn.Sequential(copy.deepcopy(eager))
        report = fuse_(model)
        assert [row.tail for row in report.rows] == ["add + ReLU"], report
        x = tensor(4, C, 5, 5, layout="channels_last" if training else "contiguous").to(device)
        judge(model[0], eager, copy.deepcopy(eager).double(), x, None, None, torch.randn_like(x))
        assert isinstance(model[0], type(eager))
        report.restore()
        assert type(model[0]) is type(eager)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_pickle_and_deepcopy(self, name, device):
        model = nn.Sequential(randomized(BLOCKS[name]()).to(device).eval())
        fuse_(model)
        x = tensor(2, C, 5, 5).to(device)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(other[0], FusedBlock) == isinstance(model[0], FusedBlock)
            assert not {*map(id, other.parameters())} & {*map(id, model.parameters())}
            assert torch.equal(other(x), model(x))

    def run(self, model, device, calls) -> tuple[list, torch.Tensor]:
        calls.clear()
        y = model(tensor(2, C, 5, 5).to(device))
        return list(calls), y

    def test_layers_on_the_block(self, calls, device):
        eager = randomized(seed.BasicBlock(C, 5)).to(device).eval()
        model, x = nn.Sequential(copy.deepcopy(eager)), tensor(2, C, 5, 5).to(device)
        assert fuse_(model, lambda *_: False).rows == [("0", "BasicBlock", "SE", False, "", "filter_fn")]
        fuse_(model)
        assert fuse_(model).rows[0].reason == "already fused"
        calls.clear()  # of the check
        torch.testing.assert_close(model(x), eager(x))
        assert calls == ["se"]
        handle = model[0].fc1.register_forward_hook(lambda *_: calls.append("hook"))
        assert torch.equal(model(x), eager(x))
        assert calls == ["se", "hook"]
        handle.remove()
        torch.testing.assert_close(torch.func.vmap(model)(x[None]), torch.func.vmap(eager)(x[None]))
        assert len(calls) == 2

    def test_one_call(self, monkeypatch, device):
        seen = []
        model = nn.Sequential(Block(moskomule.SELayer(C, 4))).to(device).eval()
        fuse_(model)
        monkeypatch.setattr(functional, "se", lambda x, *_, **options: seen.append(options) or x)
        model(tensor(2, C, 5, 5).to(device))
        assert [(o["activation"], o["residual"] is not None) for o in seen] == [("relu", True)]

    @pytest.mark.parametrize("where", ["act", "gate", "drop_path", "gate.fc.0"])
    def test_later_hooks(self, where, device):
        eager = Block(moskomule.SELayer(C, 4)).to(device).eval()
        model, seen = nn.Sequential(copy.deepcopy(eager)), []
        fuse_(model)
        handle = model[0].get_submodule(where).register_forward_hook(lambda m, x, y: seen.append(y.clone()))
        expected = []
        eager.get_submodule(where).register_forward_hook(lambda m, x, y: expected.append(y.clone()))
        x = tensor(2, C, 5, 5).to(device)
        torch.testing.assert_close(model(x), eager(x))
        torch.testing.assert_close(seen, expected)
        handle.remove()
        model(x)
        assert len(seen) == 1

    def test_blocks_that_change(self, device):
        for change in (
            lambda b: setattr(b, "act", nn.GELU()),
            lambda b: setattr(b, "gate", nn.Identity()),
            lambda b: setattr(b, "conv", nn.Conv2d(C, C, 1).to(device)),
            lambda b: setattr(b, "forward", torch.neg),
        ):
            eager = Block(moskomule.SELayer(C, 4)).to(device).eval()
            model = nn.Sequential(copy.deepcopy(eager))
            report = fuse_(model)
            for block in (eager, model[0]):
                torch.manual_seed(1)
                change(block)
            x = tensor(2, C, 5, 5).to(device)
            torch.testing.assert_close(model(x), eager(x))
            report.restore()
            assert "_stale" not in vars(model[0])
            torch.testing.assert_close(model(x), eager(x))

    def test_drop_path(self, device):
        model = nn.Sequential(Block(moskomule.SELayer(C, 4), drop=0.3)).to(device)
        (row,) = fuse_(model).rows
        assert (row.fused, row.tail) == (True, "")
        assert row.reason == "tail not fused: drop_path drops with probability 0.3"
        model = nn.Sequential(_resnet_block(timm.models.resnet.BasicBlock, "se", False)).to(device)
        model[0].drop_path = timm.layers.DropPath(0.0)
        (row,) = fuse_(model).rows
        assert row.tail
        model[0].drop_path.drop_prob = 0.5  # as timm's schedules do
        assert not model[0].is_fused(tensor(2, C, 5, 5).to(device))

    def test_blocks_that_cannot_be_traced(self):
        class Choosy(Block):
            def forward(self, x):
                return super().forward(x) if x.sum() > 0 else x

        class Training(Block):
            def forward(self, x):
                return super().forward(x) if self.training else self.gate(x)

        class Remembering(Block):
            def forward(self, x):
                self.last = x
                return super().forward(x)

        class Modes(Block):
            def forward(self, x):
                return super().forward(x if self.norm.training else 2 * x)

        class Optional(Block):
            def forward(self, x, scale=None):
                return super().forward(x if scale is None else x * scale)

        class Sequences(Block):  # whose branch a trace does not see
            def forward(self, x):
                return super().forward(x if isinstance(x, torch.Tensor) else 2 * x)

        reasons = {
            Choosy: "cannot be traced",
            Training: "another in training",
            Remembering: "sets attributes",
            Modes: "another in training",
            Optional: "takes more than x",
            Sequences: "trace computes another",
        }
        for kind, reason in reasons.items():
            model = nn.Sequential(kind(moskomule.SELayer(C, 4)))
            model[0].last = None
            before = dict(vars(model[0]))
            (row,) = fuse_(model).rows
            assert row.fused
            assert reason in row.reason
            assert type(model[0]) is kind
            assert vars(model[0]) == before
            assert all(m.training for m in model.modules())

    def test_no_tail(self):
        class Used(Block):
            def forward(self, x):
                gated = self.gate(x)
                return self.act(gated + x) * gated

        class Into(Block):
            def forward(self, x):
                shortcut = self.conv(x)
                shortcut += self.gate(x)
                return self.act(shortcut)

        class Gelu(Block):
            def __init__(self, gate):
                super().__init__(gate)
                self.act = nn.GELU()

        for kind in (Used, Into, Gelu):
            model = nn.Sequential(kind(moskomule.SELayer(C, 4)))
            (row,) = fuse_(model).rows
            assert row.fused
            assert not row.tail
            assert type(model[0]) is kind

    @pytest.mark.parametrize("gate", [moskomule.SELayer(C, 4), reference.SE(C, 4)], ids=["peer's", "reference's"])
    def test_shortcut_that_broadcasts(self, gate, device):
        class Pooled(Block):
            def forward(self, x):
                return self.act(self.gate(self.norm(x)) + x.mean((2, 3), keepdim=True))

        eager = Pooled(gate).to(device).eval()
        model, x = nn.Sequential(copy.deepcopy(eager)), tensor(2, C, 5, 5).to(device)
        assert fuse_(model).rows[0].tail
        torch.testing.assert_close(model(x), eager(x))

    def test_shortcut_of_another_dtype(self, device):
        """Out of place the sum is promoted, in place it is not."""

        class Mixed(Block):
            def forward(self, x):
                return self.act(self.gate(self.norm(x)) + x.float())

        class InPlace(Block):
            def forward(self, x):
                y = self.gate(self.norm(x))
                y += x.float()
                return self.act(y)

        cases = itertools.product(
            ((Mixed, torch.float32), (InPlace, torch.bfloat16)), (moskomule.SELayer(C, 4), reference.SE(C, 4))
        )
        for (kind, dtype), gate in cases:
            eager = kind(gate).to(device, torch.bfloat16).eval()
            model = nn.Sequential(copy.deepcopy(eager))
            assert fuse_(model).rows[0].tail
            x = tensor(2, C, 5, 5, dtype=torch.bfloat16).to(device)
            assert model(x).dtype == eager(x).dtype == dtype
            torch.testing.assert_close(model(x), eager(x), rtol=0.02, atol=0.02)

    @pytest.mark.parametrize(
        "name", ["timm Bottleneck se", "timm BasicBlock se", "a user's, reference.SE", "reference se", "the seed's"]
    )
    def test_compiles_without_a_graph_break(self, name, device):
        eager = randomized(BLOCKS[name]()).to(device).eval()
        model = nn.Sequential(copy.deepcopy(eager))
        fuse_(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = tensor(2, C, 5, 5).to(device)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)


class TestNetworks:
    @pytest.fixture(params=["timm", "torchvision", "reference"])
    def network(self, request, device) -> nn.Module:
        if request.param == "timm":
            layers = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
            block = {"block": timm.models.resnet.BasicBlock, "block_args": {"attn_layer": "se"}}
            network = timm.models.resnet.ResNet(**block, **layers, num_classes=5)
        elif request.param == "torchvision":
            import torchvision.models

            network = torchvision.models.mobilenet_v3_small(num_classes=5, width_mult=0.25)
        else:
            block = partial(reference.models.BasicBlock, kit=reference.models.REFERENCE, downsample=None, stride=1)
            blocks = [block(8, 8, attention=attention) for attention in ("se", "cbam", "simam")]
            stem = nn.Conv2d(3, 8, 7, 8, 3), reference.BAM(8, 2)
            network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        return network.to(device)

    def test_a_training_step(self, network, device):
        eager = copy.deepcopy(network).double()  # fp32 and 2 samples amplify rounding through BatchNorm
        network = network.double()
        before = list(network.state_dict())
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (network, eager)]
        report = fuse_(network)
        assert report.left == 0
        assert report.fused > 0
        assert list(network.state_dict()) == before
        x = torch.randn(2, 3, 64, 64, device=device, dtype=torch.float64)
        for model, optimizer in zip((network, eager), optimizers, strict=True):
            torch.manual_seed(3)  # of the dropout
            torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 4], device=device)).backward()
            optimizer.step()
        report.restore()
        for (name, got), want in zip(network.state_dict().items(), eager.state_dict().values(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.fast
class TestReport:
    def model(self) -> nn.Module:
        return nn.Sequential(Block(moskomule.SELayer(C, 4)), LightCbamModule(C), nn.ReLU(), SEModule(C))

    def test_rows(self):
        model = self.model()
        report = fuse_(model)
        assert [row.name for row in report.rows] == ["0.gate", "1", "3"]
        assert [row.cls for row in report.rows] == ["SELayer", "LightCbamModule", "SEModule"]
        assert (report.fused, report.left) == (2, 1)
        lines = str(report).splitlines()
        assert lines[0].split() == ["module", "class", "kind", "fused", "reason"]
        assert "SE + add + ReLU" in lines[1]
        assert lines[-1] == "2 fused, 1 left"

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
        assert str(report).endswith("0 fused, 0 left")

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
        for module in (SEModule(C), reference.CBAM(C), attn_kernels.SE(C)):
            with pytest.raises(ValueError, match=rf"got one itself, {type(module).__name__}; wrap it"):
                fuse_(module)

    def test_hooks_and_forwards_that_are_there_already(self):
        hooked, replaced = SEModule(C), SEModule(C)
        hooked.fc1.register_forward_hook(lambda *_: None)
        replaced.forward = lambda x: x
        report = fuse_(nn.Sequential(hooked, replaced))
        assert [row.reason for row in report.rows] == ["hooks on fc1", "its forward was replaced on the instance"]


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
        monkeypatch.setattr("attn_kernels._adapters.ADAPTERS", ADAPTERS.copy())
        monkeypatch.setattr("attn_kernels._adapters.ADAPTERS", ADAPTERS)
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

        assert "computes something else" in fuse_(nn.Sequential(MySE())).rows[0].reason

    def test_one_that_declines(self):
        def declines(module):
            raise Unsupported("not today")

        register_adapter("SEModule", declines)
        assert fuse_(nn.Sequential(SEModule(C))).rows[0].reason == "not today"
        register_adapter("SEModule", lambda module: None)
        assert fuse_(nn.Sequential(SEModule(C))).rows == []

    def test_bad_arguments(self):
        with pytest.raises(TypeError, match="name: expected the name of a class, got 3"):
            register_adapter(3)
        with pytest.raises(TypeError, match="adapter: expected a function of a module, got str"):
            register_adapter("SE", "no")
