"""MODEL of the time that each operator takes on a GPU, and of a copy and of torch.compile beside it; needs no GPU.

What each program does comes from the kernels themselves, run in Triton's interpreter on addresses alone; registers,
occupancy, bytes in flight and instructions from their machine code; bandwidths and latencies are assumptions, in
``benchmarks.simulator``. A copy moves the bytes that the operator has to move at least, with x kept on the chip.
torch.compile and eager PyTorch move what ``results/traffic.csv`` says, at nine tenths of a copy's speed; a second
reading of an x that fits L2 costs them nothing. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine_code import Kernel, MachineCode, capture, machine_code
from benchmarks.meter import Launch
from benchmarks.provenance import command, commit, versions
from benchmarks.simulator import MACHINES, PESSIMISTIC, Machine, Simulator
from benchmarks.traffic import DIRECTIONS, STAGES
from reference.catalogue import LAYOUTS, OPERATORS

RESULTS = Path(__file__).parent / "results"
# Of a batch above WHOLE: the time of WHOLE samples, and for each more what a sample costs between BEFORE and WHOLE. The
# weights' gradients, which wait for all samples, are left out then.
WHOLE, BEFORE = 96, 48
COPIED = 128_000_000  # bytes of a copy that are simulated, likewise
OF_A_COPY = 0.9  # the speed of torch.compile's and eager's kernels


class Op(NamedTuple):
    """A module, with the end of a residual block behind it or without."""

    module: str
    epilogue: bool = False

    @property
    def floors(self) -> tuple[int, int]:
        """How often forward and backward move x's bytes at least."""
        forward, backward = OPERATORS[self.module].floors
        return forward + self.epilogue, backward + self.epilogue


OPS = {}
for _name, _operator in OPERATORS.items():
    if _operator.floors:
        OPS[_name] = Op(_name)
    if _operator.ends_blocks:
        OPS[f"{_name}+add+ReLU"] = Op(_name, epilogue=True)


class Case(NamedTuple):
    """An operator in training on one input in bfloat16, on a machine."""

    op: str
    shape: tuple[int, int, int, int]
    layout: str
    machine: str
    pessimistic: bool = False

    @property
    def bytes(self) -> int:
        """Of x."""
        return 2 * math.prod(self.shape)

    @property
    def model(self) -> Machine:
        machine = MACHINES[self.machine]
        if not self.pessimistic:
            return machine
        slower = {name: min(value, machine.l2) if name == "l2" else value for name, value in PESSIMISTIC.items()}
        return replace(machine, **slower)

    def __str__(self) -> str:
        return f"{self.op} {_text(self.shape)} {self.layout} {self.machine}"


class Time(NamedTuple):
    """A pass, in us, and the bytes that it fetches from DRAM, of x's."""

    us: float
    copy_us: float
    compile_us: float | None
    eager_us: float | None
    fetched: float
    launches: int
    waiting: float  # of the programs' time, the share that they wait for others

    @property
    def share(self) -> float:
        """Of a copy's bandwidth."""
        return self.copy_us / self.us


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks time --ops SE CBAM --maps 256x56x56 --batches 32 256 --machines A100"
    stages = [_text(stage.map) for stage in STAGES.values()]
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--maps", nargs="+", type=_map, metavar="CxHxW", default=[_map(text) for text in stages])
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", default=[32])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=["H100"])
    parser.add_argument("--pessimistic", action="store_true", help="hop 1.5 us, DRAM 0.9 us, L2 4.5 TB/s")
    parser.add_argument("--sensitivity", action="store_true", help="what each assumption decides, for the first case")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="CSV",
        help="a record: its rows of these cases are replaced, its picture drawn anew",
    )


def _map(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(part) for part in text.split("x"))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected CxHxW, got {text}")
    return sizes


