"""What ``explain`` and ``python -m attn_kernels`` say, and that it is what the call does."""

import copy
import ctypes
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.autograd import forward_ad

import attn_kernels
import reference
from attn_kernels import __main__ as command
from attn_kernels import explain, functional, fuse_
from attn_kernels._versions import interpreter_clash
from reference.catalogue import LAYOUTS, OPERATORS
from tests.fuse.cases import SqueezeExciteCl, timm
from tests.harness import MODULES, pair, real_input
from tests.peers import jongchan, moskomule, simam_module
from tests.test_import import WITHOUT_TRITON, python
from tests.test_pytorch import Quantized


@pytest.fixture(params=[name for name in MODULES if name != "channel_attention"])  # which has no module
def module(request, device):
    return pair(lambda kit: MODULES[request.param](kit, 8), device)[0].eval()


def _x(device, layout="contiguous"):
    return real_input((2, 8, 5, 4), torch.float32, layout, device)


def _reason(module, x, residual=None):
    """The only reason why a call is not fused, which the functional form has to share."""
    explanation = explain(module, x, residual)
    assert not explanation.fused
    assert explanation.layout is None
    assert not explanation.copied
    (reason,) = explanation.reasons
    assert f"because {reason}" in str(explanation)
    assert "the reference formula" in str(explanation)
    return reason


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused(module, layout, device):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        explanation = explain(module, _x(device, layout).to(dtype))
        assert explanation.fused
        assert explanation.layout == layout
        assert not explanation.copied
        assert explanation.reasons == ()
        name = str(dtype).removeprefix("torch.")
        call = f"{type(module).__name__} on (2, 8, 5, 4) {name} {_x(device).device}"
        assert str(explanation) == f"{call}: fused, {layout}"


def test_copies_of_what_is_dense_in_neither_layout(module, device):
    wide = torch.randn(2, 16, 10, 4, device=device)
    for x, layout in (
        (wide[:, ::2, ::2], "contiguous"),
        (wide[:, :8].contiguous(memory_format=torch.channels_last)[:, :, ::2], "channels_last"),
    ):
        explanation = explain(module, x)
        assert explanation.copied
        assert explanation.layout == layout
        assert "copied" in str(explanation)
        assert module(x).is_contiguous(memory_format=LAYOUTS[layout])


def test_explanation_is_what_the_call_does(module, device, monkeypatch):
    ran = []
    for name in functional.__all__:
        formula = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, formula=formula, **k: ran.append(1) or formula(*a, **k))
    x = _x(device)
    for given, residual in ((x, None), (x, x), (x[:0], None), (x, Quantized.of(x))):
        ran.clear()
        module(given, residual)
        assert explain(module, given, residual).fused == (not ran)


def test_device(module):
    module = module.to("meta")
    assert "x is on meta, and the kernels run on " in _reason(module, torch.empty(2, 8, 5, 4, device="meta"))


def test_no_kernels(module, device, monkeypatch):
    monkeypatch.setattr(functional, "_DEVICES", ())
    monkeypatch.setattr(functional, "_NO_DEVICE", "Triton cannot be imported")
    assert _reason(module, _x(device)) == "Triton cannot be imported"


