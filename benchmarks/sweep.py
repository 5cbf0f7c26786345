"""Which options of a launch are quickest on a GPU: ``speed --sweep`` times every kernel with one of them changed.

The options are those that change neither the grid nor the tile: warps, the limit of registers, the stages of the loop
over x, and the lookahead of a launch in two phases. A module's results are checked with each of them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import runner, speed, timing
from benchmarks.correctness import Wrong
from benchmarks.device import prepare
from benchmarks.machine_code import ops
from benchmarks.plan import Cell
from benchmarks.precompile import target
from benchmarks.rows import WRONG, Measurement, Results, Row
from benchmarks.shapes import DTYPES, KERNELS, bytes_of
from reference.catalogue import LAYOUTS

SUITE = "sweep"
AS_IT_IS = "fused as it is"  # a provider, beside one per change
SECONDS = 3  # that a cell takes at first
PRIORS = {(SUITE, AS_IT_IS): SECONDS}
REGISTERS = (64, 80, 96, 128, 168, 255)  # that threads may have: programs of 4 warps fit 8, 6, 5, 4, 3 and 2 times
STAGES = (1, 2, 3, 4, 5)
MOST_WARPS = 16
DIRECTIONS = ("forward", "backward")


def run(arguments: argparse.Namespace) -> int:
    a, kept = arguments, []
    capability, multiprocessors = target()

    def plan() -> list[Cell]:
        found = cells(a.kernels, a.batches, a.layouts, a.dtypes, multiprocessors)
        if torch.cuda.is_available():
            in_time = found if a.minutes == math.inf else found[: int(60 * a.minutes / SECONDS)]
            compile_ahead(in_time, capability, multiprocessors)
        return found

    def kept_and_measured(cell: Cell, results: Results) -> Iterator[tuple[str, list[Measurement]]]:
        kept[:] = [results]
        return measure(cell, results)

    status = runner.run(plan, {SUITE: kept_and_measured}, PRIORS, arguments)
    for results in kept:
        report(row for row in results.rows if row.environment[:-1] == results.environment[:-1])
    return status


class Launched(NamedTuple):
    """A launch of a kernel: all of its arguments and options by name."""

    kernel: str
    arguments: dict[str, object]


class Change(NamedTuple):
    """An option of a kernel's launches, and the value that it gets."""

    kernel: str
    option: str
    value: int

    @classmethod
    def of(cls, provider: str) -> Change | None:
        """As a row names it; None of the launches as they are."""
        if provider == AS_IT_IS:
            return None
        kernel, option, value = provider.removeprefix("fused ").replace("=", " ").split()
        return cls(f"{kernel}_kernel", option, int(value))

    @property
    def provider(self) -> str:
        return f"fused {self.kernel.removesuffix('_kernel')} {self.option}={self.value}"


