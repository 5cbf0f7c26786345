"""The traffic of every module against its budget, the record of it, and the model of L2 behind it."""

import csv
import math
from argparse import ArgumentParser

import numpy as np
import pytest
import torch

import attn_kernels
from benchmarks import inductor, traffic, users
from benchmarks.__main__ import main
from benchmarks.cache import SECTOR, Cache
from benchmarks.check import LAYOUTS, forward_backward
from benchmarks.meter import meter
from benchmarks.programs import Access, Signal, Wait, following, in_turns
from benchmarks.traffic import DIRECTIONS, NOT_MEASURED, OPS, RESULTS, SMALL, Case, Pass, Result, measure

pytestmark = pytest.mark.usefixtures("single_launch")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")


def load(cache, *sectors):
    cache.touch(np.array(sectors), loads=True, stores=False)


def store(cache, *sectors):
    cache.touch(np.array(sectors), loads=False, stores=True)


def counted(cache):
    """Sectors fetched and written back."""
    return cache.fetched // SECTOR, cache.written_back // SECTOR


class TestCache:
    def test_a_load_again_hits_while_its_sector_is_there(self):
        cache = Cache(4 * SECTOR)
        load(cache, 1, 2, 3)
        load(cache, 1, 2, 3)
        assert counted(cache) == (3, 0)

    def test_a_load_again_misses_after_as_many_others_as_fit(self):
        cache = Cache(4 * SECTOR)
        for sector in (1, 2, 3, 4, 5, 1):
            load(cache, sector)
        assert counted(cache) == (6, 0)

    def test_a_cyclic_walk_past_the_capacity_never_hits(self):
        cache = Cache(4 * SECTOR)
        for sector in (*range(5), *range(5), *range(5)):
            load(cache, sector)
        assert counted(cache) == (15, 0)

    def test_a_walk_backwards_hits_what_the_walk_forwards_left(self):
        cache = Cache(4 * SECTOR)
        for sector in (*range(10), *reversed(range(10))):
            load(cache, sector)
        assert counted(cache) == (10 + 6, 0)

    def test_evicts_the_least_recently_used(self):
        cache = Cache(3 * SECTOR)
        for sector in (1, 2, 3, 1, 4, 1, 3):  # 4 takes the place of 2, for 1 was used again
            load(cache, sector)
        assert counted(cache) == (4, 0)
        load(cache, 2)
        assert counted(cache) == (5, 0)

    def test_a_store_fetches_nothing_and_is_written_back_once(self):
        cache = Cache(4 * SECTOR)
        for _ in range(3):
            store(cache, 1)
        load(cache, 1)
        assert counted(cache) == (0, 0)
        cache.flush()
        cache.flush()
        assert counted(cache) == (0, 1)

    def test_what_is_evicted_dirty_is_written_back_and_fetched_again(self):
        cache = Cache(2 * SECTOR)
        store(cache, 1)
        load(cache, 2)
        load(cache, 3)
        assert counted(cache) == (2, 1)
        load(cache, 1)
        assert counted(cache) == (3, 1)
        cache.flush()
        assert counted(cache) == (3, 1)

    def test_what_asks_for_it_is_evicted_before_what_was_used_earlier(self):
        cache = Cache(3 * SECTOR)
        load(cache, 1)
        cache.touch(np.array([2]), loads=False, stores=True, evict_first=True)
        load(cache, 3, 4)  # in the place of 2
        load(cache, 1, 3)
        assert counted(cache) == (3, 1)
        cache.touch(np.array([1]), loads=True, stores=False, evict_first=True)
        load(cache, 1)  # as before
        load(cache, 5)  # in the place of 4
        load(cache, 1)
        assert counted(cache) == (4, 1)

    def test_an_atomic_fetches_and_is_written_back(self):
        cache = Cache(2 * SECTOR)
        cache.touch(np.array([7]), loads=True, stores=True)
        cache.flush()
        assert counted(cache) == (1, 1)

    def test_elements_of_a_sector_are_one_access(self):
        cache = Cache(4 * SECTOR)
        cache.touch_addresses(np.arange(16, 80, 2), loads=True, stores=False)
        assert counted(cache) == (3, 0)

    def test_a_stream_goes_through_its_operands_in_step(self):
        cache = Cache(8 * SECTOR)
        cache.stream([np.arange(100)], [np.arange(100)])  # in place: what is written was just read
        cache.flush()
        assert counted(cache) == (100, 100)

    def test_counts_what_is_distinct_within_a_launch(self):
        cache = Cache(SECTOR)
        load(cache, 1, 2)
        load(cache, 2, 3)
        store(cache, 3)
        assert cache.distinct == 4 * SECTOR
        cache.launch()
        load(cache, 3)
        assert cache.distinct == 5 * SECTOR

    def test_agrees_with_a_list_in_the_order_of_use(self):
        generator = np.random.default_rng(0)
        cache, used, dirty, expected = Cache(50 * SECTOR), [], set(), [0, 0]
        for _ in range(3000):
            sector, stores = int(generator.zipf(1.3) % 200) * 40_000, bool(generator.integers(2))
            (store if stores else load)(cache, sector)
            if sector in used:
                used.remove(sector)
            else:
                expected[0] += not stores
            used.append(sector)
            dirty |= {sector} if stores else set()
            if len(used) > 50:
                expected[1] += (victim := used.pop(0)) in dirty
                dirty.discard(victim)
        assert counted(cache) == tuple(expected)


