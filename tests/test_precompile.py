"""Kernels compiled ahead into Triton's cache, so that the process that launches them compiles none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import attn_kernels
from attn_kernels.precompile import specializations
from benchmarks import precompile, smoke, speed, train
from benchmarks.precompile import Case
from benchmarks.shapes import KERNELS
from reference.catalogue import FAMILIES

ROOT = Path(__file__).parents[1]
PREFACE = """
import json, sys, threading
from unittest.mock import patch
import torch, torch.utils.checkpoint, triton
from torch import nn
import attn_kernels, reference
from attn_kernels import functional, models
from attn_kernels._compiler import Outcome, compilations, compile_all
from attn_kernels._recording import Specialization, compiling_for, launching_without_data
from attn_kernels.precompile import precompile, specializations
from triton.runtime.jit import JITFunction

class Network(nn.Module):
    def __init__(self, *attention):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.attention = nn.Sequential(*attention)

    def forward(self, x):
        return self.attention(torch.relu(self.bn(self.conv(x))))

SHAPE = 2, 3, 10, 10
GPU = {"capability": (9, 0), "multiprocessors": 132}

def recorded(model, layout=torch.channels_last, backward=True):
    return set(specializations(model, SHAPE, None, layout, backward, 90, 132))
"""


def run(program: str, cache: Path) -> list:
    """What the program prints in a process whose kernels are not interpreted: JSON, one value per line."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PREFACE + program],
        cwd=ROOT,
        env=inherited | {"TRITON_CACHE_DIR": str(cache), "ATTN_KERNELS_SINGLE_LAUNCH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


AHEAD = """
model = Network(attn_kernels.SE(16), attn_kernels.SimAM()).to(memory_format=torch.channels_last)
model.attention[0].eval()
before = {name: t.clone() for name, t in model.state_dict().items()}
with torch.autocast("cpu", torch.bfloat16):
    found = precompile(model, SHAPE, **GPU, jobs=2, progress=False)
print(json.dumps([found.kernels, found.compiled]))
print(json.dumps(all(torch.equal(t, before[name]) for name, t in model.state_dict().items())))
print(json.dumps([module.training for module in model.modules()]))
"""

# By Triton's launcher, in the second way that it has to compile a kernel.
LAUNCHED = """
model = Network(attn_kernels.SE(16), attn_kernels.SimAM()).to("meta", memory_format=torch.channels_last)
run = JITFunction.run

def compile_only(function, *args, warmup, **kwargs):
    run(function, *args, warmup=True, **kwargs)

with compilations() as compiled, launching_without_data(132), compiling_for(90):
    with patch.object(JITFunction, "run", compile_only):
        x = torch.empty(2, 16, 8, 8, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        y = model.attention(x.requires_grad_())
        torch.autograd.grad(y, [x, *model.attention.parameters()], torch.empty_like(y))
print(json.dumps(compiled))
"""


def test_who_launches_afterwards_compiles_nothing(tmp_path):
    (kernels, compiled), unchanged, training = run(AHEAD, tmp_path)
    assert (kernels, compiled) == (5, 5)  # SE forward in training, and in inference; SimAM's is the same; two backward
    assert unchanged
    assert training == [True] * 4 + [False] * (len(training) - 5) + [True]  # of SE, its layers and SimAM
    assert run(LAUNCHED, tmp_path) == [[]]
    assert run(AHEAD, tmp_path)[0] == [5, 0]


VALUES = """
from torch import nn
one = Network(attn_kernels.SimAM(), attn_kernels.CBAM(16), attn_kernels.BAM(16))
other = Network(attn_kernels.SimAM(e_lambda=0.1), attn_kernels.CBAM(16), attn_kernels.BAM(16))
for module in other.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.eps, module.momentum = 1e-3, 0.03
print(json.dumps(recorded(one) == recorded(other)))
print(json.dumps(len(recorded(one)) > 10))
"""


def test_values_of_lambda_eps_and_momentum_share_kernels(tmp_path):
    assert run(VALUES, tmp_path) == [True, True]


STEP = """
model = Network(attn_kernels.SE(16), attn_kernels.CBAM(16), attn_kernels.SimAM())
model = model.cuda().to(memory_format=torch.channels_last)
x = torch.randn(SHAPE, device="cuda").to(memory_format=torch.channels_last)
with torch.autocast("cuda", torch.bfloat16), compilations() as compiled:
    if ahead:
        found = precompile(model, SHAPE, progress=False)
        compiled.clear()
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
print(json.dumps(compiled))
"""


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_step_compiles_nothing(tmp_path):
    """In the process that compiled ahead, and in a later one."""
    assert run(f"ahead = True{STEP}", tmp_path) == [[]]
    assert run(f"ahead = False{STEP}", tmp_path) == [[]]


THREADS = """
kernel = recorded(Network(attn_kernels.SimAM()), backward=False).pop()
with compilations() as compiled:
    thread = threading.Thread(target=lambda: list(compile_all([kernel], 90)))
    thread.start()
    thread.join()
print(json.dumps(compiled))
"""


def test_counts_what_any_thread_compiles(tmp_path):
    """As autograd's does on a GPU."""
    assert run(THREADS, tmp_path) == [["simam_fwd_kernel"]]


WHAT_IS_RECORDED = """
eager = Network(attn_kernels.CBAM(16))
training = recorded(eager)
print(json.dumps([recorded(eager, backward=False) < training, recorded(torch.compile(eager)) == training]))

ours = Network(reference.SE(16))
print(json.dumps(len(recorded(ours))))

from benchmarks.users import library as import_library
fused = Network(import_library("timm.layers").SEModule(16, rd_channels=1))
attn_kernels.fuse_(fused)
print(json.dumps(recorded(fused) == recorded(Network(attn_kernels.SE(16, hidden_channels=1)))))

print(json.dumps(recorded(nn.Sequential(attn_kernels.SimAM())) > set()))

# Whatever computes a convolution here, its output is laid out as on a GPU.
model = Network(attn_kernels.SE(16)).to(memory_format=torch.channels_last)
found = recorded(model)
with torch.backends.mkldnn.flags(enabled=False):
    contiguous = recorded(Network(attn_kernels.SE(16)), torch.contiguous_format)
    print(json.dumps([recorded(model) == found, contiguous != found]))

# Nobody else is recorded.
def elsewhere():
    others.append(functional.is_fused(torch.empty(1, 1, 1, 1, device="meta")))
    try:
        others.append(triton.runtime.driver.active.get_current_device() == 0)
    except RuntimeError as error:  # there is no GPU
        others.append("active drivers" in str(error))

class Elsewhere(nn.Module):
    def forward(self, x):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x

others = []
recorded(Network(Elsewhere()))
print(json.dumps(others[:2]))

from benchmarks.speed_of_light import copy_kernel

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = attn_kernels.SE(16)

    def train(self, mode=True):
        raise AssertionError("what a module does then is not to be undone")

    def forward(self, x):
        t = torch.empty(64, device="meta")
        copy_kernel[(1,)](t, t, 64, BLOCK=64)  # of another package
        return torch.utils.checkpoint.checkpoint(self.se, x, use_reentrant=True)

mixed = Network(Mixed())
names = {kernel.kernel for kernel in recorded(mixed)}
unchanged = mixed.training and all(p.grad is None for p in mixed.parameters())
print(json.dumps([sorted(names), unchanged]))
try:
    precompile(ours, SHAPE, progress=False)
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_what_is_recorded(tmp_path):
    found = run(WHAT_IS_RECORDED, tmp_path)
    names = [["channel_gate_kernel", "gate_bwd_kernel"], True]
    assert found[:-1] == [[True, True], 0, True, True, [True, True], [False, True], names]
    assert "capability: expected it to be given, since there is no GPU here; (9, 0) for an H100" in found[-1]


FAILURES = """
good = recorded(Network(attn_kernels.SimAM())).pop()
dies = good._replace(module="dies_when_imported")
bad = good._replace(signature=good.signature[1:])
for kernel, outcome in compile_all([dies, dies, good, bad], 90, jobs=1):
    print(json.dumps([kernel.module, outcome.compiled, outcome.error]))
"""


def test_one_failure_costs_its_own_kernel_only(tmp_path, monkeypatch):
    (tmp_path / "dies_when_imported.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bad, *others = run(FAILURES, tmp_path / "cache")
    assert bad[1] is False
    assert "CompilationError" in bad[2]
    dead = ["dies_when_imported", False, "its process ended: 3"]
    assert sorted(others) == [["attn_kernels.ops.simam", True, ""], dead, dead]


class TestArguments:
    MODEL = nn.Sequential(attn_kernels.SE(16))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((nn.functional.relu, (1, 16, 8, 8)), TypeError, "model: expected an nn.Module, got function"),
            ((MODEL, 16), TypeError, "input_shape: expected a sequence of integers, got 16"),
            ((MODEL, (1, 16.0, 8, 8)), TypeError, "input_shape: expected a sequence of integers"),
            ((MODEL, ()), ValueError, "input_shape: expected positive integers, got ()"),
            ((MODEL, (0, 16, 8, 8)), ValueError, "input_shape: expected positive integers, got (0, 16, 8, 8)"),
        ],
    )
    def test_are_checked(self, arguments, error, message):
        with pytest.raises(error, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
            attn_kernels.precompile(*arguments)

    def test_capability(self):
        with pytest.raises(TypeError, match=r"capability: expected a pair of integers, .* or None, got 9\.0"):
            attn_kernels.precompile(self.MODEL, (1, 16, 8, 8), capability=9.0)

    def test_jobs(self):
        with pytest.raises(ValueError, match="jobs: expected a positive integer or None, got 0"):
            attn_kernels.precompile(self.MODEL, (1, 16, 8, 8), jobs=0)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here without a GPU only")
    def test_an_interpreter_compiles_nothing(self):
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
            attn_kernels.precompile(self.MODEL, (1, 16, 8, 8), capability=(9, 0), multiprocessors=132)


class TestCases:
    def test_are_what_the_steps_launch(self):
        found = precompile.cases()
        assert len(set(found)) == len(found)
        for family in FAMILIES:
            for shape, layout, block in smoke.CASES:
                assert Case(family, shape, "bf16", layout, block) in found
        for cell in speed.cells(["se", "se_add_relu", "cbam"], ["fused"], [32, 256], dtypes=["bf16"]):
            block = KERNELS[cell.kernel].epilogue
            assert Case(cell.kernel, cell.shape, "bf16", cell.layout, block) in found
        networks = {case.kernel for case in found if not isinstance(case, Case)}
        assert networks == {"se_resnet50", "cbam_resnet50", "simam_resnet50", "bam_resnet50", "timm/efficientnet_b0"}

    def test_of_one_step_and_kernel(self):
        found = precompile.cases(["smoke"], ["simam"])
        assert [case.kernel for case in found] == ["simam"] * len(smoke.CASES)


COMMAND = """
from benchmarks import precompile
cases = [
    precompile.Case("simam", (2, 16, 8, 8), "bf16", "contiguous", False),
    precompile.Case("se", (2, 16, 8, 8), "bf16", "channels_last", True),
]
found = [precompile.launches(case, 90, 132) for case in cases]
print(json.dumps([len(kernels) for kernels in found]))
backward = next(kernel for kernel in found[1] if kernel.kernel == "gate_bwd_kernel")
print(json.dumps(dict(backward.signature)["gradients"].dresidual))
with patch.object(precompile, "cases", lambda *_: cases):
    import argparse, io, contextlib
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            status = precompile.run(argparse.Namespace(architecture="sm_90", jobs=2, steps=["smoke"], kernels=["se"]))
        print(json.dumps([status, text.getvalue().splitlines()[-1].replace(",", "").split()]))
"""


def test_command_compiles_what_its_cases_launch(tmp_path):
    launched, dresidual, first, second = run(COMMAND, tmp_path)
    assert dresidual == "*bf16"  # as in speed, whose residual has a gradient
    assert launched == [2, 3]  # SimAM of whole planes keeps nothing for backward
    for (status, words), compiled in ((first, "5"), (second, "0")):
        assert status == 0
        assert words[:5] == [compiled, "of", "5", "kernels", "compiled"]
        assert words[-4:-2] == ["0", "failures"]


@pytest.mark.parametrize("network", ["simam_resnet50", "bam_resnet50"])
def test_networks_give_attention_what_autocast_gives_it(network, monkeypatch):
    """On fake tensors: the same shapes, dtypes and layouts."""
    import reference

    kind = attn_kernels.SimAM if network.startswith("simam") else attn_kernels.BAM
    monkeypatch.setattr(train, "DEPTH", 18)
    seen = []
    forward = kind.forward

    def spy(module, x, *args):
        seen.append((x.shape, x.stride(), x.dtype, [p.dtype for p in module.parameters()]))
        return forward(module, x, *args)

    monkeypatch.setattr(kind, "forward", spy)
    cells = train.cells([network], ["fused"], [2], ["bf16"], ["train"])
    cell = next(cell for cell in cells if cell.fused)._replace(shape=(2, 3, 64, 64))
    # No kernel, which would be interpreted.
    monkeypatch.setattr(kind, "_function", staticmethod(getattr(reference, kind.__name__.lower())))
    model = train.build(cell).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert specializations(model, cell.shape, None, None, True, 90, 132) == []
    on_fakes = seen.copy()
    seen.clear()
    images = torch.randn(cell.shape).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert len(seen) > 2
    assert on_fakes == seen * 2  # in training, and in inference


def test_calls_baselines_forward_and_backward(monkeypatch):
    """The torch.compile of the speed step, here by a compiler that leaves everything as it is."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, mode, dynamic: real(module, backend=backend, dynamic=dynamic))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    cells = {cell.kernel: cell for cell in speed.cells(["simam", "se_add_relu"], ["compile"], [32], dtypes=["bf16"])}
    for cell in cells.values():
        _, error = precompile._baseline(cell._replace(shape=(2, 16, 4, 4)))
        assert error == ""
    assert len(graphs) == 2


def test_takes_the_architecture_that_is_asked_for():
    assert precompile.target("sm_80") == (80, 108)
    if not torch.cuda.is_available():
        assert precompile.target() == (90, 132)


CACHE_KEYS = """
from attn_kernels.ops.common import device
device.settle_cache_keys()
modules = [module for name, module in sys.modules.items() if name.startswith("attn_kernels.ops.")]
functions = [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]
keys = [f.cache_key for f in functions]
for f in functions:  # now that all others are hashed
    f.hash, f.used_global_vals = None, {}
    f.cache_key
print(json.dumps([len(keys), [f.fn.__name__ for f, key in zip(functions, keys) if f.cache_key != key]]))
"""


def test_place_in_the_cache_does_not_depend_on_the_order_of_launches(tmp_path):
    """What Triton has hashed before its callees it would hash differently now."""
    ((count, wrong),) = run(CACHE_KEYS, tmp_path)
    assert count > 50
    assert wrong == []
