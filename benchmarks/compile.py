"""Every kernel compiled for every architecture, without a GPU: registers, spills, shared memory, occupancy, vectors.

The kernels are those that the launchers pick for the feature maps of ResNet-50, EfficientNet-B0 and MobileNetV3,
forward and backward, on each architecture's device. The exit status is 1 if one spills, asks for more shared memory
than there is, computes in float64 without being asked to, or reads or writes rows of whole 16-byte vectors by less.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from benchmarks.machine_code import (
    ARCHITECTURES,
    VECTOR_BITS,
    Access,
    Architecture,
    ArgumentPath,
    Kernel,
    Launch,
    MachineCode,
    capture,
    machine_code,
)
from benchmarks.provenance import command, commit, versions
from benchmarks.shapes import EFFICIENTNET_B0, MOBILENET_V3_LARGE, RESNET_50
from reference.catalogue import DTYPES, LAYOUTS, OPERATORS, POOLS

MODULES = (*OPERATORS, "ChannelAttention")
BATCHES = (1, 32)


def gathers(kernel: Kernel) -> int:
    """A thread's loads of single elements of x: the values of maxima whose index was saved."""
    if kernel.name == "gate_bwd_kernel" and kernel.constant("POOLS", "max"):  # one per plane
        planes = kernel.constant("WORK", "samples") * kernel.constant("TILE", "block_c")
        return max(planes // (32 * dict(kernel.options)["num_warps"]), 1)
    return int(kernel.name == "dspatial_kernel")  # one per pixel


class Site(NamedTuple):
    """A module and the map (C, H, W) that it gets, with or without the end of a residual block behind it."""

    network: str
    module: str
    map: tuple[int, int, int]
    epilogue: bool = False
    options: tuple[tuple[str, object], ...] = ()

    def build(self, kit: object) -> nn.Module:
        if self.module == "ChannelAttention":
            return ChannelAttention(self.map[0])
        return OPERATORS[self.module].build(kit, self.map[0], **dict(self.options))


class ChannelAttention(nn.Module):
    """The functional form that has no module, with one layer as its gate."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x, residual=None, activation=None):
        from attn_kernels.functional import channel_attention

        def gate(mean, maximum):
            return torch.sigmoid(self.fc((mean + maximum).to(self.fc.weight.dtype)))

        return channel_attention(x, gate, pool_types=("avg", "max"), residual=residual, activation=activation)


def _se(network: str, channels: int, side: int, hidden: int, activation: str, gate: str) -> Site:
    options = (("hidden_channels", hidden), ("mlp_activation", activation), ("gate", gate))
    return Site(network, "SE", (channels, side, side), options=options)


BLOCKS = [(channels, side, side) for channels, side, _ in RESNET_50]
CONV2 = [(channels // 4, side, side) for channels, side, _ in RESNET_50]  # where SimAM is
NETWORK_SITES = (
    *(
        Site("resnet50", module, shape, epilogue=module != "BAM")
        for module in ("SE", "CBAM", "BAM")
        for shape in BLOCKS
    ),
    *(Site("resnet50", "SimAM", shape) for shape in BLOCKS + CONV2),
    *(_se("efficientnet_b0", *stage, "silu", "sigmoid") for stage in EFFICIENTNET_B0),
    *(_se("mobilenetv3_large", *stage, "relu", "hardsigmoid") for stage in MOBILENET_V3_LARGE),
)
# Every option that makes another kernel, once.
ALL_POOLS = (("pool_types", POOLS),)
OPTION_SITES = (
    Site("options", "SE", (512, 28, 28)),
    Site("options", "SE", (512, 28, 28), options=(("bias", False), ("mlp_activation", "gelu"))),
    Site("options", "SE", (512, 28, 28), options=(("mlp_activation", "leaky_relu"),)),
    Site("options", "SE", (512, 28, 28), options=(("mlp_activation", "hardswish"), ("gate", "hardsigmoid"))),
    Site("options", "ChannelGate", (256, 56, 56)),
    Site("options", "ChannelGate", (512, 28, 28), True),
    Site("options", "ChannelGate", (512, 28, 28), True, ALL_POOLS),
    Site("options", "SpatialGate", (512, 28, 28), True),
    Site("options", "SpatialGate", (1024, 14, 14), True),
    Site("options", "CBAM", (512, 28, 28)),
    Site("options", "BAM", (512, 28, 28), True),
    Site("options", "SimAM", (512, 28, 28), True),
    Site("options", "ChannelAttention", (1024, 14, 14)),
    Site("options", "ChannelAttention", (1024, 14, 14), True),
)


class Case(NamedTuple):
    """A module on one input."""

    site: Site
    batch: int
    layout: str
    dtype: str

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.batch, *self.site.map)))
        return f"{self.site.network} {self.site.module} {shape} {self.dtype} {self.layout}"


def name_of(module: str, kernel: str) -> str:
    """The operator and the kernel, as in bam.dx."""
    return f"{module.removeprefix('attn_kernels.ops.').partition('.')[0]}.{kernel.removesuffix('_kernel')}"


@dataclass
class Variant:
    """A kernel to compile, and which cases launch it."""

    kernel: Kernel
    architecture: Architecture
    full_size: frozenset[ArgumentPath] = frozenset()
    vector: bool = False
    cases: list[Case] = field(default_factory=list)

    @property
    def name(self) -> str:
        return name_of(self.kernel.module, self.kernel.name)

    def __str__(self) -> str:
        return f"{self.name} {self.architecture.name}, {self.cases[0]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks compile --architectures sm_90 --modules SE CBAM --dtypes bf16"
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these, as in channel_gate.gate_bwd")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="fp64: one shape per module")
    parser.add_argument("--maps", nargs="+", metavar="CxHxW", help="only these feature maps, as in 512x28x28")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="default: 1 32")
    parser.add_argument("--sass", action="store_true", help="hold PTX against the disassembly too: twice the time")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="of every kernel; the record is benchmarks/results/")


def run(arguments: argparse.Namespace) -> int:
    if os.environ.pop("TRITON_INTERPRET", None) and "triton" in sys.modules:
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1, under which it compiles nothing")
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    selected = list(cases(arguments.modules, arguments.dtypes, arguments.batches, arguments.maps))
    found = [v for name in arguments.architectures for v in variants(ARCHITECTURES[name], selected)]
    try:
        found = named(found, arguments.kernels)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows, wrong = [], []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("kernels", total=len(found))
        for variant, code in compile_all(found, arguments.jobs, arguments.sass):
            progress.update(task, advance=1, description=f"{variant.name} {variant.architecture.name}")
            if isinstance(code, str):
                wrong.append(f"{variant}: does not compile: {code}")
            else:
                rows.append(describe(variant, code))

    if rows:
        rows.sort(key=lambda row: list(map(str, row.values())))
        if arguments.output:
            write(rows, arguments.output)
        console.print(table(rows))
    torch_version, triton_version = versions().values()
    console.print(
        f"torch {torch_version}, Triton {triton_version}, commit {commit()}, no GPU; {command()}; "
        f"{f'every kernel: {arguments.output}' if arguments.output else 'no rows were written (--output)'}",
        soft_wrap=True,
    )
    wrong += [f"{row['kernel']} {row['architecture']}, {row['case']}: {row['faults']}" for row in rows if row["faults"]]
    for line in wrong:
        console.print(f"WRONG {line}", soft_wrap=True)
    console.print(f"{len(found) - len(wrong)} of {len(found)} kernels meet every requirement.")
    return 1 if wrong else 0


def cases(
    modules: Sequence[str], dtypes: Sequence[str], batches: Sequence[int], maps: Sequence[str] | None
) -> Iterator[Case]:
    """What is to be compiled: the sites in every layout and dtype; the options, and all of float64, on one map each."""
    for site in (*NETWORK_SITES, *OPTION_SITES):
        is_option = site in OPTION_SITES
        wanted = site.module in modules and (maps is None or "x".join(map(str, site.map)) in maps)
        for batch, layout, dtype in itertools.product(batches, LAYOUTS, dtypes):
            if wanted and (batch == max(batches) if is_option else dtype != "fp64"):
                yield Case(site, batch, layout, dtype)


def variants(architecture: Architecture, cases: Iterable[Case]) -> list[Variant]:
    """The different kernels that the cases launch on an architecture's device."""
    found: dict[Kernel, Variant] = {}
    for case in cases:
        for launch in launches(case, architecture.multiprocessors):
            variant = found.setdefault(launch.kernel, Variant(launch.kernel, architecture))
            variant.full_size |= launch.full_size
            variant.vector |= launch.vector
            if case not in variant.cases:
                variant.cases.append(case)
    return list(found.values())


def named(variants: list[Variant], names: Sequence[str] | None) -> list[Variant]:
    """The variants of kernels with these names, of all by default; ValueError where there is none of a name."""
    known = {variant.name for variant in variants}
    if unknown := {*(names or ())} - known:
        raise ValueError(f"--kernels: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    return [variant for variant in variants if names is None or variant.name in names]


def launches(case: Case, multiprocessors: int) -> list[Launch]:
    """What one case launches in training, forward and backward, and in inference."""
    import attn_kernels  # here, for run() has to come before

    site, dtype = case.site, DTYPES[case.dtype]
    with torch.device("meta"):
        module = site.build(attn_kernels).to(torch.float64 if dtype == torch.float64 else torch.float32)
        x = torch.empty(case.batch, *site.map, dtype=dtype).to(memory_format=LAYOUTS[case.layout]).requires_grad_()
    epilogue = (torch.empty_like(x).requires_grad_(), "relu") if site.epilogue else ()
    with capture(multiprocessors, x) as found:
        if site.module != "BAM" or case.batch > 1:  # BatchNorm1d cannot learn from one sample
            y = module(x, *epilogue)
            torch.autograd.grad(y, [x, *epilogue[:1], *module.parameters()], torch.empty_like(y))
        with torch.no_grad():
            module.eval()(x, *epilogue)
    return found


def compile_all(
    variants: Sequence[Variant], jobs: int, disassemble: bool
) -> Iterator[tuple[Variant, MachineCode | str]]:
    """Compile in processes of their own, in any order; the compiler's complaint where it fails."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(partial(_compile, disassemble=disassemble), variants, chunksize=4)


def _compile(variant: Variant, disassemble: bool) -> tuple[Variant, MachineCode | str]:
    try:
        return variant, machine_code(variant.kernel, variant.architecture.capability, disassemble)
    except Exception as error:  # of the compiler, of whatever kind
        return variant, f"{type(error).__name__}: {error} {error.__cause__ or ''}"


Row = dict[str, object]


def describe(variant: Variant, code: MachineCode) -> Row:
    """A row of the CSV."""
    kernel, architecture, first = variant.kernel, variant.architecture, variant.cases[0]
    programs = architecture.occupancy(code.registers, code.shared, code.warps)
    full_size = [access for access in code.accesses if access.argument in variant.full_size]
    for gather in [a for a in full_size if a.kind == "load" and a.bits < VECTOR_BITS][: gathers(kernel)]:
        full_size.remove(gather)
    loads, stores = ([a for a in full_size if a.kind == kind] for kind in ("load", "store"))
    return {
        "kernel": variant.name,
        "architecture": architecture.name,
        "dtype": first.dtype,
        "layout": first.layout,
        "case": str(first),
        "cases": len(variant.cases),
        "block_c": kernel.constant("TILE", "block_c"),
        "block_p": kernel.constant("TILE", "block_p"),
        "warps": code.warps,
        "registers": code.registers,
        "stack_bytes": code.stack,
        "local_bytes": code.local,
        "shared_bytes": code.shared,
        "shared_limit": architecture.shared_a_program,
        "programs_per_multiprocessor": programs,
        "occupancy_percent": round(100 * programs * code.warps / architecture.warps),
        "vector_rows": int(variant.vector),
        "loads": len(loads),
        "vector_loads": _wide(loads),
        "stores": len(stores),
        "vector_stores": _wide(stores),
        "fp64_instructions": code.fp64,
        "faults": "; ".join(faults(variant, code, full_size)),
        "device": architecture.device,
        **versions(),
        "commit": commit(),
        "command": command(),
    }


def _wide(accesses: Iterable[Access]) -> int:
    return sum(access.bits >= VECTOR_BITS for access in accesses)


def faults(variant: Variant, code: MachineCode, full_size: Sequence[Access]) -> Iterator[str]:
    """What is wrong with a kernel."""
    # fp64 is for gradcheck, on tensors of a few elements: it has to run, not to be fast.
    if not variant.kernel.is_fp64 and (code.stack or code.local or (code.sass and code.sass.local)):
        yield f"spills: {code.stack} bytes of stack, {code.local} of local memory"
    if code.shared > variant.architecture.shared_a_program:
        yield f"{code.shared} bytes of shared memory, {variant.architecture.shared_a_program} at most"
    if not variant.architecture.occupancy(code.registers, code.shared, code.warps):
        yield "does not fit a multiprocessor"
    if not variant.kernel.is_fp64 and (code.fp64 or (code.sass and code.sass.fp64)):
        yield f"{code.fp64} instructions in float64"
    if variant.vector and (narrow := [a for a in full_size if a.bits < VECTOR_BITS]):
        names = sorted({f"{variant.kernel.argument_name(a.argument)} {a.bits}" for a in narrow})
        yield f"{len(narrow)} of {len(full_size)} accesses narrower than {VECTOR_BITS} bits: {', '.join(names)}"
    if code.sass and _wide(code.accesses) > sum(n for (_, bits), n in code.sass.bits.items() if bits >= VECTOR_BITS):
        yield "ptxas has split vectors"


def write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row]) -> Table:
    """The worst of each kernel on each architecture."""
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    names.sort(key=list(ARCHITECTURES).index)
    result = Table(
        title="Worst of each kernel: registers per thread / KB of shared memory / least occupancy of a multiprocessor",
        caption="vectors: accesses of tensors like x that are 128 bits wide or more, where rows are whole vectors",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("kernel")
    result.add_column("variants", justify="right")
    for name in names:
        result.add_column(f"{name}, {ARCHITECTURES[name].device}", justify="right")
    for name in ("stack", "local", "vectors", "faults"):
        result.add_column(name, justify="right")
    by_kernel: dict[str, list[Row]] = {}
    for row in rows:
        by_kernel.setdefault(row["kernel"], []).append(row)
    for kernel, found in by_kernel.items():
        cells = [_worst([row for row in found if row["architecture"] == name]) for name in names]
        faulty = sum(bool(row["faults"]) for row in found)
        stack, local = (str(max(row[name] for row in found)) for name in ("stack_bytes", "local_bytes"))
        result.add_row(kernel, str(len(found)), *cells, stack, local, _share(found), str(faulty or ""))
    return result


def _worst(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    registers, shared = (max(row[name] for row in rows) for name in ("registers", "shared_bytes"))
    return f"{registers} / {shared / 1024:.1f} / {min(row['occupancy_percent'] for row in rows)}%"


def _share(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["vector_rows"]]
    total = sum(row["loads"] + row["stores"] for row in rows)
    return f"{sum(row['vector_loads'] + row['vector_stores'] for row in rows) / total:.0%}" if total else ""
