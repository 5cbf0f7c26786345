"""Random shapes, dtypes, layouts and options of every module against the reference in float64, for so many seconds.

A case is drawn from its seed alone: ``python -m benchmarks fuzz --seed S --cases 1`` draws one again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import reference
from benchmarks import timing
from benchmarks.correctness import errors, results
from benchmarks.device import prepare
from benchmarks.process import append
from benchmarks.runner import what_is_missing
from reference import catalogue
from reference.catalogue import LAYOUTS, OPERATORS

DTYPES = {name: dtype for name, dtype in catalogue.DTYPES.items() if name != "fp64"}
ELEMENTS = 2**22  # of x at most
REHEARSED = 2**11  # in the interpreter


class Case(NamedTuple):
    """A module and what it is called on."""

    module: str
    options: dict[str, object]
    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    block: bool
    training: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks fuzz --seconds 120 --seed 1000"
    parser.add_argument("--seconds", type=float, default=math.inf, help="(default: no limit)")
    parser.add_argument("--cases", type=int, default=None, help="(default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count up (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="of smoke.jsonl (default: here)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tiny shapes in the interpreter")


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    if not a.rehearse and (missing := what_is_missing()):
        print(f"python -m benchmarks fuzz {missing}.", file=sys.stderr)
        return 2
    device = prepare()
    end, done, failed = getattr(a, "start", time.monotonic()) + a.seconds, 0, 0
    for seed in itertools.count(a.seed) if a.cases is None else range(a.seed, a.seed + a.cases):
        if time.monotonic() > end:
            break
        case = draw(seed, REHEARSED if a.rehearse else ELEMENTS)
        print(f"seed {seed}: {case}", flush=True)
        if message := wrong(case, seed, device):
            failed += 1
            line = {"family": "fuzz", "step": "error", "case": f"seed {seed}: {case}", "ok": False, "message": message}
            append(a.out / "smoke.jsonl", json.dumps(line) + "\n")
            print(f"seed {seed}: {message}", flush=True)
            try:
                timing.release()
            except RuntimeError as lost:
                print(f"The GPU no longer answers: {lost}", flush=True)
                return 4  # as if it had died
        done += 1
    line = {"family": "fuzz", "step": "end", "ok": not failed, "message": f"{failed} of {done} wrong, seed {a.seed} on"}
    append(a.out / "smoke.jsonl", json.dumps(line) + "\n")
    print(line["message"], flush=True)
    return 1 if failed else 0


def draw(seed: int, elements: int) -> Case:
    """The case of a seed, of so many elements at most."""
    r = random.Random(seed)
    module = r.choice(tuple(OPERATORS))
    while True:
        # Around powers of two and odd ones, where tiles end; often small.
        n, c, h, w = (max(1, 2 ** r.randint(0, top) + r.choice((-1, 0, 0, 0, 1, 3))) for top in (6, 11, 7, 7))
        if n * c * h * w <= elements and not (module == "BAM" and (n == 1 or max(h, w) > 4 * elements**0.25)):
            break
    options = OPERATORS[module].draw(r, c)
    layout = r.choice((*LAYOUTS, "sliced", "expanded"))
    return Case(module, options, (n, c, h, w), r.choice([*DTYPES]), layout, r.random() < 0.4, r.random() < 0.8)


def build(case: Case, kit: object) -> nn.Module:
    """From ``reference`` or ``attn_kernels``."""
    return OPERATORS[case.module].build(kit, case.shape[1], **case.options).train(case.training)


def inputs(case: Case, device: torch.device) -> list[Tensor | None]:
    """x, dy and perhaps a residual; of other strides than a dense tensor's where the layout says so."""
    dtype, n = DTYPES[case.dtype], case.shape[0]

    def normal() -> Tensor:
        if case.layout == "sliced":
            wider = torch.randn(*case.shape[:3], case.shape[3] + 3, device=device)
            return wider.to(dtype)[..., 1:-2]
        if case.layout == "expanded":
            return torch.randn(1, *case.shape[1:], device=device).to(dtype).expand(n, -1, -1, -1)
        return torch.randn(case.shape, device=device).to(dtype).contiguous(memory_format=LAYOUTS[case.layout])

    return [normal() + 0.25, normal(), normal() if case.block else None]


def wrong(case: Case, seed: int, device: torch.device) -> str | None:
    """What is wrong with a case's results; None where they are right."""
    import attn_kernels  # here, for prepare() has to come before

    torch.manual_seed(seed)
    try:
        eager = build(case, reference).to(device)
        fused = build(case, attn_kernels).to(device)
        fused.load_state_dict(eager.state_dict())
        tensors = inputs(case, device)
        exact = build(case, reference).to(device).double()
        exact.load_state_dict(eager.state_dict())
        doubles = [None if t is None else t.double() for t in tensors]
        got, want, oracle = results(fused, *tensors), results(eager, *tensors), results(exact, *doubles)
        # Few elements may all round luckily in the reference, and what cancels has no size of its own.
        floor = 4 * torch.finfo(DTYPES[case.dtype]).eps
        found = errors(got, want, oracle, floor, least=1e-2 * doubles[1].norm().item())
    except Exception as error:  # of whatever kind: the other cases are still to be seen
        return f"{type(error).__name__}: {error}"[:400]
    bad = [str(error) for error in found if not error.ok]
    return "; ".join(bad) or None
