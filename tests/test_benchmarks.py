"""The benchmarks: the accuracy rule, the meter of traffic, and the check that ``python -m benchmarks`` runs."""

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from rich.console import Console
from torch import library
from triton.runtime import interpreter

import attn_kernels.models
import reference.models
from benchmarks.__main__ import main
from benchmarks.accuracy import Verdict, average, compare
from benchmarks.device import prepare
from benchmarks.meter import meter
from benchmarks.photo import MAPS, batch, feature_maps, photograph
from benchmarks.report import Case, Cost, time_table

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")


@pytest.fixture
def results():
    """Fused, eager and oracle in bfloat16, where eager is rounded once and fused is the same."""
    oracle = torch.randn(64, 64, dtype=torch.float64)
    return oracle.bfloat16(), oracle.bfloat16(), oracle


class TestAccuracyRule:
    def test_accepts_what_eager_computes(self, results):
        verdict = compare(*results)
        assert verdict.ok
        assert verdict.error == verdict.eager_error <= 2**-8

    def test_accepts_one_unit_in_the_last_place_where_eager_is_exact(self):
        oracle = torch.tensor([1.0, 0.25], dtype=torch.float64)
        assert compare(torch.tensor([1.0 + 2**-23, 0.25]), oracle.float(), oracle).ok
        assert not compare(torch.tensor([1.0 + 2**-22, 0.25]), oracle.float(), oracle).ok

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
    def test_rejects_a_number_that_is_not_finite(self, results, wrong):
        fused, eager, oracle = results
        fused[3, 5] = wrong
        assert not compare(fused, eager, oracle).ok
        eager[3, 5] = wrong  # eager's own failure excuses nothing
        assert not compare(fused, eager, oracle).ok

    @pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
    def test_wants_the_oracles_nan_and_infinities(self, results, special):
        fused, eager, oracle = results
        oracle[3, 5] = eager[3, 5] = special
        assert not compare(fused, eager, oracle).ok
        fused[3, 5] = -special if math.isinf(special) else math.inf
        assert not compare(fused, eager, oracle).ok
        fused[3, 5] = special
        assert compare(fused, eager, oracle).ok

    def test_takes_overflow_of_the_dtype_for_infinity(self):
        oracle = torch.tensor([1e5, 1.0], dtype=torch.float64)
        assert compare(oracle.half(), oracle.half(), oracle).ok
        assert not compare(torch.tensor([65504.0, 1.0]).half(), oracle.half(), oracle).ok

    def test_rejects_one_wrong_element(self, results):
        fused, eager, oracle = results
        i = oracle.abs().argmin()
        fused.view(-1)[i] = oracle.abs().max() * 0.05
        assert not compare(fused, eager, oracle).ok

    def test_rejects_zeros_although_one_element_of_eager_is_far_off(self, results):
        fused, eager, oracle = results
        eager[0, 0] = oracle[0, 0] + oracle.abs().max()
        assert compare(fused, eager, oracle).ok
        assert not compare(torch.zeros_like(fused), eager, oracle).ok

    def test_rejects_another_dtype_or_shape(self, results):
        fused, eager, oracle = results
        assert not compare(oracle.float(), eager, oracle).ok
        assert not compare(fused[:1], eager, oracle).ok

    def test_wants_exact_zeros_unless_given_a_scale(self):
        zero = torch.zeros(4, dtype=torch.float64)
        noise = torch.full((4,), 1e-9)
        assert compare(zero.float(), zero.float(), zero).ok
        assert not compare(noise, zero.float(), zero).ok
        assert compare(noise, zero.float(), zero, scale=1.0).ok


