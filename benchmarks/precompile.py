"""Compile every kernel that `all` launches, in parallel, into Triton's cache: who launches it later compiles nothing.

What `attn_kernels.precompile` does for one model is done here for many modules and networks. It takes one to two CPU
seconds per kernel, and no GPU: without one, kernels are compiled for an H100. The cache is where TRITON_CACHE_DIR says.
With a GPU, the baselines go into torch.compile's cache, by a call of each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import smoke, speed, timing, train
from benchmarks.correctness import CASES, SHAPE
from benchmarks.device import prepare
from benchmarks.machine_code import ARCHITECTURES
from benchmarks.plan import Cell
from benchmarks.shapes import DTYPES, KERNELS
from reference.catalogue import FAMILIES, LAYOUTS

STEPS = ("smoke", "speed", "train", "baselines")
BATCHES = (32, 256)  # that `all` times


class Case(NamedTuple):
    """A module in training, forward and backward, on one kind of input."""

    kernel: str
    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    block: bool  # with a residual and a ReLU


class Block(nn.Module):
    """A module within a network, whose input has a gradient; with a residual and a ReLU behind it, or without."""

    def __init__(self, module: nn.Module, epilogue: bool):
        super().__init__()
        self.module, self.epilogue = module, epilogue

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return self.module(x, x.clone(), "relu") if self.epilogue else self.module(x)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks precompile --jobs 8"
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per CPU)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=[*KERNELS], metavar="KERNEL")
    names = ", ".join(ARCHITECTURES)
    parser.add_argument("--architecture", choices=ARCHITECTURES, metavar="NAME", help=f"{names} (default: this GPU's)")


def run(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, but what is compiled here is not for the interpreter.", file=sys.stderr)
    from attn_kernels._compiler import compile_all  # here, for TRITON_INTERPRET must not be set

    capability, multiprocessors = target(arguments.architecture)
    found = cases(arguments.steps, arguments.kernels)
    print(f"{len(found)} modules and networks for sm_{capability} with {multiprocessors} multiprocessors", flush=True)
    kernels: dict[object, None] = {}
    compiled, failures = [], []

    def say(done: int, count: int, what: str, error: str) -> None:
        failures.extend([what] if error else [])
        print(f"{done} of {count}, {time.monotonic() - start:.1f} s: {what} {error}".rstrip(), flush=True)

    for done, case in enumerate(found, 1):
        launched, error = [], ""
        try:
            launched = launches(case, capability, multiprocessors)
        except Exception as raised:  # of whatever kind: the others are still to be compiled
            error = f"{type(raised).__name__}: {str(raised)[-300:]}"
        kernels |= dict.fromkeys(launched)
        say(done, len(found), f"{' '.join(map(str, case[:5]))}: {len(launched)} kernels", error)
    for done, (kernel, outcome) in enumerate(compile_all(list(kernels), capability, arguments.jobs), 1):
        compiled += [outcome.cpu_seconds] if outcome.compiled else []
        say(done, len(kernels), f"{kernel.kernel} {'compiled' if outcome.compiled else 'cached'}", outcome.error)
    others = baselines(arguments.steps, arguments.kernels)
    if others:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a process: there are enough of them
        with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(others)), _ignore_interrupts) as pool:
            for done, (cell, error) in enumerate(pool.imap_unordered(_baseline, others), 1):
                say(done, len(others), f"torch.compile {' '.join(map(str, cell[:5]))}", error)
    seconds = time.monotonic() - start
    done = f"{len(compiled)} of {len(kernels)} kernels compiled in {sum(compiled):.0f} CPU seconds"
    print(f"{done}, {len(failures)} failures, {seconds:.1f} s", flush=True)
    return 1 if failures else 0


def _ignore_interrupts() -> None:
    """Only the parent answers SIGINT, and ends the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def target(architecture: str | None = None) -> tuple[int, int]:
    """The capability and the multiprocessors of an architecture, or of this machine's GPU; without one, of an H100."""
    if architecture is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return 10 * gpu.major + gpu.minor, gpu.multi_processor_count
    found = ARCHITECTURES[architecture or "sm_90"]
    return found.capability, found.multiprocessors