def test_empty(module, device):
    assert "no element" in _reason(module, _x(device)[:0])


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 8, 2**14, 2**13), "a sample"), ((2**14, 8, 2**8, 2**7), "pixels")],
    ids=["sample", "batch"],
)
def test_too_large(module, shape, words, device, monkeypatch):
    monkeypatch.setattr(functional, "_DEVICES", ("meta",))
    assert words in _reason(module.to("meta"), torch.empty(shape, device="meta"))
    assert explain(module, torch.empty(shape[0], 8, shape[2] // 2, shape[3], device="meta")).fused


def test_subclass_as_input_residual_and_parameter(module, device):
    x = _x(device)
    assert "Quantized" in _reason(module, Quantized.of(x))
    assert "Quantized" in _reason(module, x, Quantized.of(x))
    weights = [n for n, p in module.named_parameters() if p.dim() > 1]
    if isinstance(module, attn_kernels.BAM):  # the other layers of its branches run as modules
        weights = ["spatial_att.gate_s.gate_s_conv_reduce0.weight"]
    for path in weights:
        owner, _, name = path.rpartition(".")
        owner, plain = module.get_submodule(owner), module.get_parameter(path)
        setattr(owner, name, nn.Parameter(Quantized.of(plain.detach()), requires_grad=False))
        assert "Quantized" in _reason(module, x)
        setattr(owner, name, plain)
    assert explain(module, x).fused


def test_forward_mode(module, device):
    with forward_ad.dual_level():
        assert "forward-mode" in _reason(module, _x(device))


def test_functional_transform(module, device):
    seen = []
    torch.func.vmap(lambda x: seen.append(_reason(module, x)) or x)(_x(device)[None])
    assert "torch.func" in seen[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_and_export(module, device):
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(functional.why_not(x))
            return x + 1

    torch.jit.trace(Probe(), _x(device), check_trace=False)
    torch.export.export(Probe(), (_x(device),))
    assert len(seen) >= 2
    assert all(reasons == seen[0] and "torch.export" in reasons[0] for reasons in seen)


@pytest.mark.parametrize(
    "build", [lambda: attn_kernels.CBAM(8), attn_kernels.SpatialGate], ids=["cbam", "spatial_gate"]
)
def test_norm(build, device):
    module, x = build().to(device), _x(device)
    gate = getattr(module, "SpatialGate", module).spatial
    plain = gate.bn
    for norm in (nn.Identity(), nn.SyncBatchNorm(1), nn.BatchNorm2d(1, momentum=None).eval()):
        gate.bn = norm.to(device)
        if isinstance(norm, nn.BatchNorm2d):
            norm.num_batches_tracked = None
        assert f"the norm ({type(norm).__name__})" in _reason(module, x)
    gate.bn = plain
    hook = plain.register_forward_hook(lambda *_: None)
    assert "hooks" in _reason(module, x)
    hook.remove()
    weight = plain.weight
    plain.weight = nn.Parameter(Quantized.of(weight.detach()), requires_grad=False)
    assert "of the norm" in _reason(module, x)
    plain.weight = weight
    assert explain(module, x).fused


def test_no_spatial_gate(device):
    assert explain(attn_kernels.CBAM(8, no_spatial=True).to(device), _x(device)).fused


def test_all_reasons_are_given(device):
    empty = Quantized(torch.zeros(0, 1, 1, 1, dtype=torch.int8, device=device), torch.ones((), device=device))
    words = "no element", "Quantized", "Identity"
    reasons = functional.why_not(empty, (), nn.Identity())
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_triton_missing():
    python(
        WITHOUT_TRITON + "import torch, attn_kernels\n"
        "reasons = attn_kernels.explain(attn_kernels.SE(8), torch.zeros(1, 8, 1, 1)).reasons\n"
        "assert len(reasons) == 1 and reasons[0].startswith('Triton cannot be imported: import of triton'), reasons"
    )


def test_reference_module(device):
    assert "reference's" in _reason(reference.SE(8).to(device), _x(device))


def _fused(module, device):
    """A module of another library, fused."""
    model = nn.Sequential(module.to(device).eval())
    assert fuse_(model).fused == 1
    return model[0]


def _reason_of_fused(module, x):
    """The only reason why a module that ``fuse_`` made runs its own forward."""
    explanation = explain(module, x)
    assert not explanation.fused
    assert not module.is_fused(x)
    assert f"on {tuple(x.shape)} float32 {x.device}: plain PyTorch" in str(explanation)
    (reason,) = explanation.reasons
    return reason


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "build", [simam_module, partial(moskomule.SELayer, 8, 2), partial(jongchan.CBAM, 8, 2), partial(jongchan.BAM, 8, 2)]
)
def test_modules_of_fuse(build, layout, device):
    explanation = explain(_fused(build(), device), _x(device, layout)[:, :, :4])
    assert explanation.fused
    assert explanation.layout == layout


def test_blocks_that_se_stands_on(device):
    x = torch.randn(2, 64, 6, 6, device=device)
    block = reference.models.se_resnet_18().to(device).layer1[0]
    assert explain(block, x).reasons == ("the module is reference's, not attn_kernels'",)
    model = reference.models.se_resnet_18().to(device)
    fuse_(model)
    for fused in (model.layer1[0], attn_kernels.models.se_resnet_18().to(device).layer1[0]):
        assert explain(fused, x).fused
        with pytest.raises(TypeError, match="residual: expected None"):
            explain(fused, x, x)


def test_modules_of_fuse_that_changed(device):
    module, x = _fused(moskomule.SELayer(8, 2), device), _x(device)
    hook = module.fc[2].register_forward_hook(lambda *_: None)
    assert _reason_of_fused(module, x) == "hooks on fc.2"
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert _reason_of_fused(module, x) == "hooks on every module"
    hook.remove()
    parametrize.register_parametrization(module.fc[0], "weight", nn.Identity())
    assert _reason_of_fused(module, x) == "fc.0 is no longer a Linear"
    parametrize.remove_parametrizations(module.fc[0], "weight")
    module.fc[0].forward = torch.neg
    assert _reason_of_fused(module, x) == "the forward of fc.0 was replaced on the instance"
    del module.fc[0].forward
    module.fc[0].bias = nn.Parameter(torch.zeros(4, device=device))
    assert _reason_of_fused(module, x) == "fc.0.bias was set"
    module.fc[0].bias = None
    weight = module.fc[0].weight
    module.fc[0].weight = nn.Parameter(Quantized.of(weight.detach()), requires_grad=False)
    assert "a parameter is a Quantized of torch.float32" in _reason_of_fused(module, x)
    module.fc[0].weight = weight
    assert "x is a Quantized" in _reason_of_fused(module, Quantized.of(x))
    assert "no element" in _reason_of_fused(module, x[:0])
    assert explain(module, x).fused
    del module.fc[3]
    reasons = "fc has other children than it had", "fc.3 is no longer a Sigmoid, or it is gone"
    assert explain(module, x).reasons == reasons


def test_maps_and_norms_of_fuse(device):
    module = _fused(jongchan.BAM(8, 2), device)
    assert "x is not square" in _reason_of_fused(module, _x(device))
    assert explain(module, _x(device)[:, :, :4]).fused
    module = _fused(jongchan.CBAM(8, 2), device)
    module.SpatialGate.spatial.bn.momentum = module.SpatialGate.spatial.bn.num_batches_tracked = None
    assert "the norm (BatchNorm2d)" in explain(module, _x(device)).reasons[0]
    module = _fused(SqueezeExciteCl(8, 1 / 2), device)
    assert explain(module, torch.zeros(2, 5, 4, 8, device=device)).layout == "channels_last"


def test_blocks_of_fuse(device):
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), block_args={"attn_layer": "se"})
    model = model.to(device).eval()
    fuse_(model)
    block, x = model.layer1[0], torch.zeros(2, 64, 4, 4, device=device)
    explanation = explain(block, x)
    assert explanation.fused
    assert str(explanation) == f"FusedBasicBlock on (2, 64, 4, 4) float32 {x.device}: fused, contiguous"
    hook = block.se.fc1.register_forward_hook(lambda *_: None)
    assert explain(block, x).reasons == ("se: hooks on fc1",)
    hook.remove()
    block.drop_path = nn.Dropout(0.5)
    assert _reason_of_fused(block, x) == "drop_path was set, or it is gone"


