"""Timing on a GPU: planning, rows, statistics, plots and, with a GPU that only pretends, the measuring itself."""

import csv
import errno
import itertools
import math
import sys
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from torch import nn

import reference.models
from benchmarks import correctness, plan, plot, rehearsal, rows, runner, speed, timing, train, users
from benchmarks.__main__ import COMMANDS, main
from benchmarks.plan import Cell, Costs, execute
from benchmarks.rows import Environment, Measurement, Results, Row, read
from benchmarks.shapes import DTYPES, KERNELS, MODES, bytes_of
from benchmarks.timing import Quantiles
from reference.catalogue import LAYOUTS

MADE_UP = Path(__file__).parent / "data" / "made_up.csv"  # no GPU has measured any of it
HERE = Environment("Made-up GPU", "0.0", "0.0", "0.0", "abc", "python -m benchmarks speed")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU")


def a_cell(
    provider="fused", rank=0, modes=("forward", "both"), kernel="se", suite="speed", shape=(2, 8, 4, 4), **kwargs
):
    return Cell(suite, kernel, provider, shape, "contiguous", "fp32", modes, rank, **kwargs)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "made_up_gpu.csv", HERE)


class TestQuantiles:
    def test_of_samples(self):
        assert Quantiles.of([*range(11)]) == (2, 5, 8)

    def test_of_what_is_derived(self):
        times = Quantiles(1, 2, 4)
        assert times.times(3) == (3, 6, 12)
        assert times.under(8) == (2, 4, 8)
        assert times.above(Quantiles(0.5, 1, 1.5)) == (-0.5, 1, 3.5)


class TestRows:
    def test_are_read_as_written(self, results):
        written = results.append(a_cell().place, "forward", [Measurement("time", "us", Quantiles(1, 2.5, 1e6 / 3))])
        written += results.fail(a_cell().place, "both", 'OutOfMemoryError: tried,\n "much"')
        found = read(results.path)
        assert found[0]._replace(p80=None) == written[0]._replace(p80=None)
        assert math.isclose(found[0].p80, 1e6 / 3, rel_tol=1e-5)
        assert found[1] == written[1]
        assert found[1].note == 'OutOfMemoryError: tried, "much"'
        assert found[0].environment == HERE

    def test_make_a_rerun_skip_their_cells(self, results):
        cell = a_cell()
        results.append(cell.place, "forward", [Measurement("time", "us", Quantiles(1, 2, 3))])
        assert not Results(results.path, HERE).has(cell.place, cell.modes)
        results.fail(cell.place, "both", "why")
        again = Results(results.path, HERE)
        assert again.has(cell.place, cell.modes)
        assert again.find(cell.place, "forward", "time") == (1, 2, 3)
        assert not again.has(a_cell("reference").place, cell.modes)
        for other in ({"commit": "abd"}, {"gpu": "Another"}, {"torch": "0.1"}, {"triton": "0.1"}):
            environment = HERE._replace(**other)
            assert not Results(results.path, environment).has(cell.place, cell.modes)
            assert Results(results.path, environment).find(cell.place, "forward", "time") is None

    def test_tell_of_a_cell_that_killed_its_process(self, results):
        cell = a_cell()
        with results.running(cell.place, cell.modes):
            word = results.path.with_name(f"{results.path.name}.running").read_text()
        assert results.settle() == []  # it ended
        results.append(cell.place, "forward", [Measurement("time", "us", Quantiles(1, 2, 3))])
        results.path.with_name(f"{results.path.name}.running").write_text(word)
        again = Results(results.path, HERE)
        assert [(row.mode, row.metric) for row in again.settle()] == [("both", "failed")]
        assert again.has(cell.place, cell.modes)
        assert again.settle() == []
        assert len(read(results.path)) == 2

    def test_go_on_where_a_disk_is_full(self, results, monkeypatch, capsys):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "open", full)
        results.append(a_cell().place, "both", [Measurement("time", "us", Quantiles(1, 2, 3))])
        assert results.has(a_cell().place, ["both"])
        assert "se,fused,both,time,us" in capsys.readouterr().err

    def test_of_another_file_count_as_measured(self, results, tmp_path):
        results.append(a_cell().place, "both", [Measurement("time", "us", Quantiles(1, 2, 3))])
        other = Results(tmp_path / "out" / "b.csv", HERE, [results.path])
        assert other.has(a_cell().place, ["both"])
        other.append(a_cell("copy").place, "both", [Measurement("time", "us", Quantiles(1, 2, 3))])
        assert [row.provider for row in read(other.path)] == ["copy"]

    def test_survive_a_line_cut_short(self, results):
        for provider in ("copy", "fused"):
            results.append(a_cell(provider).place, "both", [Measurement("time", "us", Quantiles(1, 2, 3))])
        results.path.write_text(results.path.read_text()[:-60])
        again = Results(results.path, HERE)
        assert [row.provider for row in again.rows] == ["copy"]
        again.append(a_cell("reference").place, "both", [Measurement("time", "us", Quantiles(1, 2, 3))])
        assert [row.provider for row in read(results.path)] == ["copy", "reference"]

    def test_of_a_table_of_another_kind_are_none(self, tmp_path):
        (tmp_path / "traffic.csv").write_text("op,bytes\nse,3\n")
        assert read(tmp_path / "traffic.csv") == read(tmp_path / "nothing.csv") == []

    def test_name_the_commit_and_what_differs_from_it(self, monkeypatch):
        answers = {"rev-parse": "0123456789ab", "status": ""}
        monkeypatch.setattr(rows, "output", lambda *command: answers[command[3]])
        assert rows.source_commit() == "0123456789ab"
        answers["status"] = " M attn_kernels/functional.py"
        dirty = rows.source_commit()
        assert dirty.startswith("0123456789ab+")
        answers["rev-parse"] = ""
        assert rows.source_commit() == dirty.replace("0123456789ab", "unknown")
        monkeypatch.setattr(rows, "SOURCES", ("reference",))
        assert rows.source_commit() != dirty.replace("0123456789ab", "unknown")

    def test_name_the_command_without_its_places(self, monkeypatch):
        argv = ["x", "all", "--out", "/some where/out", "--minutes", "8", "--commit=abc"]
        monkeypatch.setattr(sys, "argv", argv)
        environment = Environment.current("abc")
        assert environment.command == "python -m benchmarks all --minutes 8"
        assert environment._replace(gpu="NVIDIA H200").file_name == "nvidia_h200.csv"

    def test_of_no_program_say_nothing(self):
        assert rows.output("no-such-program-anywhere") == ""