def run(arguments: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    selection = itertools.product(
        arguments.machines, arguments.ops, arguments.batches, arguments.maps, arguments.layouts
    )
    cases = [Case(op, (n, *m), layout, machine, arguments.pessimistic) for machine, op, n, m, layout in selection]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    codes: dict[Case, list[list[MachineCode]]] = {}
    timed: dict[Case, list[Time]] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        # Kernels are compiled and interpreted in different processes: Triton chooses when it is imported.
        before = os.environ.get("TRITON_INTERPRET")
        for interpret, work, results in ((False, compiled, codes), (True, _time, timed)):
            os.environ.pop("TRITON_INTERPRET", None)
            if interpret:
                os.environ["TRITON_INTERPRET"] = "1"
            task = progress.add_task(work.__name__.strip("_"), total=len(cases))
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (1,)) as pool:
                futures = {pool.submit(work, case, codes.get(case)): case for case in cases}
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    progress.update(task, advance=1, description=f"{work.__name__.strip('_')} {futures[future]}")
            if interpret and arguments.sensitivity:
                with ProcessPoolExecutor(1, spawn) as pool:
                    found = pool.submit(sensitivity, cases[0], codes[cases[0]]).result()
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    rows = [(case, timed[case]) for case in cases]
    console.print(table(rows))
    if arguments.sensitivity:
        console.print(sensitivity_table(cases[0], found))
    console.print(provenance(), soft_wrap=True, style="dim")
    if arguments.output:
        draw(save(rows, arguments.output), arguments.output.with_suffix(".png"))
        console.print(f"Written: {arguments.output}, {arguments.output.with_suffix('.png')}")
    return 0


def _passes(case: Case, seen) -> list:
    """What ``seen()`` collects of forward and of backward, on meta tensors."""
    import attn_kernels  # here, for TRITON_INTERPRET has to be set before

    op = OPS[case.op]
    with torch.device("meta"):
        module: nn.Module = OPERATORS[op.module].build(attn_kernels, case.shape[1])
        x: Tensor = torch.empty(case.shape, dtype=torch.bfloat16).to(memory_format=LAYOUTS[case.layout])
    x.requires_grad_()
    epilogue = (torch.empty_like(x).requires_grad_(), "relu") if op.epilogue else ()
    with seen(x) as forward:
        y = module(x, *epilogue)
    with seen(x) as backward:
        torch.autograd.grad(y, [x, *epilogue[:1], *module.parameters()], torch.empty_like(y))
    return [forward, backward]


def compiled(case: Case, _: None = None) -> list[list[MachineCode]]:
    """The machine code of each kernel that forward and backward launch."""
    architecture = MACHINES[case.machine].architecture
    passes = _passes(case, lambda x: capture(architecture.multiprocessors, x))
    return [[_machine_code(launch.kernel, architecture.capability) for launch in launches] for launches in passes]


@cache
def _machine_code(kernel: Kernel, capability: int) -> MachineCode:
    return machine_code(kernel, capability, disassemble=True)


def _time(case: Case, codes: list[list[MachineCode]]) -> list[Time]:
    return times(case, codes, case.model)


def times(case: Case, codes: list[list[MachineCode]], machine: Machine) -> list[Time]:
    """Of forward and backward, under the interpreter."""
    from benchmarks.interpreter import skip_repeated_work
    from benchmarks.record import recording

    skip_repeated_work()
    passes = _passes(case, lambda x: recording(machine.architecture.multiprocessors, x.shape))
    found = []
    for i, (launches, code) in enumerate(zip(passes, codes, strict=True)):
        floor = OPS[case.op].floors[i] * case.bytes
        others = [_others(case, provider, DIRECTIONS[i], floor, machine) for provider in ("compile", "eager")]
        us, simulator = _simulate(case, launches, code, machine)
        copy_us = copy(machine, int(floor))
        found.append(Time(us, copy_us, *others, simulator.cache.fetched / case.bytes, len(launches), simulator.waiting))
    return found


