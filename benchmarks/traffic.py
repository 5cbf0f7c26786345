"""Bytes that every module moves, counted without a GPU: eager PyTorch, torch.compile and the fused kernels.

eager is the code that people run (``benchmarks.users``) with its parameters in x's dtype; torch.compile compiles that.
Touched bytes are those of all loads and stores, in units of |x|, the bytes of x; distinct ones count once a launch, as
in Inductor's accounting and in eager's. DRAM bytes are what is left of the touched behind a model of the device's L2:
an LRU over 32-byte sectors, empty before and written back after forward and backward each, at half the nominal
capacity, for programs in flight share it. Programs run side by side, of 128 registers per thread, each doing one access
in its turn. What runs is a slice of the device and of a batch of 32: as small a part of
the multiprocessors and of L2 as of the elements, so that |x| / L2 is that of the whole, of enough samples that one fits
L2 several times, as on the whole. A slice has fewer channels or pixels, so that its parameters weigh little: what
programs read of them again and again weighs more on a whole one (--shape).
The exit status is 1 if a fused module moves more distinct bytes than torch.compile or than its budget allows; CBAM in
inference, which reads x as often, may move more of what is not full-size.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from benchmarks import users
from benchmarks.cache import Cache
from benchmarks.check import DTYPES, forward_backward
from benchmarks.meter import Traffic, meter
from benchmarks.provenance import command, commit, versions
from benchmarks.report import NOT_MEASURED
from reference.catalogue import LAYOUTS, WHOLE, Budget

RESULTS = Path(__file__).parent / "results"
MODES = ("train", "eval")
DIRECTIONS = ("forward", "backward")
PROVIDERS = {"eager": ("eager", "#9aa5b1"), "compile": ("torch.compile", "#e8a33d"), "fused": ("fused", "#2f6fb5")}
BATCH = 32
MB = 1024**2


class Device(NamedTuple):
    """A GPU's L2 in MB and its multiprocessors."""

    l2: int
    multiprocessors: int


DEVICES = {
    "A100": Device(40, 108),
    "H100": Device(50, 132),
    "L4": Device(48, 58),
    "RTX 4090": Device(72, 128),
}


class Op(NamedTuple):
    """A module, with the end of a residual block behind it or without, and its budget in units of |x|."""

    module: str
    budget: Budget
    epilogue: bool = False


OPS = {name: Op(name, operator.budget) for name, operator in WHOLE.items()}
OPS |= {f"{name}+add+ReLU": Op(name, op.epilogue_budget, True) for name, op in WHOLE.items() if op.epilogue_budget}
OPS = dict(sorted(OPS.items(), key=lambda named: list(WHOLE).index(named[1].module)))
# Of the budget: parameters, gates and maps, which are not full-size. A slice has half of the channels and fewer, so
# that its maps, of one value per pixel, weigh twice and more what they do on the whole.
SMALL = 0.12


class Stage(NamedTuple):
    """What ResNet-50 gives to attention, (C, H, W), and the part of it that runs, (N, C, H, W)."""

    map: tuple[int, int, int]
    runs: tuple[int, int, int, int]


# A slice has a batch's samples, each as small beside L2 as on the whole: what one group of samples leaves there for the
# next phase is what decides. Maps of one value per pixel weigh four to eight times what they do on the whole.
STAGES = {
    "stage1": Stage((256, 56, 56), (32, 64, 24, 24)),
    "stage2": Stage((512, 28, 28), (32, 64, 28, 28)),
    "stage3": Stage((1024, 14, 14), (32, 128, 14, 14)),
    "stage4": Stage((2048, 7, 7), (32, 256, 7, 7)),
}


class Case(NamedTuple):
    """One module on one shape. ``train`` is forward and backward, ``eval`` forward alone, without gradients."""

    op: str
    stage: str
    shape: tuple[int, int, int, int]
    slice: float
    layout: str
    mode: str
    dtype: str
    device: str

    @property
    def _budgets(self) -> tuple[float, float, float]:
        budget = OPS[self.op].budget
        if budget.walks_channels_last and self.layout == "channels_last" and self.shape[2] * self.shape[3] > 512:
            return budget.walks_channels_last
        return budget.forward, budget.backward, budget.dram

    @property
    def budget(self) -> tuple[float, ...]:
        """In units of |x|, forward (and backward)."""
        return self._budgets[: 2 if self.mode == "train" else 1]

    def allowed(self, compiled: float) -> float:
        """In units of |x|, all in all, where torch.compile moves so much."""
        small = SMALL if OPS[self.op].budget.infers_as_compiled and self.mode == "eval" else 0
        return compiled * (1 + small) + 1e-6

    @property
    def dram_budget(self) -> float:
        """Of a training step, in units of |x|."""
        return self._budgets[2]