class Clock:
    """Stands still unless something is measured."""

    def __init__(self, seconds):
        self.now, self.seconds, self.measured = 0.0, seconds, []

    def __call__(self):
        return self.now

    def measure(self, cell, results):
        self.measured.append(cell.provider)
        self.now += self.seconds[cell.provider]
        for mode in cell.modes:
            yield mode, [Measurement("time", "us", Quantiles(1, 2, 3))]


class TestExecute:
    def run(self, cells, clock, results, priors=None, deadline=math.inf):
        costs = Costs({("speed", name): seconds for name, seconds in (priors or clock.seconds).items()})
        return execute(cells, {"speed": clock.measure}, results, costs, deadline, clock)

    def test_goes_by_rank_and_skips_what_is_known(self, results):
        clock = Clock(dict.fromkeys("abcd", 1))
        cells = [a_cell("a", 2), a_cell("b", 0), a_cell("c", 1), a_cell("d", 1)]
        for mode in cells[2].modes:
            results.fail(cells[2].place, mode, "known")
        outcome = self.run(cells, clock, results)
        assert clock.measured == ["b", "d", "a"]
        assert outcome == (3, 0, 1, 0)
        assert self.run(cells, clock, Results(results.path, HERE)) == (0, 0, 4, 0)

    def test_stops_in_time_and_gives_way_to_what_still_fits(self, results):
        clock = Clock({"slow": 50, "quick": 5})
        cells = [
            a_cell("slow", 0),
            a_cell("slow", 1, kernel="bam"),
            a_cell("quick", 2),
            a_cell("quick", 3, kernel="bam"),
        ]
        outcome = self.run(cells, clock, results, deadline=58)
        assert clock.measured == ["slow", "quick"]
        assert outcome == (2, 0, 0, 2)
        assert clock.now <= 58
        assert "run the same again" in str(outcome)

    def test_learns_what_cells_take(self, results):
        clock = Clock({"a": 30})
        cells = [a_cell("a", kernel=kernel) for kernel in ("se", "bam", "cbam")]
        outcome = self.run(cells, clock, results, priors={"a": 1}, deadline=59)
        assert clock.measured == ["a"]
        assert outcome.left == 2

    def test_expects_the_slowest_of_the_latest(self):
        costs = Costs({("speed", "fused"): 7})
        assert costs.estimate(a_cell()) == 7
        for seconds in (90, 2, 3, 1, 1, 1):
            costs.observe(a_cell(), seconds)
        assert costs.estimate(a_cell()) == 3

    def test_records_a_failure_and_goes_on(self, results, capsys):
        clock = Clock({"bad": 1, "good": 1})

        def measure(cell, results):
            measured = clock.measure(cell, results)
            yield next(measured)
            if cell.provider == "bad":
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield from measured

        costs = Costs({("speed", "bad"): 1, ("speed", "good"): 1})
        outcome = execute([a_cell("bad"), a_cell("good")], {"speed": measure}, results, costs, clock=clock)
        assert outcome == (1, 1, 0, 0)
        found = [(row.provider, row.mode, row.metric, row.note) for row in read(results.path)]
        assert found == [
            ("bad", "forward", "time", ""),
            ("bad", "both", "failed", "OutOfMemoryError: CUDA out of memory"),
            ("good", "forward", "time", ""),
            ("good", "both", "time", ""),
        ]
        assert "OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out

    def test_works_without_rich(self, results, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "rich.console", None)
        self.run([a_cell("a")], Clock({"a": 1}), results)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["kernel", "provider", "shape", "layout", "dtype", "mode"]
        assert lines[1].split()[:6] == ["se", "a", "2x8x4x4", "contiguous", "fp32", "forward"]
        assert lines[1].endswith("time 2 us")