def _simulate(case: Case, launches: list, codes: list[MachineCode], machine: Machine) -> tuple[float, Simulator]:
    def simulated(samples: int | None) -> Simulator:
        simulator, kernels = Simulator(machine), 0
        for launch in launches:
            if isinstance(launch, Launch):
                simulator.operator(launch.loaded, launch.stored)
            else:
                groups = samples and -(-launch.groups * samples // case.shape[0])
                simulator.launch(launch, codes[kernels], groups)
                kernels += 1
        if kernels != len(codes):
            raise RuntimeError(f"{case} launches {kernels} kernels, of which {len(codes)} were compiled")
        return simulator

    if (n := case.shape[0]) <= WHOLE:
        simulator = simulated(None)
        return simulator.now, simulator
    whole, before = simulated(WHOLE), simulated(BEFORE)
    more = (n - WHOLE) / (WHOLE - BEFORE)
    whole.cache.fetched += round((whole.cache.fetched - before.cache.fetched) * more)
    return whole.now + (whole.now - before.now) * more, whole


@cache
def copy(machine: Machine, size: int) -> float:
    """Microseconds of a kernel that moves so many bytes, half of them read and half written."""
    simulator = Simulator(machine)
    simulator.copy(min(size, COPIED))
    return simulator.now + max(size - COPIED, 0) / 1000 / machine.dram


def _others(case: Case, provider: str, direction: str, floor: float, machine: Machine) -> float | None:
    """Microseconds of torch.compile or eager: bytes of traffic.csv for a map of this height; None where it has none."""
    stage = {stage.map[1]: name for name, stage in STAGES.items()}.get(case.shape[2])
    row = _traffic().get((case.op, stage, case.layout, provider))
    if row is None:
        return None
    touched, launches = float(row[f"touched_{direction}"]) * case.bytes, int(row[f"launches_{direction}"])
    if case.bytes <= machine.l2_bytes:
        touched = min(touched, floor)
    small = max(launches - touched // case.bytes, 0)  # those that read nothing of x's size
    return touched / 1000 / (OF_A_COPY * machine.dram) + launches * machine.gap + small * machine.kernel


@cache
def _traffic() -> dict[tuple[str, ...], dict[str, str]]:
    rows = [row for row in _read(RESULTS / "traffic.csv") if row["mode"] == "train"]
    return {(row["op"], row["stage"], row["layout"], row["provider"]): row for row in rows}


# What the model assumes, and by how much it may be wrong.
DOUBTS = {
    "hop": (0.7, 1.5, 2.0),
    "dram_latency": (0.6, 0.9, 1.1),
    "start": (0.2, 0.8),
    "l2": (4500.0, 7000.0),
    "l2_bytes": (12 * 2**20, 50 * 2**20),
    "port": (64.0,),
    "barrier": (0.05,),
    "cycles": (4,),
}


def sensitivity(case: Case, codes: list[list[MachineCode]]) -> list[tuple[str, object, list[Time]]]:
    """The case with one assumption after another changed."""
    found = [("as assumed", "", times(case, codes, case.model))]
    for name, values in DOUBTS.items():
        found += [(name, value, times(case, codes, replace(case.model, **{name: value}))) for value in values]
    return found


def provenance() -> str:
    found = ", ".join(f"{package} {version}" for package, version in versions().items())
    return f"MODEL, no GPU involved: {found}, commit {commit()}: {command()}"


def table(rows: Sequence[tuple[Case, list[Time]]]) -> Table:
    """A row per case and pass."""
    machines = ", ".join(dict.fromkeys(case.machine for case, _ in rows))
    setting = ", pessimistic" if rows[0][0].pessimistic else ""
    result = Table(
        title=f"MODEL of the time of a training step's passes, bf16, {machines}{setting}",
        caption="us; copy: of the least bytes; share: of a copy's bandwidth; fetched: from DRAM, in units of x; "
        "waiting: of the programs' time, for others. Not a measurement.",
        box=box.SIMPLE_HEAD,
    )
    for name in ("op", "x", "layout", "machine", "pass"):
        result.add_column(name, no_wrap=True)
    for name in ("us", "copy", "share", "torch.compile", "eager", "fetched", "launches", "waiting"):
        result.add_column(name, justify="right")
    for case, passes in rows:
        for direction, time in zip(DIRECTIONS, passes, strict=True):
            slower = time.compile_us is not None and time.us > time.compile_us
            result.add_row(
                case.op,
                _text(case.shape),
                case.layout,
                case.machine,
                direction,
                f"[red]{time.us:.1f}[/]" if slower else f"{time.us:.1f}",
                f"{time.copy_us:.1f}",
                f"{time.share:.0%}",
                _us(time.compile_us),
                _us(time.eager_us),
                f"{time.fetched:.2f}",
                str(time.launches),
                f"{time.waiting:.0%}",
            )
    return result


def sensitivity_table(case: Case, found: Iterable[tuple[str, object, list[Time]]]) -> Table:
    result = Table(title=f"MODEL: what each assumption decides, {case}", box=box.SIMPLE_HEAD)
    for name in ("assumption", "value", *(f"{direction} us, share" for direction in DIRECTIONS)):
        result.add_column(name, justify="left" if name == "assumption" else "right")
    for name, value, passes in found:
        result.add_row(name, str(value), *(f"{time.us:.1f}, {time.share:.0%}" for time in passes))
    return result


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


PLACE = ("op", "shape", "layout", "dtype", "machine", "pessimistic", "pass")


def save(rows: Iterable[tuple[Case, list[Time]]], path: Path) -> list[dict[str, str]]:
    """Write a row per case and pass into a record, in place of those that it has of them; all rows of the record."""
    found = {_place(row): row for row in _read(path)}
    where = {**versions(), "commit": commit(), "command": command()}
    for case, passes in rows:
        for direction, time in zip(DIRECTIONS, passes, strict=True):
            place = case.op, _text(case.shape), case.layout, "bf16", case.machine, str(int(case.pessimistic)), direction
            figures = ["" if value is None else f"{value:.4g}" for value in (time.share, *time)]
            names = "kind", *PLACE, "share", *Time._fields
            found[place] = dict(zip(names, ("MODEL", *place, *figures), strict=True)) | where
    # In the order in which they are asked for.
    ops, machines, maps = list(OPS), list(MACHINES), [_text(stage.map) for stage in STAGES.values()]

    def order(row: dict[str, str]) -> tuple:
        batch, _, shape = row["shape"].partition("x")
        rank = maps.index(shape) if shape in maps else len(maps)
        machine = row["pessimistic"], machines.index(row["machine"])
        return *machine, ops.index(row["op"]), int(batch), rank, shape, row["layout"] != "contiguous"

    ordered = sorted(found.values(), key=order)
    new = path.with_suffix(".new")  # the record is whole at any time
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ordered[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    new.replace(path)
    return ordered


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _place(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in PLACE)


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """The share of a copy's bandwidth by operator and shape, of the first machine and batch, a panel a pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def of(row: dict[str, str]) -> tuple[str, ...]:
        return row["machine"], row["pessimistic"], row["shape"].partition("x")[0]

    first = rows[0]
    rows = [row for row in rows if of(row) == of(first)]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = pyplot.subplots(len(DIRECTIONS), 1, figsize=(11, 7.5), sharex=True, layout="constrained")
    width = 0.84 / len(shapes)
    colours = pyplot.get_cmap("viridis")
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        for k, shape in enumerate(shapes):
            colour = colours(0.1 + 0.75 * k / max(len(shapes) - 1, 1))
            for place, op in enumerate(ops):
                found = [row for row in rows if (row["op"], row["shape"], row["pass"]) == (op, shape, direction)]
                x = place + (k - (len(shapes) - 1) / 2) * width
                worst = min((float(row["share"]) for row in found), default=0)
                panel.bar(x, 100 * worst, width * 0.92, color=colour, label=shape if place == 0 else None)
                compiled = [float(row["copy_us"]) / float(row["compile_us"]) for row in found if row["compile_us"]]
                if compiled:
                    panel.hlines(100 * max(compiled), x - width / 2, x + width / 2, color="#d1495b", lw=1.6)
        panel.axhline(85, color="0.6", lw=0.8, ls="--")
        panel.set_title(direction, loc="left", fontsize=11, fontweight="bold")
        panel.set_ylabel("% of a copy's bandwidth")
        panel.set_xticks(range(len(ops)), ops)
        panel.tick_params(axis="x", length=0, labelbottom=True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].plot([], [], color="#d1495b", lw=1.6, label="torch.compile")
    panels[0].legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    figure.suptitle(f"MODEL, not a measurement: share of a copy's bandwidth, bf16, {first['machine']}", fontsize=13)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    caption = f"torch {first['torch']}, Triton {first['triton']}, commits {commits}: python -m benchmarks time"
    figure.supxlabel(f"The worse of both layouts; torch.compile: the better.\n{caption}", fontsize=8, color="0.35")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