class Pass(NamedTuple):
    """Forward or backward: launches, and bytes in units of |x|. Nothing runs of torch.compile, behind no cache then."""

    launches: int
    touched: float
    distinct: float | None = None  # touched at least once in a launch: what Inductor's accounting and eager's count
    dram: float | None = None

    @property
    def moved(self) -> float:
        """What is judged: distinct bytes, as those of Inductor are, which knows no others."""
        return self.touched if self.distinct is None else self.distinct


class Kernel(NamedTuple):
    """One launch of the fused module, in units of |x|."""

    name: str
    loaded: float
    stored: float
    fetched: float


class Result(NamedTuple):
    """A case's passes by provider, and the kernels of the fused one by pass."""

    case: Case
    passes: dict[str, list[Pass]]
    kernels: list[list[Kernel]]

    @property
    def complaints(self) -> list[str]:
        """What the fused module does too much of."""
        fused = [p.moved for p in self.passes["fused"]]
        found = [
            f"{name} moves {moved:.2f} |x|, the budget is {budget:g} |x| + {SMALL:.0%}"
            for name, moved, budget in zip(DIRECTIONS, fused, self.case.budget, strict=False)
            if moved > budget * (1 + SMALL)
        ]
        if self.case.mode == "train" and self.case.stage:
            dram, budget = sum(p.dram for p in self.passes["fused"]), self.case.dram_budget
            if dram > budget * (1 + SMALL):
                found.append(f"{dram:.2f} |x| of DRAM, the budget is {budget:g} |x| + {SMALL:.0%}")
        if "compile" in self.passes:
            compiled = sum(p.moved for p in self.passes["compile"])
            if sum(fused) > self.case.allowed(compiled):
                found.append(f"{sum(fused):.2f} |x| in all, torch.compile {compiled:.2f} |x|")
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks traffic --op SE CBAM --stage stage3 --device L4 --kernels"
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="of ResNet-50")
    parser.add_argument("--shape", type=_shape, metavar="NxCxHxW", help=f"run this part of a batch of {BATCH} instead")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of x (default: float16)")
    parser.add_argument("--device", choices=DEVICES, default="H100", help="whose L2 is modelled (default: H100)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--kernels", action="store_true", help="list what each fused kernel moves")


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(part) for part in text.split("x"))
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected NxCxHxW, got {text}")
    return shape


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """What the arguments ask for; what takes longest comes first, so that no worker is left alone with it."""
    if arguments.shape:
        places = [("", arguments.shape, arguments.shape[0] / BATCH)]
    else:
        stages = {name: STAGES[name] for name in arguments.stage}
        places = [(name, s.runs, math.prod(s.runs) / (BATCH * math.prod(s.map))) for name, s in stages.items()]
    selection = itertools.product(arguments.mode, places, arguments.op, arguments.layout)
    for mode, (stage, shape, part), op, layout in selection:
        if op == "BAM" and shape[0] == 1:  # its BatchNorm wants two samples
            shape, part = (2, *shape[1:]), 2 * part
        yield Case(op, stage, shape, part, layout, mode, arguments.dtype, arguments.device)


