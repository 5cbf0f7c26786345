"""What the interpreter leaves out for speed changes no result and no error."""

import cProfile
import os
import pstats
import subprocess
import sys
import warnings

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

import attn_kernels
import benchmarks.interpreter
from reference.catalogue import DTYPES
from tests.harness import MODULES, real_input

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


@triton.jit
def _double(x):
    return x * 2


@triton.jit
def _integers_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    tl.store(y_ptr + o, tl.sum(_double(x) + (x - 1)[:, None], 1))


@triton.jit
def _shapes_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr + tl.arange(0, BLOCK)) + tl.arange(0, 2 * BLOCK))


@triton.jit
def _static_assert_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 8, "too large")


@triton.jit
def _argument_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr, no_such_argument=1))


def results() -> dict[str, list[torch.Tensor] | str]:
    """Output and gradients of some modules, what integers come to, and the messages of kernels that are wrong."""
    found: dict[str, list[torch.Tensor] | str] = {}
    for name, layout, dtype in (
        ("channel_gate", "contiguous", "fp64"),
        ("cbam", "channels_last", "bf16"),
        ("simam", "contiguous", "fp16"),
    ):
        torch.manual_seed(0)
        module = MODULES[name](attn_kernels, 6)
        x = real_input((2, 6, 5, 3), DTYPES[dtype], layout, torch.device("cpu")).requires_grad_()
        y = module(x, x, "relu")
        found[name] = [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))]
    for dtype in (torch.int8, torch.int32, torch.int64):
        x = torch.tensor([1, -1, 2**31 - 1, -(2**31)]).to(dtype)  # more than fits, but in 64 bits
        y = torch.empty_like(x)
        _integers_kernel[(1,)](x, y, BLOCK=4)
        found[str(dtype)] = [y]
    for kernel in (_shapes_kernel, _static_assert_kernel, _argument_kernel):
        try:
            kernel[(1,)](torch.ones(8), torch.ones(8), BLOCK=8)
        except Exception as error:
            found[kernel.__name__] = f"{type(error).__name__}: {error}"
    return found


def test_results_and_errors_are_those_of_the_plain_interpreter(tmp_path):
    path = tmp_path / "results.pt"
    program = f"from tests.test_interpreter import results; torch.save(results(), {str(path)!r})"
    prepare = "from benchmarks.interpreter import round_to_nearest; round_to_nearest(); torch.set_num_threads(1)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import torch; {prepare}; {program}"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, plain = results(), torch.load(path)
    assert ours.keys() == plain.keys()
    for name, want in plain.items():
        if isinstance(want, str):
            assert ours[name] == want
        else:
            assert all(map(torch.equal, ours[name], want)), name
    assert {type(want) for want in plain.values()} == {list, str}


def test_the_language_is_as_it_was_after_a_launch():
    x = torch.arange(4)
    before = vars(tl).copy(), vars(tl.core).copy(), vars(tl.tensor).copy()
    _integers_kernel[(1,)](x, torch.empty_like(x), BLOCK=4)
    assert (vars(tl), vars(tl.core), vars(tl.tensor)) == before
    with pytest.raises(InterpreterError, match="too large"):
        _static_assert_kernel[(1,)](x, x, BLOCK=8)
    assert (vars(tl), vars(tl.core), vars(tl.tensor)) == before
    with pytest.raises(ValueError, match=r"Did you forget to add @triton.jit"):
        tl.arange(0, 4)


def test_repeated_work_is_skipped():
    """So that a version of Triton with other internals, where nothing is left out, is noticed."""
    assert not interpreter.interpreter_builder.options.sanitize_overflow
    x = torch.arange(4)
    with cProfile.Profile() as profile:
        _integers_kernel[(1,)](x, torch.empty_like(x), BLOCK=4)
    called = {name for file, _, name in pstats.Stats(profile).stats if file == benchmarks.interpreter.__file__}
    assert {"patch_once", "numpy_type_by_name", "initialize_from_known"} < called
    assert {"initialize_with_known_shape", "cast_to_another_type", "broadcast_to_another_shape"} < called
