"""Compile every kernel that `all` launches, in parallel, into Triton's cache: who launches it later compiles nothing.

Modules and networks run on meta tensors, which have no memory, through Triton's own launcher, which compiles and does
not launch. It takes about 0.6 CPU seconds per kernel, and no GPU: without one, kernels are compiled for an H100. The
cache is where TRITON_CACHE_DIR says. With a GPU, the baselines go into torch.compile's cache, by a call of each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import smoke, speed, timing, train
from benchmarks.correctness import CASES, SHAPE
from benchmarks.device import prepare
from benchmarks.machine_code import ARCHITECTURES, compiling, counting
from benchmarks.plan import Cell
from benchmarks.shapes import DTYPES, KERNELS, LAYOUTS

STEPS = ("smoke", "speed", "train", "baselines")
BATCHES = (32, 256)  # that `all` times


class Case(NamedTuple):
    """A module in training, forward and backward, on one kind of input."""

    kernel: str
    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    block: bool  # with a residual and a ReLU


class Compiled(NamedTuple):
    """What came of a case or a network: the kernels that it launches, those that the cache did not have, an error."""

    case: Case | Cell
    kernels: int
    compiled: int
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks precompile --jobs 8"
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=[*KERNELS], metavar="KERNEL")
    names = ", ".join(ARCHITECTURES)
    parser.add_argument("--architecture", choices=ARCHITECTURES, metavar="NAME", help=f"{names} (default: this GPU's)")


def run(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, but what is compiled here is not for the interpreter.", file=sys.stderr)
    capability, multiprocessors = target(arguments.architecture)
    jobs = cases(arguments.steps, arguments.kernels)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a process: there are enough of them
    print(f"{len(jobs)} modules and networks for sm_{capability} with {multiprocessors} multiprocessors", flush=True)
    compiled = failed = 0
    one = partial(launches, capability=capability, multiprocessors=multiprocessors)
    with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(jobs)), _ignore_interrupts) as pool:
        for done, found in enumerate(pool.imap_unordered(one, jobs), 1):
            compiled, failed = compiled + found.compiled, failed + bool(found.error)
            name = " ".join(map(str, found.case[:5]))
            print(
                f"{done} of {len(jobs)}, {time.monotonic() - start:.1f} s: {name}: {found.kernels} kernels, "
                f"{found.compiled} compiled {found.error}",
                flush=True,
            )
    seconds = time.monotonic() - start
    print(f"{compiled} kernels compiled, {failed} of {len(jobs)} failed, {seconds:.1f} s", flush=True)
    return 1 if failed else 0


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
        for family in smoke.FAMILIES:
            found += [Case(family, shape, "bf16", layout, block) for shape, layout, block in smoke.CASES]
    if "speed" in steps:
        cells = speed.cells(KERNELS, ["fused"], BATCHES, LAYOUTS, ["bf16"])
        for cell in sorted(cells, key=lambda cell: cell.rank):
            found += [Case(cell.kernel, cell.shape, cell.dtype, cell.layout, KERNELS[cell.kernel].epilogue)]
        for family in smoke.FAMILIES:
            found += [Case(family, SHAPE, dtype, layout, True) for dtype, layout in CASES]
    if "baselines" in steps and torch.cuda.is_available():  # torch.compile has to see the GPU
        cells = speed.cells(KERNELS, ["compile"], BATCHES[:1], LAYOUTS, ["bf16"])
        found += sorted((cell for cell in cells if cell.kernel in kernels), key=lambda cell: cell.rank)
    return [case for case in dict.fromkeys(found) if isinstance(case, Cell) or case.kernel in kernels]


def launches(case: Case | Cell, capability: int, multiprocessors: int) -> Compiled:
    """Compile in this process, where it is not in the cache yet, what one case launches."""
    import attn_kernels  # noqa: F401  here, for TRITON_INTERPRET must not be set

    kernels: set[object] = set()
    error = ""
    with counting() as misses:
        try:
            if isinstance(case, Cell) and case.suite == speed.SUITE:
                _baseline(case)
            else:
                with compiling(capability, multiprocessors, kernels.add):
                    (_network if isinstance(case, Cell) else _module)(case)
        except Exception as raised:  # of the compiler, of whatever kind: the others are still to be compiled
            error = f"{type(raised).__name__}: {str(raised)[-300:]}"
    return Compiled(case, len(kernels), len(misses), error)


def _module(case: Case) -> None:
    import attn_kernels

    with torch.device("meta"):
        module = KERNELS[case.kernel].build(attn_kernels, *case.shape[1:3])
    x = _empty(case.shape, case.dtype, case.layout).requires_grad_()
    leaves = [x, *([torch.empty_like(x).requires_grad_()] if case.block else [])]
    y = module(*leaves, "relu") if case.block else module(x)
    torch.autograd.grad(y, [*leaves, *module.parameters()], torch.empty_like(y))


def _network(cell: Cell) -> None:
    with torch.device("meta"):
        network = train.build(cell).to(memory_format=LAYOUTS[cell.layout])
    with _as_under_autocast(DTYPES[cell.dtype], LAYOUTS[cell.layout]):
        y = network(_empty(cell.shape, "fp32", cell.layout))
        torch.autograd.grad(y, list(network.parameters()), torch.empty_like(y))


def _baseline(cell: Cell) -> None:
    """Into torch.compile's own cache, by a call.

    But for the configurations that it times: here others use the GPU at the same time.
    """
    from torch._inductor import config

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


def _empty(shape: Sequence[int], dtype: str, layout: str) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta", memory_format=LAYOUTS[layout])


@contextmanager
def _as_under_autocast(dtype: torch.dtype, layout: torch.memory_format) -> Iterator[None]:
    """Layers compute in ``dtype`` and keep the layout, as under autocast on a GPU: meta tensors do neither."""

    def lowered(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(module: nn.Module, x: Tensor) -> Tensor:
            parameters = {name: p.to(dtype) for name, p in module.named_parameters(recurse=False)}
            with patch.dict(module._parameters, parameters):
                return laid_out(forward(module, x.to(dtype)))

        return call

    def kept(normalise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args, **kwargs) -> Tensor:
            return laid_out(normalise(x, *args, **kwargs))

        return call

    def laid_out(y: Tensor) -> Tensor:
        return y.contiguous(memory_format=layout) if y.dim() == 4 else y

    with ExitStack() as stack:
        for kind in (nn.Conv2d, nn.Linear):
            stack.enter_context(patch.object(kind, "forward", lowered(kind.forward)))
        stack.enter_context(patch.object(F, "batch_norm", kept(F.batch_norm)))
        yield