class TestPlan:
    def test_holds_every_cell_once(self):
        cells = train.cells() + speed.cells()
        assert len({(cell.place, cell.modes) for cell in cells}) == len(cells)
        shapes = {cell.shape for cell in cells if cell.kernel == "se"}
        assert shapes == {
            (n, c, s, s) for n in (1, 8, 32, 128, 256) for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7))
        }
        for cell in cells:
            assert (cell.suite, cell.provider) in speed.PRIORS | train.PRIORS
            assert (cell.fused is not None) == (cell.provider in ("fused", "fused_compile"))
            assert cell.fused in (None, *KERNELS)

    def test_of_speed_begins_with_what_tells_most(self):
        cells = sorted(speed.cells(), key=lambda cell: cell.rank)
        first = list(itertools.product(speed.RESNET_50, ["se", "se_add_relu", "cbam", "bam", "simam"]))
        compared = ["copy", "fused", "eager", "compile"]
        expected = [
            (kernel, provider, (batch, channels, side, side), layout, "bf16")
            for batch in (32, 256)
            for layout in ("channels_last", "contiguous")
            for (channels, side, _), kernel in first
            for provider in compared
        ]
        assert [(c.kernel, c.provider, c.shape, c.layout, c.dtype) for c in cells[: len(expected)]] == expected
        tuned = [cell.provider == "compile_max_autotune" for cell in cells]
        assert tuned == sorted(tuned)

    def test_of_train_begins_with_what_tells_most(self):
        networks = ["resnet50", "se_resnet50", "cbam_resnet50", "simam_resnet50", "bam_resnet50"]
        networks += ["timm/efficientnet_b0_plain", "timm/efficientnet_b0"]
        cells = sorted(train.cells(), key=lambda cell: cell.rank)
        for providers in (("eager", "fused"), ("compile", "fused_compile")):
            expected = [
                (network, provider)
                for network in networks
                for provider in providers
                if provider not in train.FUSED or network != train.plain_of(network)
            ]
            first, cells = cells[: len(expected)], cells[len(expected) :]
            assert [(cell.kernel, cell.provider) for cell in first] == expected
            assert {(*cell.modes, cell.dtype, cell.shape[0]) for cell in first} == {("train", "bf16", 128)}

    def test_measures_a_plain_network_before_its_tax(self):
        seen = set()
        for cell in sorted(train.cells(), key=lambda cell: cell.rank):
            plain = train.plain_of(cell.kernel), train.PLAIN_PROVIDER[cell.provider], cell.dtype, cell.modes
            seen |= {plain} if cell.kernel == plain[0] else set()
            assert plain in seen

    def test_holds_the_plain_network_of_what_is_asked_for(self):
        cells = train.cells(["simam_resnet50", "timm/seresnet50"], ["fused_compile"], [8], ["bf16"], ["train"])
        assert [(cell.kernel, cell.provider) for cell in cells] == [
            ("resnet50", "compile"),
            ("simam_resnet50", "fused_compile"),
            ("timm/seresnet50_plain", "compile"),
            ("timm/seresnet50", "fused_compile"),
        ]

    def test_leaves_out_what_is_not_installed(self, monkeypatch):
        for module in (users, train):
            monkeypatch.setattr(module, "find_spec", lambda name: None)
        assert {c.kernel for c in speed.cells(batches=[32]) if c.provider == "eager"} == {"simam", "bam"}
        assert {c.kernel for c in speed.cells(batches=[32]) if c.provider == "reference"} == set(KERNELS)
        found = {(cell.kernel, cell.provider) for cell in train.cells(modes=["train"], dtypes=["bf16"])}
        assert {name for name, provider in found if provider == "eager"} == {
            "resnet50",
            "bam_resnet50",
            "simam_resnet50",
        }
        assert ("se_resnet50", "fused") in found
        assert not any("/" in name for name, _ in found)

    @pytest.mark.parametrize(("kernel", "stages"), [("se_efficientnet_b0", 10), ("se_mobilenet_v3", 6)])
    def test_gives_the_gates_of_other_networks_their_size(self, kernel, stages):
        places = {cell.shape[1:3] for cell in speed.cells([kernel])}
        assert len(places) == stages
        for channels, side in places:
            hidden = KERNELS[kernel].build(reference, channels, side).fc1.out_features
            assert hidden == KERNELS[kernel].hidden(channels, side) < channels // 2


