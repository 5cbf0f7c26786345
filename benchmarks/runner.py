"""What ``speed`` and ``train`` share: their arguments, and a run of the cells that they plan."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.correctness import SHAPE, failure
from benchmarks.device import prepare
from benchmarks.plan import Cell, Costs, Measure, execute
from benchmarks.rows import RESULTS, WRONG, Environment, Results

COMPILED_HERE = "kernels that were not in Triton's cache"
UNFINISHED = 3  # the exit status where all is right so far, and cells are left for want of time
PLAIN_LAUNCHES = (
    "_plain_launches"  # behind the name of a fused provider: in plain launches, of which no program waits for another
)


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    parser.epilog = f"example: python -m benchmarks {example}"
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then (default: measure everything)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="of the CSV (default: benchmarks/results)"
    )
    parser.add_argument("--commit", help="what the rows give as the commit (default: what git says)")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: tiny shapes in the interpreter, made-up times"
    )


def what_is_missing() -> str | None:
    """What keeps this machine from measuring, in one line."""
    if not torch.cuda.is_available():
        return f"needs an NVIDIA GPU, and torch {torch.__version__} sees none"
    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    return None


def in_plain_launches() -> bool:
    """Whether the operators run in plain launches here, of which no program waits for another."""
    return os.environ.get("ATTN_KERNELS_SINGLE_LAUNCH") == "0"


def run(
    plan: Callable[[], Sequence[Cell]],
    measures: dict[str, Measure],
    priors: dict[tuple[str, str], float],
    arguments: argparse.Namespace,
) -> int:
    """Check on this GPU what is fused, then measure the planned cells until time is up; wrong ones are marked.

    Returns:
        0 if all is right and measured, 1 if anything is wrong or failed, 2 if this machine cannot measure, 3 if cells
        are left.
    """
    start = getattr(arguments, "start", time.monotonic())
    rehearse = getattr(arguments, "rehearse", False)
    if not rehearse and (missing := what_is_missing()):
        print(f"python -m benchmarks {arguments.command} {missing}: nothing was measured.", file=sys.stderr)
        return 2
    device = prepare()
    environment = Environment.current(arguments.commit)
    cells, pretence, shape = plan(), nullcontext(), SHAPE
    if rehearse:
        from benchmarks import rehearsal

        environment = environment._replace(gpu=rehearsal.GPU)
        cells, pretence, shape = rehearsal.tiny(cells), rehearsal.pretended_gpu(quick=True), rehearsal.SHAPE
    path = arguments.out / environment.file_name
    results = Results(path, environment, [RESULTS / path.name], PLAIN_LAUNCHES if in_plain_launches() else "")
    print(f"{environment}\nRows go to {path}.", flush=True)
    for row in results.settle():
        print(f"{' '.join(row.place)} {row.mode}: {row.note}", flush=True)
    from attn_kernels._compiler import compilations  # here, for prepare() has to come before

    pending = [cell for cell in cells if not results.has(cell.place, cell.modes)]
    with pretence, compilations() as compiled:
        right = mark_wrong(pending, results, device, shape)
        try:
            outcome = execute(cells, measures, results, Costs(priors), start + 60 * arguments.minutes)
        except RuntimeError as error:
            print(f"Stopped, for the GPU no longer answers: {error}", file=sys.stderr)
            return UNFINISHED
    own = [name for name in compiled if not name.startswith("triton_")]  # those are torch.compile's
    print(f"{COMPILED_HERE}: {len(own)} {' '.join(sorted(set(own)))}".rstrip())
    print(outcome)
    return UNFINISHED if outcome.left else 0 if right and not outcome.failed else 1


def mark_wrong(cells: Sequence[Cell], results: Results, device: torch.device, shape: tuple[int, ...]) -> bool:
    """Check each kernel that cells need to be right; where it is not, leave a row that says so and mark theirs."""
    kernels = dict.fromkeys(cell.fused for cell in cells if cell.fused)
    right = True
    for kernel in kernels:
        place = kernel, "fused", "x".join(map(str, shape)), "all", "all"
        if results.has(place, ["correctness"]):  # found wrong, or fatal, before
            message = "found before"
        else:
            with results.running(place, ["correctness"]):
                message = failure(kernel, device, shape)
            if message:
                results.fail(place, "correctness", f"{WRONG}: {message}")
        if message:
            right = False
            print(f"{WRONG} {kernel}, {message}: its times are marked.", file=sys.stderr, flush=True)
            for cell in cells:
                if cell.fused == kernel:
                    results.mark(cell.place, f"{WRONG}: {message}")
    return right
