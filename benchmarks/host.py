"""Host time of a call without its launches: checks, dispatch, autograd, allocations, configuration. Needs no GPU.

Tensors are tiny and Triton's launcher is replaced by a function that does nothing, so that what is left is Python and
PyTorch on this machine's CPU. A launch adds about 11 us; `python -m benchmarks speed` times whole calls on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.provenance import command, commit, versions
from reference.catalogue import WHOLE

MODULES = tuple(WHOLE)
SHAPE = (2, 64, 8, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks host --modules SE SimAM --calls 2000"
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument(
        "--calls", type=int, default=1000, help="calls per measurement, of which the best of ten counts"
    )


def run(arguments: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU, if they ran
    import attn_kernels
    import reference

    torch.set_num_threads(1)
    table = Table(
        title=f"Microseconds of host time per call on {SHAPE}, launches left out",
        caption="Targets on a GPU, launches included: forward 25, forward + backward 60 for SE and SimAM.",
        box=box.SIMPLE_HEAD,
    )
    for name in ("module", "forward", "forward + backward", "reference forward", "reference forward + backward"):
        table.add_column(name, justify="right" if table.columns else "left")
    for name in arguments.modules:
        with no_launches():
            fused = measure(WHOLE[name].build(attn_kernels, SHAPE[1]), arguments.calls)
        plain = measure(WHOLE[name].build(reference, SHAPE[1]), arguments.calls)
        table.add_row(name, *(f"{microseconds:.0f}" for microseconds in (*fused, *plain)))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    found = ", ".join(f"{package} {version}" for package, version in versions().items())
    console.print(f"Measured on this machine's CPU, no GPU: {found}, commit {commit()}: {command()}", soft_wrap=True)
    return 0


@contextmanager
def no_launches() -> Iterator[None]:
    """Inside the block a launch of a kernel does nothing."""
    from triton.runtime.interpreter import InterpretedFunction

    def nothing(*args, **kwargs) -> None:
        pass

    with patch.object(InterpretedFunction, "__getitem__", lambda kernel, grid: nothing):
        yield


def measure(module: nn.Module, calls: int) -> tuple[float, float]:
    """Microseconds of forward without gradients, and of forward and backward."""
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    leaf = x.clone().requires_grad_()
    inputs = [leaf, *module.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(leaf), inputs, dy)

    return _best(forward, calls), _best(both, calls)


def _best(call: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(max(calls // 10, 1)):
            call()
        times.append((time.perf_counter() - start) / max(calls // 10, 1))
    return 1e6 * min(times)
