"""What ``speed``, ``train`` and ``all`` share: their arguments, and a run of the cells that they plan."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.device import prepare
from benchmarks.plan import Cell, Costs, Measure, execute
from benchmarks.rows import RESULTS, Environment, Results


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    parser.epilog = f"example: python -m benchmarks {example}"
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then (default: measure everything)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="of the CSV (default: benchmarks/results)"
    )
    parser.add_argument("--commit", help="what the rows give as the commit (default: what git says)")


def what_is_missing() -> str | None:
    """What keeps this machine from measuring, in one line."""
    if not torch.cuda.is_available():
        return f"needs an NVIDIA GPU, and torch {torch.__version__} sees none"
    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    return None


def run(
    plan: Callable[[], Sequence[Cell]],
    measures: dict[str, Measure],
    priors: dict[tuple[str, str], float],
    arguments: argparse.Namespace,
) -> int:
    """Check on this GPU what is fused, then measure the planned cells of what is right until time is up.

    Returns:
        0 if all is right and measured, 1 if anything is wrong or failed, 2 if this machine cannot measure.
    """
    start = time.monotonic()
    if missing := what_is_missing():
        print(f"python -m benchmarks {arguments.command} {missing}: nothing was measured.", file=sys.stderr)
        return 2
    device = prepare()
    from benchmarks.correctness import failures

    environment = Environment.current(arguments.commit)
    results = Results(arguments.out / environment.file_name, environment, [RESULTS / environment.file_name])
    print(f"{environment}\nRows go to {results.path}.", flush=True)
    cells = plan()
    wrong = failures(dict.fromkeys(cell.fused for cell in cells if cell.fused), device)
    for kernel, message in wrong.items():
        print(f"WRONG {kernel}, {message}: no fused {kernel} is timed.", file=sys.stderr, flush=True)
    cells = [cell for cell in cells if cell.fused not in wrong]
    try:
        outcome = execute(cells, measures, results, Costs(priors), start + 60 * arguments.minutes)
    except RuntimeError as error:
        print(f"Stopped, for the GPU no longer answers: {error}", file=sys.stderr)
        return 1
    print(outcome)
    return 1 if wrong or outcome.failed else 0