def changes(launch: Launched) -> Iterator[Change]:
    """Every other value that an option of this launch may have."""
    kernel, arguments = launch
    warps, limit = arguments["num_warps"], arguments.get("maxnreg")
    values: dict[str, Iterable[int]] = {
        "num_warps": (warps // 2, 2 * warps),
        "maxnreg": (registers for registers in REGISTERS if registers * 32 * warps <= 65536),
    }
    present = {"num_warps": warps, "maxnreg": limit}
    stages = arguments["TILE"].stages if "TILE" in arguments else 1
    if stages > 1:  # 1 is a loop of one turn
        present["stages"], values["stages"] = stages, STAGES
    if "lookahead" in arguments:
        lookahead, most = arguments["lookahead"], arguments["groups"]
        present["lookahead"], values["lookahead"] = (
            lookahead,
            {max(lookahead // 2, 1), min(2 * lookahead, most), min(4 * lookahead, most)},
        )
    for option, found in values.items():
        for value in sorted(found):
            if value != present[option] and (option != "num_warps" or 1 <= value <= MOST_WARPS):
                yield Change(kernel, option, value)


@contextmanager
def _in_place_of_launches(launch: Callable[[str, Callable[..., object], dict[str, object]], object]):
    """Inside the block every launch is ``launch(kernel's name, launcher, arguments and options by name)``."""

    class Kernel:
        def __init__(self, name: str, kernel):
            self._name, self._kernel = name, kernel

        def __getitem__(self, grid):
            return lambda **arguments: launch(self._name, self._kernel[grid], arguments)

    with ExitStack() as stack:
        for module in ops():
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    stack.enter_context(patch.object(module, name, Kernel(name, kernel)))
        yield


@contextmanager
def changed(change: Change | None) -> Iterator[None]:
    """Inside the block the launches of one kernel have another option."""
    from attn_kernels.ops.common.tiling import Tile

    def launch(name, launcher, arguments):
        if name == change.kernel:
            value = change.value
            if change.option == "lookahead":  # a smaller launch of the same kernel has fewer groups
                value = min(value, arguments["groups"])
            if change.option in arguments:
                arguments = {**arguments, change.option: value}
            if change.option in Tile._fields and "TILE" in arguments:
                arguments = {**arguments, "TILE": arguments["TILE"]._replace(**{change.option: value})}
        return launcher(**arguments)

    if change is None:
        yield
        return
    with _in_place_of_launches(launch):
        yield


def launches(cell: Cell, multiprocessors: int, change: Change | None = None) -> dict[str, list[Launched]]:
    """What a cell launches forward and backward, changed or as it is; each kernel once."""
    from attn_kernels._recording import launching_without_data

    found: dict[str, Launched] = {}

    def launch(name, launcher, arguments):
        found.setdefault(name, Launched(name, arguments))

    directions = []
    with _in_place_of_launches(launch), changed(change), launching_without_data(multiprocessors):
        for call in _passes(cell):
            found.clear()
            call()
            directions.append(list(found.values()))
    return dict(zip(DIRECTIONS, directions, strict=True))


def _passes(cell: Cell) -> Iterator[Callable[[], object]]:
    """Forward and backward of a cell's module on meta tensors."""
    import attn_kernels

    with torch.device("meta"):
        module = KERNELS[cell.kernel].build(attn_kernels, *cell.shape[1:3])
        x = torch.empty(cell.shape, dtype=DTYPES[cell.dtype]).to(memory_format=LAYOUTS[cell.layout]).requires_grad_()
    epilogue = (torch.empty_like(x).requires_grad_(), "relu") if KERNELS[cell.kernel].epilogue else ()
    y = []
    yield lambda: y.append(module(x, *epilogue))
    yield lambda: torch.autograd.grad(y[0], [x, *epilogue[:1], *module.parameters()], torch.empty_like(y[0]))


def cells(
    kernels: Iterable[str], batches: Iterable[int], layouts: Iterable[str], dtypes: Iterable[str], multiprocessors: int
) -> list[Cell]:
    """A cell per change and direction, those of a module and shape behind that of the launches as they are."""
    found = []
    for cell in speed.cells(kernels, ["fused"], batches, layouts, dtypes):
        for mode, launched in launches(cell, multiprocessors).items():
            providers = [AS_IT_IS, *(change.provider for launch in launched for change in changes(launch))]
            found += [cell._replace(suite=SUITE, provider=provider, modes=(mode,)) for provider in providers]
    PRIORS.update({(SUITE, cell.provider): SECONDS for cell in found})
    return sorted(found, key=lambda cell: cell.rank)


def compile_ahead(cells: Sequence[Cell], capability: int, multiprocessors: int) -> None:
    """What the cells launch, in parallel, into Triton's cache: in the cells it would come one after another."""
    from attn_kernels._compiler import compile_all
    from attn_kernels._recording import launching_without_data, specializing

    found: dict[object, None] = {}
    with launching_without_data(multiprocessors), specializing(capability, lambda kernel, _: found.setdefault(kernel)):
        for cell in cells:
            with changed(Change.of(cell.provider)):
                for call in _passes(cell):
                    call()
    outcomes = [outcome for _, outcome in compile_all(list(found), capability)]
    print(f"{sum(outcome.compiled for outcome in outcomes)} of {len(outcomes)} kernels compiled ahead", flush=True)


def measure(cell: Cell, results: Results) -> Iterator[tuple[str, list[Measurement]]]:
    """The device time of one direction; marked where the results are wrong."""
    device = prepare()
    module = speed.build(cell, device)
    operands, _ = first = speed.inputs(cell, device, seed=0)
    count = timing.input_sets((len(operands) + 1) * bytes_of(cell.shape, cell.dtype))
    sets = [first, *(speed.inputs(cell, device, seed) for seed in range(1, count))]
    function = partial(module, activation="relu") if KERNELS[cell.kernel].epilogue else module
    (mode,) = cell.modes
    with changed(Change.of(cell.provider)):
        if operands[0].numel() <= speed.CHECKED:
            try:
                speed.check(cell, module, module, *first)
            except Wrong as error:
                results.mark(cell.place, f"{WRONG}: {error}")
        times = timing.device_times(speed.calls(function, list(module.parameters()), sets)[mode], count)
    yield mode, [Measurement("time", "us", times.times(1e6))]


def report(rows: Iterable[Row]) -> None:
    """Print each change that was quicker than the launches as they are by more than both vary."""
    rows = [row for row in rows if _counts(row)]
    times = {(row.kernel, row.shape, row.layout, row.dtype, row.mode, row.provider): row for row in rows}
    table = Table("kernel", "shape", "layout", "direction", "as it is, us", "change", "us", "gain", box=box.SIMPLE)
    for (*place, provider), row in times.items():
        base = times.get((*place, AS_IT_IS))
        if provider != AS_IT_IS and base is not None and row.p80 < base.p20:
            kernel, shape, layout, _, mode = place
            change = provider.removeprefix("fused ")
            gain = f"{100 * (1 - row.p50 / base.p50):.0f}%"
            table.add_row(kernel, shape, layout, mode, f"{base.p50:.1f}", change, f"{row.p50:.1f}", gain)
    tried = sum(provider != AS_IT_IS for *_, provider in times)
    if table.rows:
        Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(table)
    print(f"{table.row_count} of {tried} changes are quicker than what is launched now, beyond what times vary.")


def _counts(row: Row) -> bool:
    is_ours = row.provider == AS_IT_IS or ("=" in row.provider and row.provider.startswith("fused "))
    return is_ours and row.metric == "time" and row.is_right