@without_gpu
@pytest.mark.usefixtures("single_launch")
class TestCommands:
    @pytest.mark.parametrize("command", ["speed", "train", "smoke", "once se", "fuzz"])
    def test_say_what_is_missing(self, command, capsys):
        assert main(command.split()) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "needs an NVIDIA GPU" in err

    def test_select_single_steps(self, monkeypatch):
        asked = []
        monkeypatch.setattr(runner, "run", lambda plan, *args: asked.append(plan()) or 0)
        command = "speed --kernels se_add_relu --providers eager --batches 32 --dtypes bf16 --layouts contiguous"
        assert main(f"{command} --minutes 1 --out somewhere --commit abc".split()) == 0
        command = "train --networks se_resnet50 --providers fused --batches 64 --dtypes bf16 --modes train"
        assert main(f"{command} --minutes 1 --out somewhere --commit abc".split()) == 0
        assert [{cell.kernel for cell in cells} for cells in asked] == [{"se_add_relu"}, {"resnet50", "se_resnet50"}]
        assert [len(cells) for cells in asked] == [4, 2]
        assert {cell.shape[0] for cell in asked[1]} == {64}

    @pytest.mark.parametrize("command", sorted({*COMMANDS} - {"check", "once"}))
    def test_show_an_example(self, command, capsys):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: python -m benchmarks {command}" in " ".join(capsys.readouterr().out.split())

    def run(self, tmp_path, monkeypatch, **options):
        """What is left of a run whose SE is wrong, and its exit status."""
        monkeypatch.setattr(runner, "what_is_missing", lambda: None)
        monkeypatch.setattr(runner, "failure", lambda kernel, *_: "off" if kernel == "se" else None)
        clock = Clock(dict.fromkeys(("fused", "reference"), 1))
        cells = [a_cell("fused", fused="se"), a_cell("reference"), a_cell("fused", kernel="bam", fused="bam")]
        options = {"command": "speed", "out": tmp_path, "commit": "abc", "minutes": math.inf, **options}
        priors = {("speed", name): 1 for name in clock.seconds}
        status = runner.run(lambda: cells, {"speed": clock.measure}, priors, SimpleNamespace(**options))
        return status, [row for file in tmp_path.glob("*.csv") for row in read(file)]

    def test_mark_results_of_what_is_wrong(self, monkeypatch, tmp_path, capsys):
        status, found = self.run(tmp_path, monkeypatch)
        assert status == 1
        assert "WRONG se, off" in capsys.readouterr().err
        assert (found[0].mode, found[0].metric, found[0].note) == ("correctness", "failed", "WRONG: off")
        notes = {(row.kernel, row.provider): row.note for row in found[1:]}
        assert notes == {("se", "fused"): "WRONG: off", ("se", "reference"): "", ("bam", "fused"): ""}
        # Again: nothing is left, and nothing is checked or measured twice.
        assert self.run(tmp_path, monkeypatch) == (0, found)

    def test_say_that_cells_are_left(self, monkeypatch, tmp_path):
        status, found = self.run(tmp_path, monkeypatch, minutes=0)
        assert status == runner.UNFINISHED
        assert len(found) == 1  # what is wrong

    def test_tell_plain_launches_apart(self, monkeypatch, tmp_path):
        _, before = self.run(tmp_path, monkeypatch)
        monkeypatch.setenv("ATTN_KERNELS_SINGLE_LAUNCH", "0")
        _, after = self.run(tmp_path, monkeypatch)
        providers = {(row.kernel, row.provider) for row in after[len(before) :]}
        assert providers == {("se", "fused_plain_launches"), ("bam", "fused_plain_launches")}