def test_refuses_what_the_call_refuses(module, device):
    x = torch.randn(2, 4, 5, 4, device=device)
    if isinstance(module, attn_kernels.SimAM | attn_kernels.SpatialGate):
        assert explain(module, x).fused
        return
    for ask in (module, lambda x: explain(module, x)):
        with pytest.raises(ValueError, match=r"x: expected 8 channels, as \w+ takes, got shape \(2, 4, 5, 4\)"):
            ask(x)


def test_batch_norms_of_one_value_are_refused(device):
    for module in (attn_kernels.CBAM(8).to(device), attn_kernels.BAM(8).to(device)):
        x = torch.randn(1, 8, 1, 1, device=device)
        for ask in (module, lambda x, module=module: explain(module, x)):
            with pytest.raises(ValueError, match="x: expected more than 1 value per channel"):
                ask(x)
        assert explain(module.eval(), x).fused


class _Network(nn.Module):
    """Attention called twice, once, with a residual, and never; and a norm and a dropout, which have states."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Dropout()
        self.block = nn.Sequential(attn_kernels.SE(8, 4), nn.Sequential(attn_kernels.CBAM(8, 4)))
        self.never, self.last = attn_kernels.BAM(8), reference.SimAM()

    def forward(self, x):
        x = self.drop(self.bn(self.conv(x)))
        x = self.block[0](self.block(x), residual=x, activation="relu")
        return self.last(x)


@pytest.mark.fast
@pytest.mark.parametrize("layout", LAYOUTS)
def test_network(layout, device):
    network = _Network().to(device)
    x = torch.randn(2, 3, 9, 9, device=device).contiguous(memory_format=LAYOUTS[layout])
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    found = explain(network, x)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert not any(m._forward_pre_hooks for m in network.modules())
    assert [name for name, _ in found.rows] == ["block.0", "block.1.0", "block.0", "last"]
    assert [e.fused for _, e in found.rows] == [True, True, True, False]
    assert {e.layout for _, e in found.rows[:3]} == {layout}
    assert found.not_called == ("never",)
    assert not found.fused
    where = f"(2, 8, 4, 4) float32 {x.device}"
    assert str(found).splitlines() == [
        f"block.0    SE on {where}     fused, {layout}",
        f"block.1.0  CBAM on {where}   fused, {layout}",
        f"block.0    SE on {where}     fused, {layout}",
        f"last       SimAM on {where}  the reference formula",
        "  because the module is reference's, not attn_kernels'",
        "never: not called",
        "3 of 4 calls fused",
    ]
    assert network(x).shape == (2, 8, 4, 4)


@pytest.mark.parametrize(("name", "count"), [("seresnet50", 16), ("efficientnet_b0", 16)])
def test_network_of_fuse(name, count, device):
    """Blocks are asked about themselves, whatever the number of channels that they begin with."""
    network = timm.create_model(name).to(device)
    report = fuse_(network)
    assert report.fused == count
    before = copy.deepcopy(network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none about modules that have changed
        found = explain(network, torch.randn(1, 3, 64, 64, device=device))
    assert len(found.rows) == count
    assert found.fused, str(found)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert all(type(t) is torch.Tensor for t in network.buffers())
    found = explain(network.to("meta"), torch.empty(1, 3, 64, 64, device="meta"))
    assert {e.reasons for _, e in found.rows} == {("x is on meta, and the kernels run on cuda and cpu",)}


class _WithState(nn.Module):
    """Keeps what it makes, counts its calls in a tensor, a parameter and a list, and calls one module twice."""

    def __init__(self):
        super().__init__()
        self.a, self.cache, self.count, self.log = attn_kernels.SE(8, 4), None, torch.zeros(()), []
        self.b, self.steps = self.a, nn.Parameter(torch.zeros(()), requires_grad=False)
        self.a.register_forward_pre_hook(lambda m, args: (args[0].to(memory_format=torch.channels_last),))

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.ones(8, 1, 1, device=x.device)
        self.count.add_(1)
        self.steps.add_(1)
        self.log.append(x.shape)
        with torch.no_grad():
            return self.b(self.a(x * self.cache))


def test_network_is_not_changed(device):
    network, x = _WithState().to(device), torch.randn(2, 8, 4, 4, device=device)
    found = explain(network, x)
    assert (network.cache, network.count.item(), network.steps.item(), network.log) == (None, 0, 0, [])
    assert len(network.a._forward_pre_hooks) == 1
    assert [(name, e.layout) for name, e in found.rows] == [("a", "channels_last")] * 2  # after the module's own hooks
    assert found.not_called == ()
    assert type(network(x)) is torch.Tensor


class _ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.se = simam_module(), attn_kernels.SE(8, 4)

    def forward(self, x):
        return self.attention(x=self.se(x=x, residual=x))


def test_calls_by_keyword(device):
    network, x = _ByKeyword().to(device), torch.randn(2, 8, 4, 4, device=device)
    assert fuse_(network).fused == 1
    (_, se), (_, attention) = explain(network, x).rows
    assert se.fused
    assert attention.reasons == ("it is called with more than x, or by keyword",)
    assert str(attention).startswith("Fusedsimam_module on (2, 8, 4, 4) float32")
    network(x)


def test_networks_that_cannot_be_asked(device):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), attn_kernels.SE(8)).to(device)
    with pytest.raises(ValueError, match=r"module: Sequential cannot be run on a tensor without data of shape \(2, 4"):
        explain(network, torch.randn(2, 4, 5, 5, device=device))
    with pytest.raises(TypeError, match="residual: expected None for a network"):
        explain(network, torch.randn(2, 3, 5, 5, device=device), torch.randn(2, 3, 5, 5, device=device))
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got list"):
        explain(network, [1])


def test_bad_arguments(device):
    with pytest.raises(TypeError, match="residual: expected None, since Fusedsimam_module takes only x"):
        explain(_fused(simam_module(), device), _x(device), _x(device))
    with pytest.raises(
        TypeError, match="module: expected a module of attn_kernels or of fuse_, or a network that has some, got Linear"
    ):
        explain(nn.Linear(8, 8), _x(device))
    with pytest.raises(TypeError, match="x: expected dtype"):
        explain(attn_kernels.SimAM(), _x(device).int())
    with pytest.raises(ValueError, match="residual: expected x's shape"):
        explain(attn_kernels.SimAM(), _x(device), _x(device)[:1])


def _command(**environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ATTN_KERNELS_DISABLE")}
    return subprocess.run(
        [sys.executable, "-m", "attn_kernels"],
        cwd=Path(__file__).parents[1],
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_checks_the_interpreted_kernels():
    done = _command(TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for name in OPERATORS:
        for layout in LAYOUTS:
            assert [name, layout, *["fused"] * 4] in lines
    for name in (*OPERATORS, "channel_attention"):
        assert [name, "ok,"] in [line[:2] for line in lines]
    for fact in (
        "PyTorch",
        "Triton",
        "driver",
        "GPU",
        "TRITON_INTERPRET",
        "ATTN_KERNELS_DISABLE",
        "ATTN_KERNELS_SINGLE_LAUNCH",
    ):
        assert fact in done.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "x is on cpu, and the kernels run on cuda"),
        ({"ATTN_KERNELS_DISABLE": "1"}, "ATTN_KERNELS_DISABLE is set"),
        ({"ATTN_KERNELS_DISABLE": "1", "TRITON_INTERPRET": "1"}, "ATTN_KERNELS_DISABLE is set"),
    ],
)
def test_command_says_in_one_line_why_nothing_is_fused(environment, reason):
    done = _command(**environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Every module runs the reference formula here: {reason}."
    assert "fused" not in done.stdout


def _raise(*_):
    raise RuntimeError("a probe\nof two lines")


def test_command_asks_the_driver(monkeypatch):
    class Driver:
        status = 0

        def cuDriverGetVersion(self, number):
            number._obj.value = 13020
            return self.status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert command.environment()["driver"].startswith("CUDA 13.2 (PyTorch is built ")
    monkeypatch.setattr(Driver, "status", 34)
    assert command.environment()["driver"].startswith("error 34 ")


@pytest.mark.parametrize(
    ("owner", "probe", "lines"),
    [
        (command.platform, "python_version", ["Python"]),
        (command, "version", ["Triton", "numpy"]),
        (command.ctypes, "byref", ["driver"]),
        (torch.cuda, "device_count", ["GPUs"]),
        (torch.cuda, "get_device_properties", ["GPU 0"]),
        (torch.cuda, "is_available", ["What runs here"]),
        (functional, "why_not", ["What runs here"]),
        (attn_kernels, "explain", [f"  {name}" for name in OPERATORS]),
        (attn_kernels, "SE", ["  SE"]),
        (command, "error", [f"  {name}" for name in (*OPERATORS, "channel_attention")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_command_outlives_every_probe(owner, probe, lines, device, monkeypatch, capsys):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=lambda number: 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name="GPU", major=9, minor=0, total_memory=2**30, multi_processor_count=132),
    )
    if probe != "error":
        monkeypatch.setattr(command, "error", lambda name: command.build(attn_kernels, name) and 0.0)
    monkeypatch.setattr(owner, probe, _raise)
    status = command.main()
    printed = capsys.readouterr().out.splitlines()
    failed = [line for line in printed if "FAILED, RuntimeError: a probe of two lines" in line]
    assert all(any(line.startswith(name) for line in failed) for name in lines)
    assert all(line.startswith(tuple(lines)) for line in failed)
    assert {"Python", "Triton", "driver", "GPUs"} <= {line.split()[0] for line in printed if line.strip()}
    assert status == any(name.startswith(("  ", "What")) and probe != "explain" for name in lines)


@pytest.mark.parametrize(
    ("triton", "numpy", "clash"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.6", False), ("3.10.0", "2.10.0rc1", False)],
)
def test_interpreter_clash(triton, numpy, clash):
    said = interpreter_clash(triton, numpy)
    assert bool(said) == clash
    assert not clash or (triton in said and numpy in said)


def test_interpreter_beside_a_numpy_that_it_cannot_use():
    python(
        "import warnings, numpy, torch, triton\n"
        "triton.__version__, numpy.__version__ = '3.6.0', '2.4.0'\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    import attn_kernels\n"
        "reasons = attn_kernels.explain(attn_kernels.SE(8), torch.zeros(1, 8, 1, 1)).reasons\n"
        "words = 'the interpreter of Triton 3.6.0 needs numpy below 2.4, and this is numpy 2.4.0'\n"
        "assert words in reasons, reasons\n"
        "assert any(words in str(warning.message) for warning in caught), caught\n",
        TRITON_INTERPRET="1",
    )


def test_command_fails_where_a_module_is_wrong(device, monkeypatch, capsys):
    monkeypatch.setattr(attn_kernels.SE, "_function", staticmethod(lambda *a, **k: functional.se(*a, **k) * 1.001))
    monkeypatch.setattr(attn_kernels.BAM, "_function", staticmethod(lambda *a, **k: 1 / 0))
    assert command.main() == 1
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "WRONG" in printed["SE"]
    assert "FAILED, ZeroDivisionError" in printed["BAM"]
    assert "ok" in printed["SimAM"]
