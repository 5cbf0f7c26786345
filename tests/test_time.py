"""The model of time: what it reads from machine code, what it takes programs to do, and how they share a machine."""

import csv
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import attn_kernels
from attn_kernels.ops.common import device as gpu
from benchmarks import time
from benchmarks.__main__ import main
from benchmarks.check import LAYOUTS
from benchmarks.machine_code import MachineCode
from benchmarks.meter import Launch, meter
from benchmarks.record import (
    FIRST,
    GATES,
    HIDDEN,
    LAST_HIDDEN,
    SECOND,
    WEIGHTS,
    Place,
    Recorded,
    Step,
    recording,
)
from benchmarks.sass import Line, stretches
from benchmarks.simulator import MACHINES, Simulator
from benchmarks.time import RESULTS, Case, Time

pytestmark = pytest.mark.usefixtures("single_launch")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
H100 = MACHINES["H100"]
SOURCE = (Line("x/kernel.py", 7),)


class TestStretches:
    """Of SASS as nvdisasm prints it."""

    @staticmethod
    def parse(*lines):
        code = []
        for at, line in enumerate(lines):
            is_code = not line.startswith((".L", "line"))
            number = line.removeprefix("line ")
            note = f'\t//## File "/x/kernel.py", line {number}'
            code.append(f"        /*{at:04x}*/    {line} ;" if is_code else line if line.startswith(".L") else note)
        return stretches("\n".join(code))

    def test_loads_are_in_flight_until_one_is_needed(self):
        loop = ".L_x_1:", "LDG.E.128 R4, desc[UR6][R2.64]", "LDG.E.64 R8, desc[UR6][R2.64]"
        end = "FADD R10, R4, R8", "@!P0 BRA `(.L_x_1)", "EXIT"
        (together, rest) = self.parse(*loop, *end)
        (in_turn, _) = self.parse(*loop[:2], "FADD R9, R4, R4", loop[2], *end)
        assert (together.is_loop, together.loaded, together.in_flight) == (True, 24, 24)
        assert (in_turn.loaded, in_turn.in_flight) == (24, 16)
        assert not rest.is_loop
        assert rest.loaded == 0

    def test_a_turn_may_load_for_the_next(self):
        load, use = "LDG.E.128 R4, desc[UR6][R2.64]", "FADD R10, R4, R8"
        (ahead, _) = self.parse(".L_x_1:", use, load, "@!P0 BRA `(.L_x_1)", "EXIT")
        assert ahead.in_flight == 16

    def test_cp_async_has_the_groups_in_flight_that_are_not_waited_for(self):
        turn = "LDGSTS.E.BYPASS.128 [R35], desc[UR6][R20.64]", "LDGDEPBAR"
        (loop, _) = self.parse(".L_x_1:", "DEPBAR.LE SB0, 0x2", *turn, "@!P0 BRA `(.L_x_1)", "EXIT")
        assert loop.is_async
        assert (loop.loaded, loop.in_flight) == (16, 3 * 16)

    def test_the_innermost_loop_that_accesses_memory(self):
        inner = ".L_x_2:", "STG.E.EF.128 desc[UR4][R2.64], R16", "@P1 BRA `(.L_x_2)"
        before, loop, after = self.parse(
            ".L_x_1:", "line 3", "LDG.E R4, desc[UR6][R2.64]", "line 7", *inner, "@P0 BRA `(.L_x_1)"
        )
        assert [s.is_loop for s in (before, loop, after)] == [False, True, False]
        assert (loop.stored, loop.evict_first, loop.accesses) == (16, {"store"}, {Line("x/kernel.py", 7)})
        assert before.accesses == {Line("x/kernel.py", 3)}

    def test_counts_what_is_issued(self):
        (code,) = self.parse("MUFU.EX2 R4, R5", "FADD R4, R4, R4", "LDS.128 R8, [R2]", "BAR.SYNC 0x0", "EXIT")
        assert (code.instructions, code.barriers) == (5, 1)
        assert code.clocks == {"scheduler": 5, "transcendental": 8, "fma": 1, "memory": 16, "control": 2}