@interpreted
class TestMeterWithCache:
    def test_a_tensor_past_the_capacity_is_fetched_by_each_operator(self):
        x = torch.ones(100, SECTOR // 4)
        with meter(Cache(10 * SECTOR)) as small:
            x.sum(), x.sum()
        with meter(Cache(200 * SECTOR)) as large:
            x.sum(), x.sum()
        result = 2 * SECTOR  # a sum takes a sector of its own
        assert small.dram == 2 * x.nbytes + result
        assert large.dram == x.nbytes + result
        assert [launch.fetched for launch in large.per_launch] == [x.nbytes, 0]

    def test_strides_decide_which_sectors_a_tensor_has(self):
        x = torch.ones(64, SECTOR // 4)
        for t, sectors in ((x[::2], 32), (x[:, :1], 64), (x[0].expand(64, -1), 1), (x.t(), 64)):
            with meter(cache := Cache(1000 * SECTOR)):
                t.sum()
            assert cache.fetched == sectors * SECTOR


@interpreted
class TestSideBySide:
    """Of programs that each walk over 16 sectors of their own, twice."""

    @staticmethod
    def walk(programs, resident):
        once = [Access(np.arange(16) * SECTOR + SECTOR * 16 * i, 1, True, False) for i in range(programs)]
        events = [[access, access] for access in once]
        cache = Cache(40 * SECTOR)
        for access in in_turns(events, resident):
            access.touch(cache)
        return cache.fetched // SECTOR

    def test_l2_holds_what_few_programs_read_and_not_what_many_do(self):
        assert self.walk(8, resident=1) == self.walk(8, resident=2) == 8 * 16
        assert self.walk(8, resident=4) == 2 * 8 * 16

    def test_who_waits_lets_others_go_on(self):
        touch = [Access(np.array([i]), 1, True, False) for i in range(4)]
        waiting = [Wait(frozenset({9})), touch[0]]
        setting = [touch[1], touch[2], Signal(frozenset({9})), touch[3]]
        assert list(in_turns([waiting, setting], 2)) == [touch[1], touch[2], touch[3], touch[0]]
        with pytest.raises(RuntimeError, match="1 programs run, and all of them wait"):
            list(in_turns([waiting, setting], 1))

    def test_programs_of_a_gate_wait_for_each_other(self):
        """Read from the kernel itself: those of the second phase wait for what those of the first set."""
        x = torch.randn(2, 16, 8, 8, dtype=torch.float16)
        events = []
        with following(events.append):
            attn_kernels.SE(16).eval().requires_grad_(False)(x)
        signals, waits = ([e for e in events if isinstance(e, kind)] for kind in (Signal, Wait))
        assert signals
        assert waits
        assert all(wait.flags <= frozenset().union(*(signal.flags for signal in signals)) for wait in waits)

    def test_simam_in_channels_last_reads_planes_again_from_dram(self):
        """Of planes that no program holds, as many as run at once are more than L2 holds."""
        shape = (16, 64, 24, 24)
        found = measure(Case("SimAM", "", shape, 1 / 44, "channels_last", "train", "float16", "H100"), compiled=False)
        forward, backward = found.passes["fused"]
        assert 2.1 < forward.dram < 2.4
        assert 3.3 < backward.dram < 3.7


def case(op, shape, layout, mode="train"):
    return Case(op, "", shape, shape[0] / traffic.BATCH, layout, mode, "float16", "H100")


# Of kernels, and of what PyTorch launches beside them: in CBAM the sum of the gradients of the convolution's weight.
LAUNCHES = {
    "SE": ((1, 1), (0, 0)),
    "SE+add+ReLU": ((1, 1), (0, 0)),
    "CBAM": ((4, 4), (0, 1)),
    # PyTorch's: the channel branch, convolutions, casts (one for those of the dilated ones), sums over programs.
    "BAM": ((8, 8), (10, 13)),
    "SimAM": ((1, 1), (0, 0)),
}


@interpreted
class TestBudget:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("op", OPS)
    def test_of_a_training_step(self, op, layout):
        """On 28x28, and the smallest batch of which parameters weigh little."""
        result = measure(case(op, (2, 256, 28, 28), layout), compiled=False)
        fused = result.passes["fused"]
        for found, launches in zip(fused, result.kernels, strict=True):
            assert found.touched == pytest.approx(sum(kernel.loaded + kernel.stored for kernel in launches))
            # DRAM sees x and y at least, and of what is touched at most whole sectors.
            assert 2 <= found.dram <= found.touched * 1.05
            assert 2 <= found.distinct <= found.touched * 1.05
        kernels = tuple(sum(k.name.endswith("_kernel") for k in launches) for launches in result.kernels)
        others = tuple(p.launches - count for p, count in zip(fused, kernels, strict=True))
        assert (kernels, others) == LAUNCHES[op], result.kernels
        for found, budget, direction in zip(fused, result.case.budget, DIRECTIONS, strict=True):
            assert found.moved <= budget * (1 + SMALL), f"{direction}: {result.kernels}"

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("op", ["SE", "SE+add+ReLU", "SimAM"])  # CBAM's maps weigh too much on so few channels
    def test_of_dram(self, op, layout):
        """Behind an L2 that holds half of x, on a batch of which it holds several samples: x comes from DRAM once."""
        shape = (32, 32, 24, 24)
        place = Case(op, "", shape, 2 * math.prod(shape) / (50 * traffic.MB), layout, "train", "float16", "H100")
        passes = measure(place, compiled=False).passes
        dram = {provider: sum(p.dram for p in passes[provider]) for provider in ("eager", "fused")}
        assert dram["fused"] <= place.dram_budget * (1 + SMALL)
        assert dram["eager"] > 2 * dram["fused"]  # the model does not take everything for a hit

    def test_simam_in_channels_last_with_planes_that_no_program_holds(self):
        result = measure(case("SimAM", (1, 64, 56, 56), "channels_last"), compiled=False)
        forward, backward = result.passes["fused"]
        assert result.case.budget == (3, 5)
        assert (forward.launches, backward.launches) == (1, 1)
        assert 2.9 < forward.touched <= 3.15
        assert 4.9 < backward.touched <= 5.25


class TestRecord:
    @pytest.fixture(scope="class")
    def rows(self):
        with (RESULTS / "traffic.csv").open(newline="", encoding="utf-8") as file:
            rows = {}
            for row in csv.DictReader(file):
                rows.setdefault(tuple(row[name] for name in traffic.PLACE), {})[row["provider"]] = row
        return rows

    def test_is_complete(self, rows):
        parser = ArgumentParser()
        traffic.add_arguments(parser)
        expected = {traffic.place(case) for case in traffic.cases(parser.parse_args([]))}
        assert rows.keys() == expected
        for found in rows.values():
            assert found.keys() == set(traffic.PROVIDERS)
            assert found["compile"]["dram_forward"] == NOT_MEASURED
            assert all(row["torch"] and row["triton"] and row["commit"] and row["command"] for row in found.values())

    def test_fused_moves_no_more_than_torch_compile(self, rows):
        """CBAM in inference makes as many passes over x, and what is not full-size may weigh more."""
        parser = ArgumentParser()
        traffic.add_arguments(parser)
        for case in traffic.cases(parser.parse_args([])):
            place = traffic.place(case)
            found = rows[place]
            fused, compiled = (
                sum(float(found[provider][f"{kind}_{d}"] or 0) for d in DIRECTIONS)
                for provider, kind in (("fused", "distinct"), ("compile", "touched"))
            )
            assert fused <= case.allowed(compiled), place
            assert fused <= compiled + 1e-6 or (case.op, case.mode) == ("CBAM", "eval")

    def test_fused_is_within_its_budget_of_dram(self, rows):
        for place, found in rows.items():
            if place[3] == "train":
                dram = sum(float(found["fused"][f"dram_{d}"]) for d in DIRECTIONS)
                shape = tuple(map(int, place[1].split("x")))
                assert dram <= case(place[0], shape, place[2]).dram_budget * (1 + SMALL), place


class TestResult:
    def result(self, fused, compiled):
        passes = {"fused": [Pass(1, t) for t in fused], "compile": [Pass(1, t) for t in compiled]}
        return Result(case("SE", (1, 16, 8, 8), "contiguous"), passes, [])

    def test_complains_of_what_is_over(self):
        assert self.result((3.1, 4.1), (3.2, 4.1)).complaints == []
        assert len(self.result((3.1, 4.1), (3, 4)).complaints) == 1
        assert self.result((3.4, 4), (5, 5)).complaints == ["forward moves 3.40 |x|, the budget is 3 |x| + 12%"]
        assert len(self.result((4, 5), (3, 4)).complaints) == 3

    def test_simam_has_two_budgets(self):
        assert case("SimAM", (1, 16, 56, 56), "contiguous").budget == (2, 3)
        assert case("SimAM", (1, 16, 56, 56), "channels_last").budget == (3, 5)
        assert case("SimAM", (1, 16, 56, 56), "contiguous").dram_budget == 5.2
        assert case("SimAM", (1, 16, 56, 56), "channels_last").dram_budget == 5.8
        assert case("SimAM", (1, 16, 14, 14), "channels_last", "eval").budget == (2,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_counts_forward_and_backward(layout):
    """Of timm's SE, whose convolutions change no layout: a contiguous x would be copied."""
    x, dy = (torch.randn(2, 256, 28, 28).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    forward, backward = inductor.graphs(users.SE(256), lambda module: forward_backward(module, x, None, dy))
    assert 3 <= forward.touched / x.nbytes <= 3 * (1 + SMALL)
    assert 4 <= backward.touched / x.nbytes <= 4 * (1 + SMALL)
    assert forward.launches > 1


@interpreted
@pytest.mark.parametrize(("op", "forward", "backward"), [("SE", 3, 10), ("SE+add+ReLU", 8, 13), ("SimAM", 15, 40)])
def test_eager_is_users_code_in_the_dtype_of_x(op, forward, backward):
    """SE: pool 1, scale 2; gradients of the scale 3 and of the gate 2 + 1, of the pool 1 and the sum of both 3."""
    found = measure(case(op, (2, 64, 28, 28), "channels_last"), compiled=False).passes["eager"]
    assert [p.touched for p in found] == pytest.approx([forward, backward], rel=0.02)


def test_says_that_timm_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(users, "find_spec", lambda name: None)
    assert main(("traffic", "--op", "SE", "SimAM")) == 2
    assert "needs timm for SE: it is not installed" in capsys.readouterr().err


class TestCommand:
    quick = ("traffic", "--op", "SimAM", "--shape", "2x16x7x7", "--layout", "contiguous", "--mode", "train")

    def test_prints_every_figure_with_where_it_comes_from(self, capfd, monkeypatch):
        monkeypatch.setattr("sys.argv", ["benchmarks", *self.quick])
        written = (RESULTS / "traffic.csv").stat().st_mtime_ns
        main((*self.quick, "--no-compile", "--kernels"))
        out = capfd.readouterr().out
        assert "2x16x7x7" in out
        assert "not measured" in out
        assert "simam_fwd_kernel" in out
        assert f"torch {torch.__version__}" in out
        assert "python -m benchmarks traffic --op SimAM" in out
        assert (RESULTS / "traffic.csv").stat().st_mtime_ns == written

    def test_refuses_a_shape_that_is_none(self, capsys):
        with pytest.raises(SystemExit):
            main(("traffic", "--shape", "2x16"))
        assert "expected NxCxHxW, got 2x16" in capsys.readouterr().err

    def test_draws_and_records_what_was_found(self, tmp_path, monkeypatch):
        shape = (1, 16, 8, 8)
        passes = {name: [Pass(1, 3.0, 3.0, 3.0), Pass(1, 4.0, 4.0, 4.0)] for name in ("eager", "fused")}
        passes["compile"] = [Pass(1, 3.0), Pass(1, 4.0)]
        results = [Result(case(op, shape, layout), passes, []) for op in OPS for layout in LAYOUTS]
        traffic.draw(results, tmp_path / "traffic.png")
        traffic.save(results, tmp_path / "traffic.csv")
        assert (tmp_path / "traffic.png").stat().st_size > 10_000
        assert len((tmp_path / "traffic.csv").read_text().splitlines()) == 1 + len(results) * 3
        assert traffic.recorded(tmp_path / "traffic.csv") == {traffic.place(r.case): passes["compile"] for r in results}
        found = traffic._users()
        for other in ({"timm": "0.0"}, {"users": "another"}):
            monkeypatch.setattr(traffic, "_users", lambda other=other: {**found, **other})
            assert traffic.recorded(tmp_path / "traffic.csv") == traffic.recorded(tmp_path / "none.csv") == {}