class TestAverageOfDraws:
    """Few numbers, each of one rounding, more or less amplified from draw to draw as by BatchNorm."""

    @staticmethod
    def draws(times: float) -> list[Verdict]:
        """400, with errors ``times`` those of eager."""
        verdicts = []
        for _ in range(400):
            oracle = torch.randn(8, dtype=torch.float64)
            amplified = 2.0 ** torch.randint(-20, -10, ()).item()
            fused, eager = (oracle + size * amplified * torch.randn(8, dtype=torch.float64) for size in (times, 1.0))
            verdicts.append(compare(fused.float(), eager.float(), oracle))
        return verdicts

    @staticmethod
    def wrong(verdicts: list[Verdict]) -> float:
        """The part of groups of 4 that is found wrong."""
        return sum(not average(verdicts[i : i + 4]).ok for i in range(0, 400, 4)) / 100

    def test_is_no_matter_of_luck(self):
        same, worse = self.draws(1.0), self.draws(4.0)
        alone = sum(not verdict.ok for verdict in same) / 400
        assert self.wrong(same) < alone / 2
        assert self.wrong(worse) > 0.98

    @pytest.mark.parametrize("error", [8.0, math.inf])
    def test_does_not_hide_one_draw_that_is_far_off(self, error):
        fine, wrong = Verdict(0.5, 0.25, 1.0, 0.5), Verdict(error, 0.25, 1.0, error)
        assert average([fine] * 4).ok
        assert not average([fine, fine, wrong, fine]).ok


@triton.jit
def _double_kernel(x_ptr, y_ptr, programs_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n) * 2, mask=o < n)
    tl.atomic_add(programs_ptr, 1)


def _double(x: torch.Tensor) -> torch.Tensor:
    y, programs = torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
    _double_kernel[(triton.cdiv(x.numel(), 64),)](x, y, programs, x.numel(), BLOCK=64)
    assert programs.item() == triton.cdiv(x.numel(), 64)
    return y


@pytest.fixture(scope="module")
def double_sum():
    """An operator of a library whose implementation launches Triton and aten, and an autograd Function above it."""
    definitions = library.Library("test_benchmarks", "DEF")
    definitions.define("double_sum(Tensor x) -> Tensor")
    definitions.impl("double_sum", lambda x: _double(x).sum(), "CPU")
    definitions.define("double_sum_backward(Tensor dy, Tensor x) -> Tensor")
    definitions.impl("double_sum_backward", lambda dy, x: torch.full_like(x, 2) * dy, "CPU")

    class DoubleSum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.ops.test_benchmarks.double_sum.default(x)

        @staticmethod
        def backward(ctx, dy):
            return torch.ops.test_benchmarks.double_sum_backward.default(dy, *ctx.saved_tensors)

    yield DoubleSum.apply
    definitions._destroy()