def code(in_flight=16, warps=4, registers=128):
    """The machine code of a loop that loads and stores 16 bytes per thread in each turn."""
    text = '\t//## File "/x/kernel.py", line 7\n.L_x_1:\n'
    text += "".join(f"/*0000*/ LDG.E.128 R{4 * i + 8}, desc[UR6][R2.64] ;\n" for i in range(in_flight // 16))
    text += "/*0010*/ STG.E.128 desc[UR6][R2.64], R8 ;\n/*0020*/ @P0 BRA `(.L_x_1) ;\n"
    return MachineCode(registers, 0, 0, 0, warps, 0, (), None, tuple(stretches(text)))


class TestSimulator:
    @pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
    def test_a_long_copy_reaches_the_bandwidth(self, machine):
        """Less its ends and what 8 programs per multiprocessor, 16 KB each, cannot keep in flight."""
        simulator = Simulator(machine)
        simulator.copy(100_000_000)
        assert 0.9 < 100_000 / machine.dram / simulator.now < 1

    @staticmethod
    def launch(programs, order, machine=H100, **kwargs):
        simulator = Simulator(machine)
        recorded = Recorded("kernel", 1, [tuple(program) for program in programs], [(i, Place(0, 0)) for i in order])
        simulator.launch(recorded, code(**kwargs))
        return simulator

    def test_more_in_flight_takes_less_time(self):
        loads = [Step("load", SOURCE, 2048, 2048, sectors=None) for _ in range(64)]
        slow, fast = (self.launch([loads], [0] * 132, in_flight=size).now for size in (16, 64))
        assert slow > 2.5 * fast

    def test_pipes_work_side_by_side(self):
        """32 programs of a multiprocessor: additions beside transcendental functions take no time of their own."""

        def time(*instructions):
            lines = "".join(f"/*0000*/ {text} ;\n" for text in ("LDG.E R4, desc[UR6][R2.64]", *instructions, "EXIT"))
            (only,) = stretches('\t//## File "/x/kernel.py", line 7\n' + lines)
            simulator = Simulator(H100)
            made = MachineCode(32, 0, 0, 0, 4, 0, (), None, (only,))
            step = Step("load", SOURCE, 512, 512)
            simulator.launch(Recorded("kernel", 1, [(step,)], [(0, Place(0, 0))] * 132 * 32), made)
            return simulator.now

        roots, sums = ["MUFU.RSQ R5, R4"] * 1000, ["FADD R5, R4, R4"] * 3000
        assert time(*roots, *sums) == pytest.approx(time(*roots), rel=0.05)
        assert time(*roots, *sums) > 1.5 * time(*sums)

    def test_who_waits_goes_on_a_hop_behind_the_signal(self):
        early, late = (Step(kind, SOURCE, flags=(8,)) for kind in ("signal", "wait"))
        quick = self.launch([[early], [late]], [0, 1])
        slow = self.launch([[early], [late]], [0, 1], replace(H100, hop=H100.hop + 5))
        assert slow.now - quick.now == pytest.approx(5)
        assert slow.waiting > quick.waiting > 0

    def test_programs_that_wait_for_what_never_comes_are_an_error(self):
        with pytest.raises(RuntimeError, match="never comes"):
            self.launch([[Step("wait", SOURCE, flags=(8,))]], [0])

    def test_some_groups_go_through_all_of_their_phases(self):
        """Of two groups one: all but what waits for both. Each phase stores to a sector of its own."""
        phases = FIRST, HIDDEN, GATES, SECOND, LAST_HIDDEN, WEIGHTS
        programs = [(Step("store", SOURCE, 32, 32, (32_000, 0, 0), np.array([phase])),) for phase in phases]
        order = [(phase, Place(phase, group)) for group in range(2) for phase in phases if not group or phase <= SECOND]
        stored = []
        for groups in (None, 2, 1):
            simulator = Simulator(H100)
            simulator.launch(Recorded("kernel", 2, programs, order), code(), groups)
            stored.append(simulator.cache.distinct // 32)
        assert stored == [10, 10, 4]

    def test_an_operator_of_pytorch_is_its_bytes_and_its_launch(self):
        simulator = Simulator(H100)
        simulator.operator(0, 4)
        assert simulator.now == pytest.approx(H100.gap + H100.kernel, rel=0.01)
        simulator.operator(27_000_000, 0)
        assert simulator.now == pytest.approx(2 * H100.gap + H100.kernel + 10, rel=0.01)


def _flags(launch, kind):
    """Those that the launch's programs wait for, or set."""
    steps = [(step, place) for i, place in launch.order for step in launch.programs[i] if step.kind == kind]
    return {
        flag + sum(map(math.prod, zip(step.shifts, place[1:], strict=True)))
        for step, place in steps
        for flag in step.flags
    }


@interpreted
class TestRecorded:
    """A few programs run without data stand for all of them."""

    CASES = (
        ("SE", (5, 40, 20, 20)),
        ("SE", (40, 64, 7, 7)),
        ("ChannelGate", (3, 40, 20, 20)),
        ("CBAM", (3, 40, 20, 20)),
        ("CBAM", (12, 64, 40, 40)),
        ("CBAM", (40, 64, 7, 7)),
        ("CBAM", (32, 512, 7, 7)),  # several tasks of the hidden layer, and gates in their launch
        ("SimAM", (3, 40, 24, 24)),
        ("BAM", (3, 32, 20, 20)),
    )

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("name", "shape"), CASES)
    def test_moves_what_the_whole_launch_moves(self, name, shape, layout):
        """Loads and stores by launch, but for the polls of those who wait, as the meter counts them."""
        multiprocessors = 4

        def train(device, watch):
            with torch.device(device):
                module = getattr(attn_kernels, name)(*(() if name == "SimAM" else (shape[1],)))
                x = torch.ones(shape, dtype=torch.float16).to(memory_format=LAYOUTS[layout]).requires_grad_()
            with watch() as forward:
                y = module(x)
            with watch() as backward:
                torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))
            return forward, backward

        with gpu.assuming(multiprocessors):
            whole = [launch for traffic in train("cpu", meter) for launch in traffic.per_launch]
        few = [launch for found in train("meta", lambda: recording(multiprocessors, shape)) for launch in found]
        assert [launch.name for launch in few] == [launch.name for launch in whole]
        for launch, counted in zip(few, whole, strict=True):
            if isinstance(launch, Launch):
                assert (launch.loaded, launch.stored) == (counted.loaded, counted.stored)
                continue
            sums, flags = {"load": 0, "store": 0}, 0
            for i, _ in launch.order:
                for step in launch.programs[i]:
                    flags += 8 * len(step.flags)  # atomics, which load and store
                    if step.source[0].file != "common/grid_sync.py" and step.kind in sums:
                        sums[step.kind] += step.bytes
            # The weights' gradients are taken to be alike; so are a convolution's pixels, which on small maps are not.
            stored, loaded = (0.03, 0.15) if "conv" in launch.name else (0.01, 0.03)
            assert counted.stored - flags == pytest.approx(sums["store"], rel=stored), launch.name
            assert counted.loaded - flags == pytest.approx(sums["load"], rel=loaded, abs=8 * len(launch.order))
            waited, signalled = (_flags(launch, kind) for kind in ("wait", "signal"))
            assert waited <= signalled, launch.name

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_addresses_are_those_of_every_element_of_x(self, layout):
        """Once for the pools and once for y, whose elements are all written."""
        shape = (6, 40, 24, 24)
        with torch.device("meta"):
            module = attn_kernels.SE(40)
            x = torch.empty(shape, dtype=torch.float16).to(memory_format=LAYOUTS[layout])
        with recording(4, shape) as launches, torch.no_grad():
            module(x)
        (launch,) = launches
        touched = {"load": [], "store": []}
        for i, place in launch.order:
            for step in launch.programs[i]:
                if step.sectors is not None:
                    shift = sum(map(math.prod, zip(step.shifts, place[1:], strict=True)))
                    assert shift % 32 == 0
                    touched[step.kind] += (step.sectors + shift // 32).tolist()
        sectors = math.prod(shape) * 2 // 32
        assert len(set(touched["load"])) == len(set(touched["store"])) == sectors
        assert sectors * 2 <= len(touched["load"]) <= sectors * 2.1  # tiles may share a sector at their edges


@interpreted
@pytest.mark.parametrize("shape", [(6, 40, 24, 24), (40, 64, 7, 7)])
def test_the_first_groups_wait_for_none_of_the_others(shape):
    with torch.device("meta"):
        module, x = attn_kernels.SE(shape[1]), torch.empty(shape, dtype=torch.float16, requires_grad=True)
        dy = torch.empty(shape, dtype=torch.float16)
    with recording(4, shape) as launches:
        torch.autograd.grad(module(x), [x, *module.parameters()], dy)
    launches = [launch for launch in launches if not isinstance(launch, Launch)]
    assert max(launch.groups for launch in launches) > 2
    for launch in launches:
        parts = [len(launch.of_first(groups)) for groups in range(1, launch.groups)]
        assert all(few < more for few, more in itertools.pairwise([0, *parts, len(launch.order)]))
        for groups in range(1, launch.groups):
            Simulator(MACHINES["H100"]).launch(launch, code(), groups)


@interpreted
def test_what_is_not_needed_again_is_to_be_evicted_first():
    """Of a gate's launch x for y, and y; not x for the pools, which is read again."""
    shape = (6, 40, 24, 24)
    with torch.device("meta"):
        module, x = attn_kernels.SE(40), torch.empty(shape, dtype=torch.float16)
    with recording(4, shape) as launches, torch.no_grad():
        module(x)
    (launch,) = launches
    steps = [
        (place.phase, step) for i, place in launch.order for step in launch.programs[i] if step.sectors is not None
    ]
    assert {(step.kind, phase, step.evict_first) for phase, step in steps} == {
        ("load", FIRST, False),
        ("load", SECOND, True),
        ("store", SECOND, True),
    }


class TestCommand:
    @pytest.fixture(scope="class")
    def out(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("time") / "time.csv"
        selection = ("--ops", "SE", "--maps", "64x14x14", "--batches", "4", "--layouts", "channels_last")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # as it is in tests; the command takes it away and gives it back
            assert main(("time", *selection, "--jobs", "1", "--output", str(path))) == 0
        return path

    def test_every_row_says_that_it_is_a_model(self, out):
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["pass"] for row in rows] == ["forward", "backward"]
        assert {row["kind"] for row in rows} == {"MODEL"}
        for row in rows:
            assert 0 < float(row["copy_us"]) < float(row["us"]) < 100
            assert float(row["share"]) == pytest.approx(float(row["copy_us"]) / float(row["us"]), rel=1e-2)
            assert int(row["launches"]) == 1
            assert row["commit"]
        assert out.with_suffix(".png").stat().st_size > 10_000

    def test_refuses_a_map_that_is_none(self, capsys):
        with pytest.raises(SystemExit):
            main(("time", "--maps", "64x14"))
        assert "expected CxHxW, got 64x14" in capsys.readouterr().err


class TestTable:
    case = Case("SE", (32, 256, 56, 56), "channels_last", "H100")

    def test_says_model_and_marks_what_is_slower_than_torch_compile(self):
        from rich.console import Console

        passes = [Time(80.0, 40.0, 60.0, None, 1.0, 1, 0.1), Time(50.0, 40.0, 60.0, 90.0, 2.0, 1, 0.1)]
        console = Console(width=160, record=True, force_terminal=True)
        console.print(time.table([(self.case, passes)]))
        text = console.export_text(styles=True)
        assert "MODEL" in text
        assert "\x1b[31m80.0" in text
        assert "\x1b[31m50.0" not in text
        assert "80%" in text

    def test_pessimistic_is_slower(self):
        pessimistic = self.case._replace(pessimistic=True).model
        assert pessimistic.hop > H100.hop
        assert pessimistic.l2 < H100.l2
        assert Case("SE", (1, 8, 8, 8), "contiguous", "A100", True).model.l2 == MACHINES["A100"].l2

    def test_torch_compile_moves_what_traffic_says(self):
        """3 readings and writings of x, at nine tenths of a copy's speed, and its launches."""
        case = self.case._replace(layout="contiguous")
        us = time._others(case, "compile", "forward", 2 * case.bytes, H100)
        assert us == pytest.approx(
            3.01 * case.bytes / 1000 / 0.9 / H100.dram + 5 * H100.gap + 2 * H100.kernel, rel=0.02
        )
        small = case._replace(shape=(1, 256, 56, 56))
        assert time._others(small, "compile", "forward", 2 * small.bytes, H100) < us / 5


def test_a_record_keeps_the_rows_of_other_cases(tmp_path):
    def row(op: str, side: int, us: float) -> tuple[time.Case, list[time.Time]]:
        found = time.Time(us, 30.0, None, None, 2.0, 1, 0.0)
        return time.Case(op, (32, 256, side, side), "contiguous", "H100"), [found, found]

    path = tmp_path / "time.csv"
    time.save([row("SimAM", 56, 50.0), row("SE", 56, 50.0)], path)
    rows = time.save([row("SE", 28, 60.0), row("SE", 56, 40.0)], path)
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    assert [(row["op"], row["shape"], row["us"], row["share"]) for row in rows[::2]] == [
        ("SE", "32x256x56x56", "40", "0.75"),
        ("SE", "32x256x28x28", "60", "0.5"),
        ("SimAM", "32x256x56x56", "50", "0.6"),
    ]
    time.draw(rows, tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 10_000


def test_record_says_model_and_is_as_fast_as_claimed():
    """ResNet-50's stages at batch 32 on an H100. Claimed: SE and CBAM at 56x56, SE at 14x14, BAM at 56x56."""
    with (RESULTS / "time.csv").open(newline="", encoding="utf-8") as file:
        rows = {tuple(row[name] for name in time.PLACE): row for row in csv.DictReader(file)}
    shapes = "32x256x56x56", "32x512x28x28", "32x1024x14x14", "32x2048x7x7"
    expected = set(itertools.product(time.OPS, shapes, LAYOUTS, ("bf16",), ("H100",), ("0",), time.DIRECTIONS))
    assert rows.keys() >= expected
    assert {row["kind"] for row in rows.values()} == {"MODEL"}
    for place in expected:
        row = rows[place]
        if place[0] in ("SE", "SE+add+ReLU", "CBAM") and place[1] == shapes[0]:
            assert float(row["share"]) >= (0.55 if place[0] == "CBAM" else 0.8), place
            assert float(row["us"]) <= float(row["compile_us"]), place
        if place[0] == "SE" and place[1:3] == (shapes[2], "channels_last"):
            assert float(row["us"]) <= 1.1 * float(row["compile_us"]), place
        if place[0] == "BAM" and place[1] == shapes[0] and place[-1] == "backward":
            assert float(row["share"]) >= 0.45, place
