"""What `import attn_kernels` and `import reference` need: no GPU, no driver, no Triton."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import reference
from reference.catalogue import OPERATORS

pytestmark = pytest.mark.fast


# As though it were not installed: importing it raises, and find_spec, which torch asks from 2.14 on, finds none.
WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
"""

# Where no kernel can run, the result is the reference's, to the last bit.
EQUALS_REFERENCE = """
import torch
import attn_kernels, attn_kernels.models, reference
from reference.catalogue import OPERATORS

torch.manual_seed(0)
for name in OPERATORS:
    arguments = () if name == "SpatialGate" else (32,)
    ours, theirs = getattr(attn_kernels, name)(*arguments), getattr(reference, name)(*arguments)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, residual, results = torch.randn(2, 32, 5, 7), torch.randn(2, 32, 5, 7), []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf, residual, "relu")
        y.square().sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()))
    assert y.abs().sum() > 0, name
    assert all(map(torch.equal, *results)), name
"""


def python(program: str, **environment: str) -> None:
    """Run ``program`` in a fresh interpreter that sees no GPU."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_driver():
    python(EQUALS_REFERENCE)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_without_triton(interpret):
    program = WITHOUT_TRITON + EQUALS_REFERENCE + 'assert sys.modules["triton"] is None'
    python(program, TRITON_INTERPRET=interpret)


def test_reference_needs_no_triton():
    program = (
        "import sys, torch, reference, reference.models\n"
        "reference.models.resnet(18, 'cbam').eval()(torch.zeros(1, 3, 32, 32))\n"
        "found = [name for name in sys.modules if name.partition('.')[0] in ('triton', 'attn_kernels')]\n"
        "assert not found, found"
    )
    python(program)


def test_public_names():
    import attn_kernels

    assert set(OPERATORS) <= set(attn_kernels.__all__)
    assert len(set(attn_kernels.__all__)) == len(attn_kernels.__all__)
    for name in attn_kernels.__all__:
        assert hasattr(attn_kernels, name), name


def test_functional_forms():
    import attn_kernels.functional

    for name in ("se", "simam", "channel_gate", "spatial_gate", "cbam", "bam"):
        ours = inspect.signature(getattr(attn_kernels.functional, name)).parameters.values()
        theirs = inspect.signature(getattr(reference, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs], name


@pytest.mark.parametrize("name", OPERATORS)
def test_modules_are_the_references(name):
    import attn_kernels

    arguments = () if name == "SpatialGate" else (32,)
    ours, theirs = getattr(attn_kernels, name)(*arguments), getattr(reference, name)(*arguments)
    assert isinstance(ours, getattr(reference, name))
    assert type(ours) is not type(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