class TestCorrectness:
    def test_of_what_is_right(self, device):
        assert correctness.failure("se", device) is None

    def test_names_what_is_wrong(self, device, monkeypatch):
        import attn_kernels

        monkeypatch.setattr(attn_kernels, "SimAM", lambda channels: reference.SimAM(e_lambda=1e-2))
        assert "AssertionError" in correctness.failure("simam", device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_at_the_size_that_is_timed(self, dtype):
        x, dy = torch.rand(2, 16, 8, 8, dtype=dtype), torch.randn(2, 16, 8, 8, dtype=dtype)
        right, wrong = reference.SimAM(), reference.SimAM(e_lambda=1e-2)
        correctness.check_roughly(right, right, x, dy)
        with pytest.raises(correctness.Wrong, match="y: error"):
            correctness.check_roughly(wrong, right, x, dy)
        with pytest.raises(correctness.Wrong, match="error nan"):
            correctness.check_roughly(nn.Sequential(right, nn.Threshold(math.inf, math.nan)), right, x, dy)


@pytest.fixture
def pretended_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision._meta_registrations", types.ModuleType("needs operators of a GPU"))
    with rehearsal.pretended_gpu() as modes:
        yield modes


def measured(results):
    return {(row.mode, row.metric): row for row in results.rows}


@without_gpu
class TestTiming:
    def test_input_sets(self, monkeypatch, pretended_gpu):
        monkeypatch.setattr(timing, "MIN_SETS", 16)
        properties = SimpleNamespace(L2_cache_size=50 * 2**20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        assert timing.input_sets(10 * 2**20) == 20
        assert timing.input_sets(10**3) == timing.MAX_SETS
        assert timing.input_sets(40 * 2**20) == 16  # a longer graph
        assert timing.input_sets(300 * 2**20) == 3
        assert timing.input_sets(2**30) == 2

    def test_makes_each_call_once_after_warming_up(self, pretended_gpu):
        made = []

        def prepare(count):
            return [lambda i=i: made.append(i) for i in range(count)]

        assert timing.device_times(prepare, 4) == pytest.approx((0.25e-3,) * 3)
        assert made == [0, 1, 2, 3] * 2
        assert timing.step_times(lambda: None) == pytest.approx((1e-3,) * 3)
        made.clear()
        assert min(timing.host_times(prepare, 25)) > 0
        assert made == [*range(timing.HOST_CALLS)]

    def test_peak_memory_is_what_is_added(self, pretended_gpu):
        assert timing.peak_memory(lambda: None) == 2 * 2**20
        assert timing.peak_memory(lambda: None, 2**19) == 2.5 * 2**20

    def test_calls_compute_gradients(self):
        module = nn.Conv2d(3, 4, 1)
        sets = [((torch.randn(2, 3, 4, 4, requires_grad=True),), torch.randn(2, 4, 4, 4)) for _ in range(2)]
        calls = speed.calls(module, list(module.parameters()), sets)
        assert calls.keys() == set(MODES)
        forward, backward, both = ([call() for call in calls[mode](3)] for mode in MODES)
        for i, ((x,), dy) in enumerate((sets[0], sets[1], sets[0])):
            y = module(x)
            expected = torch.autograd.grad(y, [x, module.weight, module.bias], dy)
            assert torch.equal(forward[i], y)
            assert all(map(torch.equal, backward[i], expected))
            assert all(map(torch.equal, both[i], (y, *expected)))

    def test_saved_bytes(self):
        x, w = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
        assert speed.saved_bytes(lambda: (x * w).sum(), [x, w]) == 0
        assert speed.saved_bytes(lambda: x.exp()[1:].exp(), [x]) == 2 * x.nbytes - 6 * 4
        assert speed.saved_bytes(lambda: x * w.detach().clone(), [x]) == x.nbytes


@without_gpu
class TestMeasuring:
    """The whole way from a cell to its rows, fused ones in Triton's interpreter."""

    @pytest.mark.parametrize(
        ("kernel", "provider"),
        [
            ("se", "copy"),
            *(("cbam", provider) for provider in ("fused", "reference", "eager")),
            *(("simam", provider) for provider in ("eager", "compile", "fused_compile")),
            *(("bam", provider) for provider in ("fused", "eager")),
            *(("se_add_relu", provider) for provider in ("fused", "eager", "reference", "fused_compile")),
            ("se", "compile_max_autotune"),
            ("se_efficientnet_b0", "fused"),
            ("se_mobilenet_v3", "eager"),
        ],
    )
    def test_speed(self, kernel, provider, results, pretended_gpu):
        fused = kernel if provider in speed.FUSED else None
        shape = (2, 16 if kernel == "bam" else 8, 4, 4)  # the published BAM has a hidden channel for 16
        cell = a_cell(provider, modes=MODES, kernel=kernel, fused=fused, shape=shape)
        cell = cell._replace(dtype="bf16", layout="channels_last")
        message = plan.attempt(cell, speed.measure, results, lambda line: None)
        assert message is None
        found = measured(results)
        metrics = {"time", "bandwidth", "copy_share"}
        metrics |= set() if provider == "copy" else {"host_time", "peak_memory"}
        extra = set() if provider == "copy" else {("forward", "saved_memory")}
        assert found.keys() == set(itertools.product(MODES, metrics)) | extra
        floors = KERNELS[kernel].floors(bytes_of(cell.shape, "bf16"))
        for mode in MODES:
            assert found[mode, "time"].p50 == pytest.approx(500)  # a millisecond for two sets
            assert found[mode, "copy_share"].p50 == pytest.approx(100)
            assert found[mode, "bandwidth"].p50 == pytest.approx(floors[mode] / 500e-6 / 1e9)
            if provider != "copy":
                assert found[mode, "host_time"].p50 > 0
                assert found[mode, "peak_memory"].p50 == 2
        compiled = {
            "compile": ["default"],
            "fused_compile": ["default"],
            "compile_max_autotune": ["max-autotune-no-cudagraphs"],
        }
        assert pretended_gpu == compiled.get(provider, [])

    def test_saved_memory_of_simam(self, results, pretended_gpu):
        saved = {}
        for provider in ("fused", "reference"):
            cell = a_cell(provider, modes=MODES, kernel="simam", fused="simam" if provider == "fused" else None)
            assert plan.attempt(cell, speed.measure, results, lambda line: None) is None
            saved[provider] = results.find(cell.place, "forward", "saved_memory").p50 * 2**20
        assert saved["fused"] == 0  # planes that a program holds are reduced again
        assert saved["reference"] >= 3 * 2 * 8 * 16 * 4

    @pytest.mark.parametrize("kernel", ["simam", "se_add_relu"])
    def test_marks_a_wrong_result(self, kernel, results, pretended_gpu, monkeypatch):
        import attn_kernels

        monkeypatch.setattr(attn_kernels, "SimAM", lambda channels: reference.SimAM(e_lambda=1e-2))
        monkeypatch.setattr(attn_kernels, "SE", partial(reference.SE, gate="hardsigmoid"))
        cell = a_cell(modes=MODES, kernel=kernel, fused=kernel)
        assert plan.attempt(cell, speed.measure, results, lambda line: None) is None
        assert {row.mode for row in results.rows if row.metric == "time"} == set(MODES)
        assert all(row.note.startswith("WRONG: y: error") for row in results.rows)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_users_code_is_in_the_dtype_and_layout_of_x(self, dtype, layout):
        cell = a_cell("eager", kernel="bam", shape=(2, 32, 4, 4))._replace(dtype=dtype, layout=layout)
        module = speed.build(cell, torch.device("cpu"))
        assert {t.dtype for t in module.parameters()} == {DTYPES[dtype]}
        for weight in (t for t in module.parameters() if t.dim() == 4):
            assert weight.is_contiguous(memory_format=LAYOUTS[layout])
        (x,), dy = speed.inputs(cell, torch.device("cpu"), 0)
        assert (module(x).dtype, module(x).stride()) == (dy.dtype, dy.stride())

    def test_no_rounding_decides_what_the_relu_lets_through(self):
        cell = a_cell(kernel="se_add_relu", shape=(2, 16, 32, 32))._replace(dtype="bf16")
        (x, residual), _ = speed.inputs(cell, torch.device("cpu"), 0)
        assert 0.4 < (residual < 0).float().mean() < 0.6
        for gate in (0.01, 0.99):
            assert torch.equal(x * gate + residual > 0, x.double() * gate + residual > 0)

    @pytest.mark.parametrize(("mode", "dtype"), [("train", "bf16"), ("inference", "fp32")])
    def test_train(self, mode, dtype, results, pretended_gpu, monkeypatch):
        monkeypatch.setattr(train, "DEPTH", 18)
        monkeypatch.setattr(timing, "STEPS", 1)
        monkeypatch.setattr(timing, "WARM_STEPS", 0)
        cells = train.cells(["se_resnet50"], batches=[2], dtypes=[dtype], modes=[mode], image_size=32)
        assert len(cells) == 6
        for cell in cells:
            is_quick = cell.provider not in train.COMPILED
            if is_quick or (mode, dtype, cell.kernel) == ("inference", "fp32", train.RESNET):
                assert plan.attempt(cell, train.measure, results, lambda line: None) is None
        network = next(cell for cell in cells if cell.provider == "fused")
        assert results.find(network.place, mode, "time").p50 == pytest.approx(1)
        assert results.find(network.place, mode, "throughput").p50 == pytest.approx(2000)
        assert results.find(network.place, mode, "attention_tax") == pytest.approx((0, 0, 0))
        assert results.find(cells[0].place, mode, "attention_tax") is None

    @pytest.mark.parametrize("peer", ["timm/mobilenetv3_large_100", "torchvision/efficientnet_b0"])
    def test_peers_before_and_after_they_are_fused(self, peer, pretended_gpu):
        cells = [cell for cell in train.cells([peer], modes=["train"], dtypes=["bf16"]) if cell.kernel == peer]
        assert {cell.provider for cell in cells} == set(train.PROVIDERS)
        for cell in cells:
            with torch.device("meta"):
                network = train.build(cell)
            names = {type(module).__name__ for module in network.modules()}
            assert any("Fused" in name for name in names) == (cell.fused is not None)

    @pytest.mark.parametrize("peer", train.PEERS)
    def test_peers_without_attention(self, peer, pretended_gpu):
        plain, whole = train.cells([peer], ["eager"], modes=["train"], dtypes=["bf16"])
        with torch.device("meta"):
            without, network = train.build(plain), train.build(whole)
        gates = [m for m in network.modules() if type(m).__name__ in train.PEERS_ATTENTION]
        assert not any(type(m).__name__ in train.PEERS_ATTENTION for m in without.modules())
        removed = len(list(network.parameters())) - len(list(without.parameters()))
        assert removed == 4 * len(gates) > 0  # two weights and two biases
        assert without(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)

    @pytest.mark.parametrize("attention", [None, "se", "cbam", "bam", "simam"])
    def test_users_networks_are_ours_with_other_modules(self, attention):
        ours = reference.models.resnet(18, attention, 10).eval()
        theirs = users.resnet(18, attention, 10).eval()
        names = {type(module).__name__ for module in theirs.modules()}
        expected = {"se": "SEModule", "cbam": "CbamModule", "bam": "BAM", "simam": "simam_module"}
        assert names & set(expected.values()) == ({expected[attention]} if attention else set())
        if attention == "cbam":  # timm's MLP has no biases
            for block in (m for m in ours.modules() if isinstance(m, reference.ChannelGate)):
                block.mlp[1].bias = block.mlp[3].bias = None
        tensors = [t for t in ours.state_dict().values() if t.dim()]
        found = [t for t in theirs.state_dict().values() if t.dim()]
        x = torch.randn(2, 3, 64, 64)
        assert sorted(t.numel() for t in tensors) == sorted(t.numel() for t in found)
        if attention in (None, "simam"):
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(theirs(x), ours(x))
        assert theirs(x).shape == (2, 10)

    def test_a_training_step_changes_the_network(self, pretended_gpu, monkeypatch):
        monkeypatch.setattr(train, "DEPTH", 18)
        networks = []
        build = train.build
        monkeypatch.setattr(train, "build", lambda cell: networks.append(build(cell)) or networks[-1])
        for cell in train.cells([train.RESNET], ["eager"], batches=[2], image_size=32):
            step = train.steps(cell, torch.device("cpu"))
            before = networks[-1].fc.weight.detach().clone()
            step()
            assert torch.equal(before, networks[-1].fc.weight) == (cell.modes == ("inference",))


class TestPlot:
    @pytest.fixture
    def made_up(self):
        return plot.Measured(row for row in read(MADE_UP) if row.commit == "made-up-2")

    def test_the_data_are_made_up(self):
        assert {row.gpu for row in read(MADE_UP)} == {"Made-up GPU"}

    def test_speedups_are_over_the_better_mode(self, made_up):
        found = {point[:1] + point[2:5]: point.value for point in made_up.speedups("both")}
        assert found["se", "32x256x56x56", "contiguous", "bf16"] == pytest.approx(2.2 / 1.25, rel=1e-4)
        assert found["cbam", "32x2048x7x7", "contiguous", "fp32"] == pytest.approx(2.5 / 1.25, rel=1e-4)  # one failed
        assert not any(place[0] == "simam" and place[1] == "32x2048x7x7" and place[3] == "fp32" for place in found)
        assert made_up.speedups("forward") == []

    def test_shares_are_of_the_better_mode(self, made_up):
        shares = {point[:5]: point.value for point in made_up.points("both", "copy_share")}
        assert shares["se", plot.BEST, "32x256x56x56", "contiguous", "bf16"] == pytest.approx(100 / 2.2, rel=1e-4)

    def test_the_latest_row_counts(self, made_up):
        again = made_up.rows[0]._replace(p50=1.0, timestamp="2001-01-01T00:00:00+00:00")
        (point,) = [p for p in plot.Measured([again, *made_up.rows]).points("both", "time") if p.value == 1]
        assert point[:5] == again.place

    def test_draws_each_plot_with_where_it_is_from(self, tmp_path, capsys, made_up):
        assert main(["plot", str(MADE_UP), "--out", str(tmp_path)]) == 0
        names = {f"made_up_gpu_{name}.png" for name in ("speedup", "bandwidth", "tax")}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names
        for path in tmp_path.iterdir():
            assert matplotlib.image.imread(path)[..., :3].std() > 0.05
        for figure in plot.figures(made_up, "both").values():
            caption = figure.get_supxlabel()
            for part in ("Made-up GPU", "torch 0.0", "Triton 0.0", "commit made-up-2", "python -m benchmarks all"):
                assert part in caption
        tax = plot.figures(made_up, "both")["tax"]
        assert [ax.get_title().split(",")[0] for ax in tax.axes] == ["train", "inference", "train"]
        # BAM by all four providers, and SimAM by the two that compile.
        assert sum(plot.NOT_MEASURED in text.get_text() for text in tax.axes[0].texts) == 6
        bars = [patch.get_height() for patch in tax.axes[0].patches]
        assert bars == pytest.approx([9, 30, 40, 2, 6, 3, 4, 12, 2, 6])

    def test_leaves_out_what_is_wrong(self, made_up):
        first, *others = (row for row in made_up.rows if row.metric == "time")
        rows = [first._replace(note="WRONG: y: error 1.0"), *others, first._replace(metric="failed", note="why")]
        assert plot.Measured(rows).rows == others

    def test_draws_what_there_is(self, tmp_path):
        rows = [row for row in read(MADE_UP) if row.kernel == "se" and row.commit == "made-up-1"]
        with (tmp_path / "one.csv").open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
        assert main(["plot", str(tmp_path / "one.csv"), "--out", str(tmp_path)]) == 0
        assert not list(tmp_path.glob("*.png"))

    def test_says_that_there_is_nothing(self, tmp_path, capsys):
        assert main(["plot", str(tmp_path / "none.csv")]) == 2
        assert "no measurements" in capsys.readouterr().err