@interpreted
class TestMeter:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_counts_the_unmasked_lanes_of_a_triton_kernel(self, dtype):
        x = torch.randn(100, dtype=dtype)
        with meter() as traffic:
            y = _double(x)
        assert torch.equal(y, x * 2)
        assert traffic.triton_launches == ["_double_kernel"]
        assert traffic.aten_launches == ["zeros"]
        programs = 2 * 4  # an atomic addition of an int32 in each of 2 programs
        assert (traffic.loaded, traffic.stored) == (x.nbytes + programs, x.nbytes + programs + 4)
        assert (traffic.per_launch[-1].loaded, traffic.per_launch[-1].stored) == (x.nbytes + programs,) * 2

    @pytest.mark.parametrize(
        ("call", "name", "loaded", "stored"),
        [
            (lambda x, w: x * 2, "mul", 24, 24),
            (lambda x, w: x + w, "add", 32, 24),
            (lambda x, w: x.add_(w), "add_", 32, 24),
            (lambda x, w: x.copy_(w), "copy_", 8, 24),
            (lambda x, w: x.zero_(), "zero_", 0, 24),
            (lambda x, w: torch.zeros_like(x), "zeros_like", 0, 24),
            (lambda x, w: torch.mul(x, 2, out=torch.empty(3, 2)), "mul", 24, 24),
            (lambda x, w: w.expand(3, 2).clone(), "clone", 8, 24),
            (lambda x, w: x.max(0), "max", 24, 8 + 16),
            (lambda x, w: torch.cat((x, x)), "cat", 48, 48),
            (lambda x, w: x.double(), "_to_copy", 24, 48),
            (lambda x, w: x.t().contiguous(), "clone", 24, 24),
            (lambda x, w: x @ w, "mv", 32, 12),
        ],
    )
    def test_counts_the_operands_of_an_aten_operator(self, call, name, loaded, stored):
        x, w = torch.ones(3, 2), torch.ones(2)
        with meter() as traffic:
            call(x, w)
        assert (traffic.aten_launches, traffic.loaded, traffic.stored) == ([name], loaded, stored)

    def test_counts_no_view_and_no_allocation(self):
        x = torch.ones(3, 2)
        with meter() as traffic:
            x.view(6)[1:].unsqueeze(0).expand(2, 5).detach()
            x.contiguous().float(), torch.empty(3, 2).t_()
            torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2,), (1,))
            torch.ops.aten._unsafe_view(x, [6])
            x[:0] * 2
        assert traffic.launches == traffic.touched == 0

    def test_sees_backward(self):
        x = torch.ones(3, 2, requires_grad=True)
        with meter() as forward:
            y = torch.relu(x)
        with meter() as backward:
            torch.autograd.grad(y, x, torch.ones_like(y))
        assert forward.aten_launches == ["relu"]
        assert backward.aten_launches == ["ones_like", "threshold_backward"]
        assert (backward.loaded, backward.stored) == (48, 48)

    def test_sees_into_the_operators_of_a_library(self, double_sum):
        x = torch.randn(100, requires_grad=True)
        with meter() as forward:
            y = double_sum(x)
        with meter() as backward:
            (dx,) = torch.autograd.grad(y, x, torch.tensor(3.0))
        assert torch.equal(dx, torch.full_like(x, 6))
        assert forward.triton_launches == ["_double_kernel"]
        assert forward.aten_launches == ["zeros", "sum"]
        assert forward.touched == 2 * x.nbytes + 2 * (2 * 4) + 4 + x.nbytes + 4
        assert backward.aten_launches == ["full_like", "mul"]
        assert backward.touched == x.nbytes + 2 * x.nbytes + 4

    def test_agrees_with_the_byte_budget_of_eager(self):
        x = torch.randn(2, 16, 56, 56, requires_grad=True)
        module = reference.SE(16)
        with meter() as forward:
            y = module(x)
        with meter() as backward:
            torch.autograd.grad(y, x, torch.ones_like(y))
        # Pool 1, scale 2; the gradients of the scale 3 and of the gate 3 + 1, of the pool and their sum 1 + 3; ones 1.
        assert forward.touched / x.nbytes == pytest.approx(3, abs=0.01)
        assert backward.touched / x.nbytes == pytest.approx(11, abs=0.01)

    def test_leaves_everything_as_it_was(self):
        before = vars(interpreter.InterpreterBuilder).copy(), interpreter.GridExecutor.__call__
        with pytest.raises(ZeroDivisionError), meter() as traffic:
            raise ZeroDivisionError
        _double(torch.ones(3))
        assert traffic.launches == 0
        assert (vars(interpreter.InterpreterBuilder).copy(), interpreter.GridExecutor.__call__) == before

    def test_refuses_to_count_nothing(self, monkeypatch):
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), meter():
            pass


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o).to(y_ptr.dtype.element_ty))


@interpreted
def test_the_interpreter_rounds_to_the_nearest_bfloat16():
    prepare()
    x = torch.randn(256)
    # Ties to even, a carry into the exponent, overflow, and what is not finite.
    x[:8] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1.9999999, -1.9999999, 3.4e38, math.inf, -math.inf, math.nan])
    y = torch.empty(256, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, BLOCK=256)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


class TestPhotograph:
    def test_loads(self):
        photo = photograph()
        assert photo.shape == (3, 600, 512)
        assert photo.dtype == torch.uint8
        assert photo.float().std() > 50

    def test_batch_is_normalised_and_repeatable(self):
        images = batch(3, 64)
        assert images.shape == (3, 3, 64, 64)
        assert torch.equal(images, batch(3, 64))
        assert not torch.equal(images[0], images[2])
        assert 0.5 < images.std() < 2

    def test_feature_maps_follow_a_relu(self):
        state = torch.get_rng_state()
        maps = feature_maps(batch(2, 64))
        assert torch.equal(torch.get_rng_state(), state)
        assert {name: t.shape[1:] for name, t in maps.items()} == dict(
            zip(MAPS, [(64, 16, 16), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)], strict=True)
        )
        for t in maps.values():
            assert t.min() == 0
            assert 0.1 < (t > 0).float().mean() < 1
            assert t.isfinite().all()