def run(arguments: argparse.Namespace) -> int:
    if absent := [op for op in arguments.op if not users.is_available(OPS[op].module)]:
        print(f"python -m benchmarks traffic needs timm for {', '.join(absent)}: it is not installed.", file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "1"  # for the workers; on a machine with a GPU too
    todo = list(cases(arguments))
    compiled = not arguments.no_compile
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    spawn, workers = multiprocessing.get_context("spawn"), min(os.cpu_count() or 1, len(todo))
    known = recorded(RESULTS / "traffic.csv")
    results: dict[Case, Result] = {}
    with (
        ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("traffic", total=len(todo))
        for future in as_completed(
            [pool.submit(measure, case, compiled and place(case) not in known) for case in todo]
        ):
            result = future.result()
            if compiled:
                result.passes.setdefault("compile", known.get(place(result.case)))
            results[result.case] = result
            progress.update(task, advance=1, description=f"{result.case.op} {result.case.stage}")
    ordered = [results[case] for case in todo]

    console.print(traffic_table(ordered))
    if arguments.kernels:
        console.print(kernel_table(ordered))
    console.print(provenance(), soft_wrap=True, style="dim")
    if compiled and not arguments.shape and len(todo) == len(OPS) * len(STAGES) * len(LAYOUTS) * len(MODES):
        save(ordered, RESULTS / "traffic.csv")
        draw(ordered, RESULTS / "traffic.png")
        console.print("Written to benchmarks/results: traffic.csv, traffic.png")
    for result in ordered:
        for complaint in result.complaints:
            console.print(f"OVER {' '.join(place(result.case))}: {complaint}", style="red", soft_wrap=True)
    return 1 if any(result.complaints for result in ordered) else 0


def measure(case: Case, compiled: bool = True) -> Result:
    """Run one case under the interpreter, eager too and, if ``compiled``, by Inductor's accounting."""
    import attn_kernels  # here, for TRITON_INTERPRET has to be set before
    from attn_kernels.ops.common import device as gpu

    device, op = DEVICES[case.device], OPS[case.op]
    dtype, layout = DTYPES[case.dtype], LAYOUTS[case.layout]
    torch.manual_seed(0)
    fused, eager = (WHOLE[op.module].build(kit, case.shape[1]) for kit in (attn_kernels, users))
    eager = (users.AddReLU(eager) if op.epilogue else eager).to(dtype=dtype, memory_format=layout)
    for module in (fused, eager):
        module.train(case.mode == "train")
    x, residual, dy = (torch.randn(case.shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    passes_of = partial(_passes, x=x, residual=residual if op.epilogue else None, dy=dy, mode=case.mode)
    capacity, multiprocessors = int(device.l2 * MB / 2 * case.slice), max(round(device.multiprocessors * case.slice), 1)

    passes, kernels = {}, []
    for provider, module in (("eager", eager), ("fused", fused)):
        with gpu.assuming(multiprocessors):
            seen = passes_of(module, count=lambda: meter(Cache(capacity), multiprocessors))
        passes[provider] = [
            Pass(t.launches, *(size / x.nbytes for size in (t.touched, t.cache.distinct, t.dram))) for t in seen
        ]
    for traffic in seen:
        launches = [(launch.name, launch.loaded, launch.stored, launch.fetched) for launch in traffic.per_launch]
        kernels.append([Kernel(name, *(size / x.nbytes for size in sizes)) for name, *sizes in launches])
    if compiled:
        from benchmarks import inductor  # here, for it imports Triton

        passes["compile"] = [Pass(g.launches, g.touched / x.nbytes) for g in inductor.graphs(eager, passes_of)]
    return Result(case, passes, kernels)


def _passes(
    module: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor, mode: str, count: Callable = nullcontext
) -> tuple[Traffic, ...]:
    """What ``count`` sees of each pass."""
    if mode == "train":
        return forward_backward(module, x, residual, dy, count)[1]
    with torch.no_grad(), count() as traffic:
        module(x) if residual is None else module(x, residual, "relu")
    return (traffic,)


def provenance() -> str:
    found = ", ".join(f"{package} {version}" for package, version in versions().items())
    return f"Counted in Triton's interpreter, no GPU involved: {found}, commit {commit()}: {command()}"


def traffic_table(results: Sequence[Result]) -> Table:
    """A row per case; forward + backward in training, forward in eval."""
    first = results[0].case
    table = Table(
        title=f"Bytes in units of x ({first.dtype}), forward + backward in training; DRAM: behind {first.device}'s L2",
        caption=f"A slice of the device and of a batch of {BATCH} runs; the budget is of distinct bytes, + {SMALL:.0%} "
        "for what is not full-size. eager: timm's SE and CBAM, the published BAM and SimAM; compile: the same under "
        "torch.compile. PyTorch's own operators count each operand once.",
        box=box.SIMPLE_HEAD,
    )
    for name in ("op", "runs", "slice", "layout", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("eager", "compile", "fused", "distinct", "budget", "DRAM eager", "fused", "launches e, c, f"):
        table.add_column(name, justify="right", no_wrap=True)
    for case, passes, _ in results:
        complaints = Result(case, passes, []).complaints
        touched = {provider: "+".join(f"{p.touched:.2f}" for p in found) for provider, found in passes.items()}
        dram = {provider: "+".join(f"{p.dram:.2f}" for p in passes[provider]) for provider in ("eager", "fused")}
        launches = ("+".join(str(p.launches) for p in passes[name]) for name in PROVIDERS if name in passes)
        table.add_row(
            case.op,
            _text(case.shape),
            f"1/{round(1 / case.slice)}",
            case.layout,
            case.mode,
            touched["eager"],
            touched.get("compile", NOT_MEASURED),
            f"[red]{touched['fused']}[/]" if complaints else touched["fused"],
            "+".join(f"{p.distinct:.2f}" for p in passes["fused"]),
            "+".join(f"{budget:g}" for budget in case.budget),
            dram["eager"],
            dram["fused"],
            ", ".join(launches),
        )
    return table


def kernel_table(results: Sequence[Result]) -> Table:
    """What each launch of the fused modules moves."""
    table = Table(title="Launches of the fused modules, in units of x", box=box.SIMPLE_HEAD)
    for name in ("op", "runs", "layout", "mode", "pass", "launch"):
        table.add_column(name, no_wrap=True)
    for name in ("loads", "stores", "fetched from DRAM"):
        table.add_column(name, justify="right")
    for case, _, kernels in results:
        table.add_section()
        for direction, launches in zip(DIRECTIONS, kernels, strict=False):
            for name, *sizes in launches:
                table.add_row(*place(case)[:4], direction, name, *(f"{size:.3f}" for size in sizes))
    return table


def place(case: Case) -> tuple[str, ...]:
    """A case's name in tables and files."""
    return case.op, _text(case.shape), case.layout, case.mode, case.dtype


PLACE = ("op", "shape", "layout", "mode", "dtype")
COUNTS = [f"{what}_{direction}" for what in Pass._fields for direction in DIRECTIONS]


def save(results: Iterable[Result], path: Path) -> None:
    """A row per provider of a case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {**versions(), **_users(), "commit": commit(), "command": command()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*PLACE, "stage", "slice", "l2", "provider", *COUNTS, *where])
        for case, passes, _ in results:
            for provider in PROVIDERS:
                counts = [
                    _number(getattr(passes[provider][i], what)) if i < len(passes[provider]) else ""
                    for what in Pass._fields
                    for i in range(len(DIRECTIONS))
                ]
                model = case.stage, f"1/{round(1 / case.slice)}", case.device
                writer.writerow([*place(case), *model, provider, *counts, *where.values()])


def recorded(path: Path) -> dict[tuple[str, ...], list[Pass]]:
    """What torch.compile touched, by place: with the same PyTorch, timm and users' code it need not compile again."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] == "compile"]
    return {
        tuple(row[name] for name in PLACE): [
            Pass(int(row[f"launches_{direction}"]), float(row[f"touched_{direction}"]))
            for direction in DIRECTIONS
            if row[f"touched_{direction}"]
        ]
        for row in rows
        if {"torch": versions()["torch"], **_users()}.items() <= row.items()
    }


def _users() -> dict[str, str]:
    """What decides what users' code is: the version of timm, and a digest of what is written here."""
    digest = hashlib.sha256(Path(users.__file__).read_bytes()).hexdigest()[:12]
    return {"timm": version("timm"), "users": digest}


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.9g}"


def draw(results: Sequence[Result], path: Path) -> None:
    """Touched bytes of a training step by op and provider, a panel a layout; means over the stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(LAYOUTS), 1, figsize=(9, 7.2), sharex=True, layout="constrained")
    width = 0.8 / len(PROVIDERS)
    for panel, layout in zip(panels, LAYOUTS, strict=True):
        for i, (provider, (label, colour)) in enumerate(PROVIDERS.items()):
            for place, op in enumerate(OPS):
                found = [
                    r.passes[provider]
                    for r in results
                    if (r.case.op, r.case.layout, r.case.mode) == (op, layout, "train")
                ]
                forward, backward = (sum(p[j].moved for p in found) / len(found) for j in range(2))
                x = place + (i - (len(PROVIDERS) - 1) / 2) * width
                panel.bar(x, forward, width * 0.94, color=colour, label=label if place == 0 else None)
                panel.bar(x, backward, width * 0.94, bottom=forward, color=colour, alpha=0.55)
                total = forward + backward
                panel.annotate(f"{total:.1f}", (x, total), (0, 2), textcoords="offset points", ha="center", fontsize=9)
        panel.set_title(layout, loc="left", fontsize=11, fontweight="bold")
        panel.set_ylabel("bytes moved / bytes of x")
        panel.set_xticks(range(len(OPS)), OPS)
        panel.tick_params(axis="x", length=0, labelbottom=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.1)
    panels[0].legend(frameon=False, title="full colour: forward, light: backward")
    case, runs = results[0].case, ", ".join(dict.fromkeys(_text(result.case.shape) for result in results))
    figure.suptitle("Memory traffic of a training step (mean over slices of ResNet-50's four stages)", fontsize=13)
    found = ", ".join(f"{package} {version}" for package, version in versions().items())
    figure.supxlabel(
        f"{case.dtype}, {runs}\n"
        "eager: timm's SE and CBAM, the published BAM and SimAM; torch.compile: the same, compiled\n"
        "Counted without a GPU: operand sizes (eager), Inductor's accounting (torch.compile), "
        f"every sector once per launch (fused)\n{found}, timm {version('timm')}, commit {commit()}, {command()}",
        fontsize=8,
        color="0.35",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