def cases(steps: Sequence[str] = STEPS, kernels: Sequence[str] = tuple(KERNELS)) -> list[Case | Cell]:
    """What the steps launch, each once; the networks first, which take longest, then in the order of the steps."""
    found: list[Case | Cell] = []
    if "train" in steps:
        networks = [name for name, rank in train.PEERS.items() if rank == 0]
        networks += [f"{attention}_{train.RESNET}" for attention in train.ATTENTIONS]
        cells = train.cells(networks, ["fused"], dtypes=["bf16"], modes=["train"])
        found += [cell for cell in cells if cell.fused in kernels]
    if "smoke" in steps:
        for family in FAMILIES:
            found += [Case(family, shape, "bf16", layout, block) for shape, layout, block in smoke.CASES]
    if "speed" in steps:
        cells = speed.cells(KERNELS, ["fused"], BATCHES, LAYOUTS, ["bf16"])
        for cell in sorted(cells, key=lambda cell: cell.rank):
            found += [Case(cell.kernel, cell.shape, cell.dtype, cell.layout, KERNELS[cell.kernel].epilogue)]
        for family in FAMILIES:
            found += [Case(family, SHAPE, dtype, layout, True) for dtype, layout in CASES]
    return [case for case in dict.fromkeys(found) if isinstance(case, Cell) or case.kernel in kernels]


def baselines(steps: Sequence[str] = STEPS, kernels: Sequence[str] = tuple(KERNELS)) -> list[Cell]:
    """Those of the speed step that torch.compile computes; none without a GPU, which it has to see."""
    if "baselines" not in steps or not torch.cuda.is_available():
        return []
    cells = speed.cells(KERNELS, ["compile"], BATCHES[:1], LAYOUTS, ["bf16"])
    return sorted((cell for cell in cells if cell.kernel in kernels), key=lambda cell: cell.rank)


def launches(case: Case | Cell, capability: int, multiprocessors: int) -> list:
    """The kernels that a case launches, each once."""
    import attn_kernels
    from attn_kernels.precompile import specializations  # here, for TRITON_INTERPRET must not be set

    with torch.device("meta"):
        if isinstance(case, Cell):  # a network, which is called under autocast
            model, dtype = train.build(case), torch.float32
        else:
            module, dtype = KERNELS[case.kernel].build(attn_kernels, *case.shape[1:3]), DTYPES[case.dtype]
            model = Block(module, case.block)
    with torch.autocast("cpu", DTYPES[case.dtype], enabled=isinstance(case, Cell) and case.dtype != "fp32"):
        model = model.to(memory_format=LAYOUTS[case.layout])
        return specializations(model, case.shape, dtype, LAYOUTS[case.layout], True, capability, multiprocessors)


def _baseline(cell: Cell) -> tuple[Cell, str]:
    """Into torch.compile's own cache, by a call; what went wrong.

    But for the configurations that it times: here others use the GPU at the same time.
    """
    from torch._inductor import config

    try:
        device = prepare()
        plain = speed.build(cell, device)
        module = torch.compile(plain, mode=speed.COMPILE_MODES[cell.provider], dynamic=False)
        function = partial(module, activation="relu") if KERNELS[cell.kernel].epilogue else module
        calls = speed.calls(function, list(plain.parameters()), [speed.inputs(cell, device, seed=0)])
        with config.patch(autotune_local_cache=False):
            for call in calls["both"](1):
                call()
        del plain, module, calls, call
        timing.release()
    except Exception as raised:  # of whatever kind: the others are still to be compiled
        return cell, f"{type(raised).__name__}: {str(raised)[-300:]}"
    return cell, ""