def _no_gradient_of_x(se, x, residual, activation):
    return right(se, x.detach() + 0 * x, residual, activation)


def _double_gradient_of_residual(se, x, residual, activation):
    return right(se, x, 2 * residual - residual.detach(), activation)


def _nan(se, *inputs):
    return right(se, *inputs) + math.nan


def _slightly_off(se, *inputs):
    return right(se, *inputs) * (1 + 1e-6)


def _parameter_gradient_off(se, *inputs):
    weight = se.fc1.weight.sum()
    return right(se, *inputs) + 1e-4 * (weight - weight.detach())


right = reference.SE.forward


class TestCheck:
    arguments = ("check", "SE", "--maps", "stage4", "--dtypes", "float32")

    def test_passes_with_the_real_module(self, capsys):
        assert main(self.arguments) == 0
        out = capsys.readouterr().out
        assert "8 of 8 comparisons agree" in out
        assert "WRONG" not in out
        assert "\x1b" not in out

    @pytest.mark.parametrize(
        ("change", "place", "tensor"),
        [
            (_slightly_off, "stage4, contiguous", "output"),
            (_nan, "stage4, contiguous", "output"),
            (_no_gradient_of_x, "stage4, contiguous", "grad x"),
            (_double_gradient_of_residual, "stage4, contiguous", "grad residual"),
            (_parameter_gradient_off, "all maps", "grad fc1.weight and bias"),
        ],
    )
    def test_exit_status_is_1_when_a_module_is_wrong(self, monkeypatch, capsys, change, place, tensor):
        monkeypatch.setattr(attn_kernels, "SE", type("SE", (reference.SE,), {"forward": change}))
        assert main(self.arguments) == 1
        assert f"WRONG SE, {place}, float32: {tensor}" in capsys.readouterr().out

    def test_exit_status_is_1_when_the_network_is_wrong(self, monkeypatch, capsys):
        def wrong_network():
            network = reference.models.se_resnet_50()
            network.avgpool.register_forward_hook(lambda module, args, out: out * (1 + 1e-4))
            return network

        monkeypatch.setattr(attn_kernels.models, "se_resnet_50", wrong_network)
        assert main(["check", "network"]) == 1
        assert "WRONG se_resnet_50, the photograph, float32: logits" in capsys.readouterr().out

    def test_times_and_ratios_are_in_the_table(self):
        seconds = {"eager": 6e-5, "compile": 3e-5, "fused": 2e-5}
        cost = Cost((32, 256, 56, 56), 1, {}, seconds)
        console = Console(width=150, record=True, file=io.StringIO())
        console.print(time_table({Case("SE", "stage1", "channels_last", "bfloat16", True): cost}))
        text = console.export_text()
        assert "32x256x56x56" in text
        assert text.split("add + relu")[1].split()[:5] == ["60.0", "30.0", "20.0", "3.00", "1.50"]
        assert "3.00 times as fast as eager, 1.50 as torch.compile" in text

    def test_unknown_names_are_refused(self, capsys):
        with pytest.raises(SystemExit) as exit:
            main(["check", "SEE"])
        assert exit.value.code == 2
        assert "expected SE, CBAM, BAM, SimAM or network, got SEE" in capsys.readouterr().err

    def test_check_is_the_default_command(self, capsys):
        assert main(self.arguments[1:]) == 0


def test_no_command_imports_triton_before_it_runs():
    """The parser knows every command; whether Triton interprets is decided by the one that runs."""
    code = (
        "import sys; from importlib import import_module; from benchmarks.__main__ import COMMANDS; "
        "[import_module(f'benchmarks.{name}') for name in COMMANDS]; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
