"""Kernels compiled ahead: by Triton's own launcher, into its cache, so that another process compiles none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import precompile, smoke, speed, train
from benchmarks.plan import Cell
from benchmarks.precompile import Case
from benchmarks.shapes import KERNELS

pytestmark = pytest.mark.usefixtures("single_launch")

ROOT = Path(__file__).parents[1]
COMPILE = """
from benchmarks.precompile import Case, launches
for kernel, layout in (("simam", "contiguous"), ("se", "channels_last")):
    found = launches(Case(kernel, (2, 16, 8, 8), "bf16", layout, kernel == "se"), 90, 132)
    print(found.kernels, found.compiled, found.error)
"""


def compile_in_a_process(cache: Path) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_second_process_compiles_nothing(tmp_path):
    assert compile_in_a_process(tmp_path) == ["2 2 ", "2 2 "]
    assert compile_in_a_process(tmp_path) == ["2 0 ", "2 0 "]


class TestCases:
    def test_are_what_the_steps_launch(self):
        found = precompile.cases()
        assert len(set(found)) == len(found)
        for family in smoke.FAMILIES:
            for shape, layout, block in smoke.CASES:
                assert Case(family, shape, "bf16", layout, block) in found
        for cell in speed.cells(["se", "se_add_relu", "cbam"], ["fused"], [32, 256], dtypes=["bf16"]):
            block = KERNELS[cell.kernel].epilogue
            assert Case(cell.kernel, cell.shape, "bf16", cell.layout, block) in found
        networks = {case.kernel for case in found if isinstance(case, Cell)}
        assert networks == {"se_resnet50", "cbam_resnet50", "simam_resnet50", "bam_resnet50", "timm/efficientnet_b0"}

    def test_of_one_step_and_kernel(self):
        found = precompile.cases(["smoke"], ["simam"])
        assert [case.kernel for case in found] == ["simam"] * len(smoke.CASES)


@pytest.mark.parametrize("network", ["simam_resnet50", "bam_resnet50"])
def test_networks_give_attention_what_autocast_gives_it(network, monkeypatch):
    """On meta tensors, where there is no autocast: the same shapes, dtypes and layouts."""
    import attn_kernels
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
    monkeypatch.setattr(kind, "_function", staticmethod(getattr(reference, kind.__name__.lower())))
    precompile._network(cell)
    on_meta = seen.copy()
    seen.clear()
    images = torch.randn(cell.shape).contiguous(memory_format=torch.channels_last)
    network = train.build(cell).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        network(images)
    assert len(on_meta) > 2
    assert on_meta == seen


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
        found = precompile.launches(cell._replace(shape=(2, 16, 4, 4)), 90, 132)
        assert found.error == ""
    assert len(graphs) == 2


def test_takes_the_architecture_that_is_asked_for():
    assert precompile.target("sm_80") == (80, 108)
    if not torch.cuda.is_available():
        assert precompile.target() == (90, 132)
